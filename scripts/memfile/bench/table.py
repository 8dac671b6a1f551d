# SPDX-License-Identifier: GPL-2.0
"""A table of cells, and numbers in it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Table:
    """Lines of cells below a head; the columns of words stand left."""

    title: str
    head: list[str]
    lines: list[list[str]]
    words: frozenset[int]

    def text(self) -> str:
        if not self.lines:
            return f"{self.title}\n"
        every = [self.head, *self.lines]
        widths = [max(len(line[n]) for line in every) for n in range(len(self.head))]
        out = f"{self.title}\n\n"
        for line in every:
            cells = (f"{cell:{'<' if n in self.words else '>'}{widths[n]}}" for n, cell in enumerate(line))
            out += "  ".join(cells).rstrip() + "\n"
        return out


def number(value: float) -> str:
    """Whole instructions; parts of them where there are few."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def ratio(value: float) -> str:
    """Three digits behind the point; of a small part the first two that count."""
    return f"{value:.3f}" if value >= 0.1 or value == 0 else f"{value:.2g}"
