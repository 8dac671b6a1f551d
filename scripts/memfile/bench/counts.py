# SPDX-License-Identifier: GPL-2.0
"""From the figures of memfile-bench and the plugin's windows to rows with ratios and aims."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from memfile.bench.windows import LOCK_NAMES, Symbols, Window, lock_of

# A report that memfile-bench wrote, or a summary that scripts/bench wrote, parsed from JSON.
Report = dict[str, Any]

# Aims: the ratio to guest_memfd, where both do the same, is to be below this.
BELOW_GUEST_MEMFD = 1.0
# The others may be reached. A GiB in large pages, of that of guest_memfd in small ones:
LARGE_PAGES_AT_MOST = 0.1
# An ordinary file on the patched kernel, of the same on the unpatched one:
ORDINARY_AT_MOST = 1.01
MANY, ONE = "punch 1 page, 4096 bindings on the file", "punch 1 page, 1 binding on the file"
MANY_AT_MOST = 1.5
# Attributes and mappings change by the same code of KVM for both, so these can only be the same.
SAME_CODE = ("conversion of 1 page, there and back", "conversion of 512 pages, there and back")
# guest_memfd has no large pages of which a small one can go: no aim.
SMALL = "punch 4K of a page and touch it again"

# Two boots of one kernel may differ by this part, though two runs of one boot do not.
SAME = 0.002


@dataclasses.dataclass
class Counts:
    """The costs of one operation."""

    # All instructions, and how many of them are turns of repeated string instructions.
    instructions: float
    rep: float
    locked: float
    # Those of the locked instructions that write a line which half of the operations write, or more;
    # None where there was one operation only.
    common: float | None
    locks: dict[str, float]
    # KVM's requests to flush TLBs; None where there is no VM to ask.
    flushes: float | None

    @property
    def work(self) -> float:
        """Instructions without the turns of repeated string instructions."""
        return self.instructions - self.rep

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "work": self.work}


def common_lines(figure: Report, windows: dict[int, Window]) -> Counter[int]:
    """The locked instructions on each cache line that half of the operations write, or more.

    A line that belongs to one page, as its counters and flags do, is written by one operation. What
    belongs to the file, the VM, the cgroup or the zone is common to all, and so is what belongs to
    the task and to its vCPU: another vCPU would not write that.
    """
    found: Counter[int] = Counter()
    for number, sign in figure["windows"]:
        for line, count in windows.get(number, Window()).line.items():
            found[line] += sign * count
    return Counter({line: n for line, n in found.items() if line and n >= figure["times"] / 2})


def counts_of(figure: Report, windows: dict[int, Window], symbols: Symbols) -> Counts:
    """The counts of one run of a figure, from the windows that it names."""
    times: int = figure["times"]
    rep = locked = 0
    locks: Counter[str] = Counter({name: 0 for name in LOCK_NAMES})
    for number, sign in figure["windows"]:
        window = windows.get(number, Window())
        rep += sign * window.rep.total()
        locked += sign * window.locked.total()
        for (site, target), count in window.call.items():
            locks[lock_of(symbols.name(target), symbols.name(site))] += sign * count
    flushes = figure["flushes"]
    common = None if times == 1 else sum(common_lines(figure, windows).values()) / times
    return Counts(
        figure["instructions"] / times, rep / times, locked / times, common,
        {name: locks[name] / times for name in LOCK_NAMES}, None if flushes is None else flushes / times,
    )


@dataclasses.dataclass
class Figure:
    """A figure of one kind of memory, with all runs of the boot."""

    name: str
    subject: str
    # Bytes of the pages.
    page: int
    runs: list[Counts] = dataclasses.field(default_factory=list)

    @property
    def counts(self) -> Counts:
        """The mean of the runs."""
        def mean(values: Iterable[float | None]) -> float:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else 0.0

        def if_known(values: list[float | None]) -> float | None:
            return None if None in values else mean(values)

        return Counts(
            mean(run.instructions for run in self.runs), mean(run.rep for run in self.runs),
            mean(run.locked for run in self.runs), if_known([run.common for run in self.runs]),
            {name: mean(run.locks[name] for run in self.runs) for name in LOCK_NAMES},
            if_known([run.flushes for run in self.runs]),
        )

    @property
    def noise(self) -> float:
        """How far the runs of the boot differ."""
        works = [run.work for run in self.runs]
        return max(works) - min(works)


Figures = dict[tuple[str, str], Figure]


def figures(report: Report, windows: dict[int, Window], symbols: Symbols) -> Figures:
    found: Figures = {}
    for line in report["figures"]:
        name, subject = line["name"], line["subject"]
        figure = found.setdefault((name, subject), Figure(name, subject, line["page"]))
        figure.runs.append(counts_of(line, windows, symbols))
    return found


@dataclasses.dataclass
class Row:
    """Two costs, their ratio, and its aim."""

    figure: str
    subject: str
    page: int
    counts: Counts
    noise: float
    reference: str
    reference_page: int
    reference_counts: Counts
    # The boot that it is from, for its profile.
    boot: str = ""
    # The aim: below this, or at most this; or none.
    below: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float:
        """Judged: instructions without the turns of repeated string instructions."""
        return self.counts.work / self.reference_counts.work if self.reference_counts.work else 0.0

    @property
    def total_ratio(self) -> float:
        return self.counts.instructions / self.reference_counts.instructions

    @property
    def aim(self) -> str:
        if self.below is not None:
            return f"< {self.below:.2f}"
        return "" if self.at_most is None else f"<= {self.at_most:.2f}"

    @property
    def met(self) -> bool | None:
        if self.below is not None:
            return self.ratio < self.below
        return None if self.at_most is None else self.ratio <= self.at_most

    def as_json(self) -> dict[str, object]:
        return {
            "figure": self.figure, "subject": self.subject, "page": self.page, "counts": self.counts.as_json(),
            "noise": self.noise, "reference": self.reference, "reference_page": self.reference_page,
            "reference_counts": self.reference_counts.as_json(), "ratio": self.ratio,
            "total_ratio": self.total_ratio, "aim": self.aim, "met": self.met,
        }


def row(figure: Figure, reference: Figure, name: str, boot: str) -> Row:
    return Row(
        figure.name, figure.subject, figure.page, figure.counts, figure.noise,
        name, reference.page, reference.counts, boot,
    )


def private_rows(found: Figures, boot: str) -> list[Row]:
    """Every kind of memfile against guest_memfd."""
    table = []
    for (name, subject), figure in found.items():
        reference = found.get((name, "guest_memfd"))
        if not is_memfile(subject) or reference is None:
            continue
        line = row(figure, reference, "guest_memfd", boot)
        if name in SAME_CODE:
            line.at_most = 1.0 + SAME
        elif figure.page == reference.page:
            line.below = BELOW_GUEST_MEMFD
        elif name != SMALL:
            line.at_most = LARGE_PAGES_AT_MOST
        table.append(line)
    one, many = found.get((ONE, "memfile")), found.get((MANY, "memfile"))
    if one and many:
        table.append(dataclasses.replace(row(many, one, "1 binding", boot), at_most=MANY_AT_MOST))
    return table


# The nearest relatives of what guest_memfd has not: the same memory in the direct map and the
# kernel's own memory out of it, or ordinary memory of an ordinary VM.
RELATIVES = {
    "memfile, hidden": ("memfile", "memfd_secret"),
    "memfile on hugetlbfs, 2M, hidden": ("memfile on hugetlbfs, 2M", "memfd_secret"),
    "memfile": ("memfd of a VM", "anonymous memory of a VM"),
    "memfile, 2M (THP)": ("memfd of a VM, 2M (THP)",),
    "memfile on hugetlbfs, 2M": ("memfd of a VM, hugetlbfs, 2M",),
    "memfile on hugetlbfs, 1G": ("memfd of a VM, hugetlbfs, 1G",),
}


def is_memfile(subject: str) -> bool:
    return subject.startswith("memfile")


def relative_rows(found: Figures, boot: str) -> list[Row]:
    """Memfiles beside their nearest relatives. No aim: these do not do the same."""
    table = []
    for (name, subject), figure in found.items():
        for other in RELATIVES.get(subject, ()):
            reference = found.get((name, other))
            if reference is not None:
                table.append(row(figure, reference, other, boot))
    return table


def alone(found: Figures, table: list[Row]) -> list[Figure]:
    """The figures of memfiles that stand beside nothing in these rows."""
    seen = {(row.figure, subject) for row in table for subject in (row.subject, row.reference)}
    return [figure for key, figure in found.items() if is_memfile(figure.subject) and key not in seen]


def ordinary_rows(patched: Figures, unpatched: Figures, boot: str) -> list[Row]:
    """Ordinary files on the patched kernel, each against the unpatched one."""
    table = []
    for key, figure in patched.items():
        if key in unpatched:
            line = row(figure, unpatched[key], "unpatched", boot)
            table.append(dataclasses.replace(line, subject="patched", at_most=ORDINARY_AT_MOST))
    return table


def by_pain(table: Iterable[Row]) -> list[Row]:
    """The worst comes first."""
    return sorted(table, key=lambda line: -line.ratio)


@dataclasses.dataclass
class Change:
    """A row and the same row of a saved result."""

    figure: str
    subject: str
    reference: str
    before: float | None
    after: float | None
    # The difference that two results of one kernel may have.
    noise: float

    @property
    def verdict(self) -> str:
        if self.before is None or self.after is None:
            return "new" if self.before is None else "gone"
        if abs(self.after - self.before) <= self.noise:
            return "same"
        return "WORSE" if self.after > self.before else "better"


def changes(saved: Report, table: list[Row]) -> list[Change]:
    """Of rows, in the order of by_verdict()."""
    before = {(r["figure"], r["subject"], r["reference"]): r for r in saved["rows"]}
    found = []
    for line in table:
        key = (line.figure, line.subject, line.reference)
        old = before.pop(key, None)
        if old is None:
            found.append(Change(*key, None, line.counts.work, 0))
        else:
            work: float = old["counts"]["work"]
            noise = old["noise"] + line.noise + SAME * work
            found.append(Change(*key, work, line.counts.work, noise))
    found += [Change(*key, old["counts"]["work"], None, 0) for key, old in before.items()]
    return by_verdict(found)


def by_verdict(found: Iterable[Change]) -> list[Change]:
    """Worse first, then better; equal rows are left out."""
    order = ("WORSE", "gone", "new", "better")
    return sorted((c for c in found if c.verdict != "same"), key=lambda c: order.index(c.verdict))
