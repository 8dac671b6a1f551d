# SPDX-License-Identifier: GPL-2.0
"""The result as tables of text, and as lines of CSV."""

from __future__ import annotations

import dataclasses
from collections import Counter

from memfile.bench import growth
from memfile.bench.counts import Change, Counts, Figure, Row
from memfile.bench.profile import Profile, differences, split
from memfile.bench.table import Table, number, ratio
from memfile.bench.windows import LOCK_NAMES

WORDS = {True: "met", False: "MISSED", None: ""}
GIB = 1 << 30


@dataclasses.dataclass
class Result:
    kernel: str
    # The worst comes first.
    rows: list[Row]
    # Figures that this machine does not give: name, subject, reason.
    missing: list[dict[str, str]]
    profiles: list[Profile]
    # Against a saved result; None if none was given.
    changes: list[Change] | None
    # The fastest growth comes first.
    growth: list[growth.Series] = dataclasses.field(default_factory=list)
    # The figures that no row compares with anything.
    alone: list[Figure] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        return {
            "kernel": self.kernel,
            "rows": [row.as_json() for row in self.rows],
            "missing": self.missing,
            "profiles": [one.as_json() for one in self.profiles],
            "alone": [{
                "figure": one.name, "subject": one.subject, "page": one.page, "counts": one.counts.as_json(),
                "noise": one.noise,
            } for one in self.alone],
            "growth": [one.as_json() for one in self.growth],
            "changes": [{**dataclasses.asdict(one), "verdict": one.verdict} for one in self.changes or []],
        }


def costs(rows: list[Row]) -> Table:
    head = ["", "", "judged", "total", "against", "judged", "total", "ratio", "of totals", "aim", ""]
    lines = [[
        row.figure, row.subject, number(row.counts.work), number(row.counts.instructions),
        row.reference, number(row.reference_counts.work), number(row.reference_counts.instructions),
        ratio(row.ratio), ratio(row.total_ratio), row.aim, WORDS[row.met],
    ] for row in rows]
    title = "Instructions. Judged are those that are no turns of repeated string instructions"
    return Table(title, head, lines, frozenset((0, 1, 4, 10)))


def others(counts: Counts) -> dict[str, float | None]:
    """All that was counted besides instructions, of one operation."""
    return {
        **counts.locks, "locked instructions": counts.locked, "on common lines": counts.common,
        "TLB flushes": counts.flushes,
    }


OTHERS = [*LOCK_NAMES, "locked instructions", "on common lines", "TLB flushes"]


def locks(rows: list[Row]) -> Table:
    def cell(one: float | None, other: float | None) -> str:
        return " : ".join("?" if value is None else f"{value:.4g}" for value in (one, other))

    lines = []
    for row in rows:
        one, other = others(row.counts), others(row.reference_counts)
        lines.append([row.figure, row.subject, row.reference, *(cell(one[what], other[what]) for what in OTHERS)])
    title = "Acquisitions of locks, locked instructions and flushes, of both, for one operation"
    return Table(title, ["", "", "against", *OTHERS], lines, frozenset((0, 1, 2)))


def page_size(page: int) -> str:
    return {1 << 12: "4K", 1 << 21: "2M", 1 << 30: "1G"}.get(page, str(page))


def is_of_sizes(row: Row) -> bool:
    """A figure about a GiB that exists with pages of several sizes."""
    one = "1 GiB" in row.figure and "per page" not in row.figure
    return one and row.boot == "stores" and row.reference == "guest_memfd"


def sizes(rows: list[Row]) -> Table:
    lines = []
    for row in sorted((row for row in rows if is_of_sizes(row)), key=lambda row: (row.figure, row.page)):
        pages, reference_pages = GIB // row.page, GIB // row.reference_page
        each, reference_each = row.counts.work / pages, row.reference_counts.work / reference_pages
        lines.append([
            row.figure, row.subject, page_size(row.page), number(row.counts.work), ratio(row.ratio),
            number(each), ratio(each / reference_each),
        ])
    title = "By the size of pages, against guest_memfd's of 4K"
    return Table(title, ["", "", "page", "per GiB", "ratio", "per page", "ratio"], lines, frozenset((0, 1)))


def profile_tables(one: Profile) -> list[Table]:
    """By component, and the functions that differ most."""
    def line(name: str, ours: Counter[str], theirs: Counter[str]) -> list[str]:
        return [name, number(ours[name]), number(theirs[name]), f"{ours[name] - theirs[name]:+.0f}"]

    ours, theirs = one.functions, one.reference_functions
    parts, their_parts = split(ours), split(theirs)
    head = ["", one.subject, one.reference, "difference"]
    names = list(dict.fromkeys([*parts, *their_parts]))
    every = [line(name, parts, their_parts) for name in names if parts[name] or their_parts[name]]
    every.append(["total", number(parts.total()), number(their_parts.total()), ""])
    most = [line(name, ours, theirs) for name in differences(ours, theirs)]
    shared = [line(name, one.locked, one.reference_locked) for name in differences(one.locked, one.reference_locked)]
    title = f"Where the instructions go: {one.figure}, {one.subject}"
    found = [Table(title, head, every, frozenset((0,))), Table("Most in", head, most, frozenset((0,)))]
    common = [line(name, one.common, one.reference_common) for name in differences(one.common, one.reference_common)]
    if shared:
        found.append(Table("Locked instructions in", head, shared, frozenset((0,))))
    if common:
        found.append(Table("Locked instructions on common lines, by a function that writes the line", head, common,
                           frozenset((0,))))
    return found


def changes(found: list[Change]) -> Table:
    lines = [[
        change.verdict, change.figure, change.subject, change.reference,
        "" if change.before is None else number(change.before), "" if change.after is None else number(change.after),
        f"{change.after / change.before - 1:+.2%}" if change.before and change.after is not None else "",
        number(change.noise),
    ] for change in found]
    head = ["", "", "", "against", "before", "now", "change", "noise"]
    title = "Changed against the saved result" if lines else "Nothing changed against the saved result"
    return Table(title, head, lines, frozenset((0, 1, 2, 3)))


def missing(found: list[dict[str, str]]) -> Table:
    lines = [[one["name"], one["subject"], one["reason"]] for one in found]
    return Table("Missing on this machine", ["", "", "why"], lines, frozenset((0, 1, 2)))


def alone(found: list[Figure]) -> Table:
    lines = [[one.name, one.subject, number(one.counts.work), number(one.counts.instructions)] for one in found]
    title = "Beside nothing: these figures have neither an equal nor a relative here"
    return Table(title, ["", "", "judged", "total"], lines, frozenset((0, 1)))


def tables(result: Result) -> list[Table]:
    """All of them, in their order."""
    found = [costs(result.rows), locks(result.rows)]
    if any(is_of_sizes(row) for row in result.rows):
        found.append(sizes(result.rows))
    if result.alone:
        found.append(alone(result.alone))
    found += growth.tables(result.growth)
    if result.missing:
        found.append(missing(result.missing))
    for profile in result.profiles:
        found += profile_tables(profile)
    if result.changes is not None:
        found.append(changes(result.changes))
    return found


def text(result: Result) -> str:
    return "\n".join(table.text() for table in tables(result))


def csv_lines(rows: list[Row]) -> list[list[object]]:
    def of(counts: Counts) -> list[object]:
        return [counts.work, counts.instructions, counts.rep, *others(counts).values()]

    kinds = ["judged", "instructions", "rep", *OTHERS]
    head: list[object] = ["figure", "subject", "page", *kinds, "noise", "reference", "reference page"]
    head += [*(f"reference {kind}" for kind in kinds), "ratio", "ratio of totals", "aim", "met"]
    lines = [head]
    for row in rows:
        line: list[object] = [row.figure, row.subject, row.page, *of(row.counts), row.noise]
        line += [row.reference, row.reference_page, *of(row.reference_counts)]
        lines.append([*line, f"{row.ratio:.4g}", f"{row.total_ratio:.4g}", row.aim, WORDS[row.met].lower()])
    return lines
