# SPDX-License-Identifier: GPL-2.0
"""How the cost of an operation grows with the size of what it works in."""

from __future__ import annotations

import dataclasses
import math

from memfile.bench.counts import SAME, Change, Report, by_verdict, counts_of, is_memfile
from memfile.bench.table import Table, number
from memfile.bench.windows import Symbols, Window

# Each doubling of the size may add this part to the cost of a unit of work, as the search in a
# tree does: from one size to the next, and from the smallest to the largest, so that neither one
# step nor many small ones are too much. Work that grew with the size itself would double it.
PER_DOUBLING = 0.1
# Below this a unit of work says nothing: the same instructions, once more or once less.
LEAST = 200.0
# Why series have no guest_memfd beside them, by a part of their names.
ALONE = {
    "by observers of the file": "no other memory has observers",
    "by running invalidations of the file": "guest_memfd keeps no list of them",
    "by VMs that bind": "a guest_memfd is of one VM",
    "with which two VMs bind": "a guest_memfd is of one VM",
    "ask whether a folio was used": "guest_memfd's pages are on no list and have no age",
}
BYTES = {1 << 10: "K", 1 << 20: "M", 1 << 30: "G", 1 << 40: "T"}


@dataclasses.dataclass
class Point:
    """The least of the runs at one size: what else happens in the machine only adds to it."""

    size: int
    work: int
    # Instructions without the turns of repeated string instructions.
    cost: float
    # How far the runs differ.
    noise: float = 0.0

    @property
    def each(self) -> float:
        """Of a unit of work."""
        return self.cost / self.work


@dataclasses.dataclass
class Step:
    """From one size to a larger one."""

    before: Point
    after: Point
    # The same of guest_memfd, if it has that: its growth comes from KVM or from the page cache.
    reference: Step | None = None

    @property
    def growth(self) -> float:
        """The cost of a unit of work, of that at the smaller size."""
        return self.after.each / self.before.each if self.before.each > 0 else 1.0

    @property
    def at_most(self) -> float:
        limit = 1 + PER_DOUBLING * math.log2(self.after.size / self.before.size)
        return max(limit, self.reference.growth) if self.reference else limit

    @property
    def excess(self) -> float:
        return self.growth / self.at_most

    @property
    def met(self) -> bool:
        return self.excess <= 1 or self.after.each < LEAST

    def as_json(self) -> dict[str, object]:
        return {
            "from": self.before.size, "to": self.after.size, "growth": self.growth, "at_most": self.at_most,
            "met": self.met,
        }


@dataclasses.dataclass
class Series:
    """An operation on one kind of memory, at all sizes; the smallest comes first."""

    name: str
    subject: str
    points: list[Point]
    # The same of guest_memfd, if it has that.
    reference: Series | None = None

    @property
    def steps(self) -> list[Step]:
        """From each size to the next."""
        theirs = self.reference.steps if self.reference else []
        pairs = [Step(one, two) for one, two in zip(self.points, self.points[1:])]
        for step in pairs:
            step.reference = next((other for other in theirs if same_sizes(step, other)), None)
        return pairs

    @property
    def whole(self) -> Step:
        """From the smallest size to the most expensive one; the limit is that of the largest."""
        last = dataclasses.replace(max(self.points, key=lambda point: point.each), size=self.points[-1].size)
        return Step(self.points[0], last, self.reference.whole if self.reference else None)

    @property
    def worst(self) -> Step:
        """The step that grows most, in relation to its limit."""
        return max(self.steps or [self.whole], key=lambda step: (not step.met, step.excess))

    @property
    def excess(self) -> float:
        return max(step.excess for step in (self.whole, *self.steps))

    @property
    def met(self) -> bool:
        return all(step.met for step in (self.whole, *self.steps))

    @property
    def ratio(self) -> float | None:
        """The largest ratio to guest_memfd's cost, over the sizes; not judged, the rows of both are."""
        theirs = {point.size: point.cost for point in self.reference.points} if self.reference else {}
        return max((point.cost / theirs[point.size] for point in self.points if theirs.get(point.size)), default=None)

    def as_json(self) -> dict[str, object]:
        return {
            "figure": self.name, "subject": self.subject, "ratio": self.ratio,
            "points": [{**dataclasses.asdict(point), "each": point.each} for point in self.points],
            "steps": [step.as_json() for step in self.steps], "whole": self.whole.as_json(), "met": self.met,
        }


def same_sizes(one: Step, other: Step) -> bool:
    return (one.before.size, one.after.size) == (other.before.size, other.after.size)


def least(runs: list[Point]) -> Point:
    """All runs at one size as one point."""
    costs = [run.cost for run in runs]
    return Point(runs[0].size, runs[0].work, min(costs), max(costs) - min(costs))


def series(report: Report, windows: dict[int, Window], symbols: Symbols) -> list[Series]:
    """The fastest growth, in relation to its limit, comes first."""
    found: dict[tuple[str, str], dict[int, list[Point]]] = {}
    for line in report.get("growth", []):
        point = Point(line["size"], line["work"], counts_of(line, windows, symbols).work)
        found.setdefault((line["name"], line["subject"]), {}).setdefault(point.size, []).append(point)
    every = [
        Series(name, subject, [least(runs) for _, runs in sorted(sizes.items())])
        for (name, subject), sizes in found.items()
    ]
    theirs = {one.name: one for one in every if one.subject == "guest_memfd"}
    for one in every:
        one.reference = theirs.get(one.name) if one.subject != "guest_memfd" else None
    # The kinds of memory stay side by side.
    worst: dict[str, float] = {}
    for one in every:
        worst[one.name] = max(worst.get(one.name, 0.0), one.excess if is_memfile(one.subject) else 0.0)
    return sorted(every, key=lambda one: (-worst[one.name], one.name))


def size(value: int) -> str:
    """Bytes, in the largest unit of which they are a multiple."""
    unit = max((unit for unit in BYTES if value % unit == 0), default=0)
    return f"{value // unit}{BYTES[unit]}" if unit else str(value)


def name_of(figure: str, value: int) -> str:
    """A size of this figure: bytes, where its name says so."""
    return size(value) if "size" in figure else str(value)


def tables(every: list[Series]) -> list[Table]:
    """One for each operation: a line for each kind of memory, a column for each size."""
    found: list[Table] = []
    for name in dict.fromkeys(one.name for one in every):
        of = [one for one in every if one.name == name]
        sizes = [name_of(name, point.size) for point in of[0].points]
        head = ["", *sizes, "of guest_memfd", "growth", "at most", "worst step", "to", "at most", ""]
        lines = []
        for one in of:
            whole, step = one.whole, one.worst
            lines.append([
                one.subject, *(number(point.each) for point in one.points), f"{one.ratio:.3f}" if one.ratio else "",
                f"{whole.growth:.2f}", f"{whole.at_most:.2f}",
                f"{step.growth:.2f}", name_of(name, step.after.size), f"{step.at_most:.2f}", verdict(one, one.met),
            ])
        why = next((reason for part, reason in ALONE.items() if part in name), "")
        alone = f" ({why})" if why and not any(one.subject == "guest_memfd" for one in of) else ""
        found.append(Table(f"Growth: {name}; instructions for a unit of work{alone}", head, lines, frozenset((0,))))
    return found


def verdict(one: Series, met: bool) -> str:
    """What is not ours is not judged."""
    return "" if not is_memfile(one.subject) else "met" if met else "MISSED"


def csv_lines(every: list[Series]) -> list[list[object]]:
    """A line for each size, with the step to it."""
    lines: list[list[object]] = [
        ["figure", "subject", "size", "work", "judged", "noise", "each", "growth", "at most", "met"]]
    for one in every:
        steps = {step.after.size: step for step in one.steps}
        for point in one.points:
            line: list[object] = [one.name, one.subject, point.size, point.work, point.cost, point.noise, point.each]
            step = steps.get(point.size)
            line += ["", "", ""] if step is None else [
                f"{step.growth:.4g}", f"{step.at_most:.4g}", verdict(one, step.met).lower()]
            lines.append(line)
    return lines


def changes(saved: Report, every: list[Series]) -> list[Change]:
    """Each size against the same one of a saved result; only memfiles' are judged."""
    before = {
        (one["figure"], one["subject"], point["size"]): point
        for one in saved.get("growth", []) for point in one["points"] if is_memfile(one["subject"])
    }
    found = []
    for one in every:
        if not is_memfile(one.subject):
            continue
        for point in one.points:
            old = before.pop((one.name, one.subject, point.size), None)
            at = f"at {name_of(one.name, point.size)}"
            if old is None:
                found.append(Change(one.name, one.subject, at, None, point.cost, 0))
            else:
                cost: float = old["cost"]
                noise = old.get("noise", 0.0) + point.noise + SAME * cost
                found.append(Change(one.name, one.subject, at, cost, point.cost, noise))
    found += [
        Change(name, subject, f"at {name_of(name, at)}", old["cost"], None, 0)
        for (name, subject, at), old in before.items()
    ]
    return by_verdict(found)
