# SPDX-License-Identifier: GPL-2.0
"""How the cost of an operation grows with the size of what it works in."""

from __future__ import annotations

import dataclasses
import math

from memfile.bench.counts import Report, counts_of
from memfile.bench.table import Table, number
from memfile.bench.windows import Symbols, Window

# Each doubling of the size may add this part to the cost of a unit of work, as the search in a
# tree does. Work that grew with the size itself would double it.
PER_DOUBLING = 0.1
# Below this a series says nothing: the same instructions, once more or once less.
LEAST = 200.0
BYTES = {1 << 10: "K", 1 << 20: "M", 1 << 30: "G", 1 << 40: "T"}


@dataclasses.dataclass
class Point:
    """The least of the runs at one size: what else happens in the machine only adds to it."""

    size: int
    work: int
    # Instructions without the turns of repeated string instructions.
    cost: float

    @property
    def each(self) -> float:
        """Of a unit of work."""
        return self.cost / self.work


@dataclasses.dataclass
class Series:
    """An operation on one kind of memory, at all sizes; the smallest comes first."""

    name: str
    subject: str
    points: list[Point]
    # The same of guest_memfd, if it has that.
    reference: Series | None = None

    @property
    def growth(self) -> float:
        """The largest cost of a unit of work, of that at the smallest size."""
        return max(point.each for point in self.points) / self.points[0].each if self.points[0].each > 0 else 1.0

    @property
    def at_most(self) -> float:
        """Growth that guest_memfd has, too, comes from KVM or from the page cache."""
        limit = 1 + PER_DOUBLING * math.log2(self.points[-1].size / self.points[0].size)
        return max(limit, self.reference.growth) if self.reference else limit

    @property
    def met(self) -> bool:
        return self.growth <= self.at_most or max(point.each for point in self.points) < LEAST

    def as_json(self) -> dict[str, object]:
        return {
            "figure": self.name, "subject": self.subject, "points": [dataclasses.asdict(p) for p in self.points],
            "growth": self.growth, "at_most": self.at_most, "met": self.met,
        }


def series(report: Report, windows: dict[int, Window], symbols: Symbols) -> list[Series]:
    """The fastest growth, in relation to its limit, comes first."""
    found: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for line in report.get("growth", []):
        point = Point(line["size"], line["work"], counts_of(line, windows, symbols).work)
        found.setdefault((line["name"], line["subject"]), {}).setdefault(point.size, []).append(point)
    every = [
        Series(name, subject, [
            Point(size, runs[0].work, min(run.cost for run in runs)) for size, runs in sorted(sizes.items())
        ]) for (name, subject), sizes in found.items()
    ]
    theirs = {one.name: one for one in every if one.subject == "guest_memfd"}
    for one in every:
        one.reference = theirs.get(one.name) if one.subject != "guest_memfd" else None
    # The kinds of memory stay side by side.
    worst: dict[str, float] = {}
    for one in every:
        worst[one.name] = max(worst.get(one.name, 0.0), one.growth / one.at_most)
    return sorted(every, key=lambda one: (-worst[one.name], one.name))


def size(value: int) -> str:
    """Bytes, in the largest unit of which they are a multiple."""
    unit = max((unit for unit in BYTES if value % unit == 0), default=0)
    return f"{value // unit}{BYTES[unit]}" if unit else str(value)


def tables(every: list[Series]) -> list[Table]:
    """One for each operation: a line for each kind of memory, a column for each size."""
    found: list[Table] = []
    for name in dict.fromkeys(one.name for one in every):
        of = [one for one in every if one.name == name]
        in_bytes = "size" in name
        head = ["", *(size(p.size) if in_bytes else str(p.size) for p in of[0].points), "growth", "at most", ""]
        lines = [[
            one.subject, *(number(point.each) for point in one.points), f"{one.growth:.2f}",
            *([f"{one.at_most:.2f}", "met" if one.met else "MISSED"] if one.subject != "guest_memfd" else ["", ""]),
        ] for one in of]
        found.append(Table(f"Growth: {name}; instructions for a unit of work", head, lines, frozenset((0,))))
    return found
