# SPDX-License-Identifier: GPL-2.0
"""The result as one page for a browser, which loads nothing else."""

from __future__ import annotations

import math
from html import escape

from memfile.bench.counts import Row
from memfile.bench.table import Table, number, ratio
from memfile.bench.text import Result, is_of_sizes, tables
from memfile.paths import SCRIPTS

# The style of all pages, and that of this one.
STYLE = (SCRIPTS / "page.css").read_text() + """
@media screen { body { max-width: 84em; } }
td { white-space: nowrap; }
.aim { stroke: var(--text); stroke-width: 2; }
.good { fill: var(--blue); } .bad { fill: var(--orange); } .none { fill: var(--grey); }
"""

NAME, PLOT, NUMBER, LINE = 560, 460, 90, 22
CLASSES = {True: "good", False: "bad", None: "none"}


def summary(result: Result) -> str:
    judged = [row for row in result.rows if row.met is not None]
    missed = sum(not row.met for row in judged)
    words = (
        f"On Linux {escape(result.kernel)}, in an emulated machine with one CPU whose clock counts instructions, "
        f"{len(judged) - missed} of {len(judged)} rows meet their aim. Turns of repeated string instructions, which "
        "clear and copy, are not judged: QEMU counts each of them, a processor does not work that way. "
        "No figure says anything about cache misses, contention or the time that interrupts between CPUs take; "
        "acquisitions of locks, locked instructions and flushes are counted instead."
    )
    if result.missing:
        words += f" Missing on this machine: {len(result.missing)}."
    worse = sum(change.verdict == "WORSE" for change in result.changes or [])
    if result.changes is not None:
        words += f" <strong>Worse than the saved result by more than the noise: {worse}.</strong>"
    return f"<p id=summary>{words}</p>\n"


def bar(name: str, y: int, width: float, kind: str, value: str, title: str, beyond: float = 0) -> str:
    """A bar, and its value behind it, or behind what else ends there."""
    end = NAME + max(width, beyond, 1) + 6
    return (
        f"<g><title>{escape(title)}</title><text x=0 y={y + 14}>{escape(name)}</text>"
        f'<rect class="{kind}" x={NAME} y={y + 2} width={max(width, 1):.1f} height={LINE - 6} />'
        f"<text x={end:.1f} y={y + 14}>{escape(value)}</text></g>\n"
    )


def mark(x: float, top: int, bottom: int, kind: str = "axis") -> str:
    return f'<path class={kind} d="M{x:.1f} {top}V{bottom}" />\n'


def ratios(rows: list[Row]) -> str:
    """The ratio of each row, on a scale that ends at 2; the number shows a larger one."""
    most = 2.0
    height = 24 + LINE * len(rows)
    out = f"<svg id=ratios viewBox=\"0 0 {NAME + PLOT + NUMBER} {height}\" role=img>\n<title>Ratios</title>\n"
    for tick in (0.0, 0.5, 1.0, 1.5, 2.0):
        x = NAME + PLOT * tick / most
        out += mark(x, 20, height) + f"<text class=dim text-anchor=middle x={x:.0f} y=14>{tick:.1f}</text>\n"
    for n, row in enumerate(rows):
        y = 24 + LINE * n
        title = (
            f"{row.figure}, {row.subject}: {number(row.counts.work)} instructions, {row.reference}: "
            f"{number(row.reference_counts.work)}"
        )
        limit = row.below if row.below is not None else row.at_most
        width, aim = (PLOT * min(value, most) / most for value in (row.ratio, limit or 0.0))
        out += bar(f"{row.figure}, {row.subject}", y, width, CLASSES[row.met], ratio(row.ratio), title, aim)
        if limit is not None:
            out += mark(NAME + aim, y, y + LINE - 2, "aim")
    return out + "</svg>\n"


def by_size(rows: list[Row]) -> str:
    """The cost of a GiB in pages of each size, on a logarithmic scale from one instruction on."""
    bars: list[tuple[str, float, str]] = []
    for name in dict.fromkeys(row.figure for row in rows if is_of_sizes(row)):
        of = sorted((row for row in rows if row.figure == name and is_of_sizes(row)), key=lambda row: row.page)
        bars.append((f"{name}, {of[0].reference}", of[0].reference_counts.work, "none"))
        bars += [(f"{name}, {row.subject}", row.counts.work, CLASSES[row.met]) for row in of]
    most = max((math.log10(max(value, 1)) for _, value, _ in bars), default=0.0)
    if most <= 0:
        return ""
    height = 24 + LINE * len(bars)
    out = f"<svg id=sizes viewBox=\"0 0 {NAME + PLOT + NUMBER} {height}\" role=img>\n<title>A GiB</title>\n"
    for power in range(0, int(most) + 1, 2):
        x = NAME + PLOT * power / most
        out += mark(x, 20, height) + f"<text class=dim text-anchor=middle x={x:.0f} y=14>10^{power}</text>\n"
    for n, (name, value, kind) in enumerate(bars):
        width = PLOT * math.log10(max(value, 1)) / most
        out += bar(name, 24 + LINE * n, width, kind, number(value), f"{name}: {number(value)} instructions")
    return f"<h2>A GiB, by the size of its pages</h2>\n{out}</svg>\n"


def table_of(table: Table) -> str:
    def cells(kind: str, line: list[str]) -> str:
        words = (" class=word" if n in table.words else "" for n in range(len(line)))
        return "".join(f"<{kind}{word}>{escape(cell)}</{kind}>" for word, cell in zip(words, line))

    body = "".join(f"<tr>{cells('td', line)}</tr>\n" for line in table.lines)
    head = f"<tr>{cells('th', table.head)}</tr>\n"
    return f"<div class=scroll><table><caption>{escape(table.title)}</caption>\n{head}{body}</table></div>\n"


def html(result: Result) -> str:
    return (
        "<!DOCTYPE html>\n<html lang=en>\n<meta charset=utf-8>\n<meta name=viewport content=\"width=device-width\">\n"
        f"<title>memfile bench</title>\n<style>{STYLE}</style>\n<h1>What private memory costs, in instructions</h1>\n"
        f"{summary(result)}<h2>Ratios, what hurts most first</h2>\n{ratios(result.rows)}{by_size(result.rows)}"
        f"<h2>Tables</h2>\n{''.join(map(table_of, tables(result)))}</html>\n"
    )
