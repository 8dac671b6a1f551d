# SPDX-License-Identifier: GPL-2.0
"""differences.rst, differences.json, and the part of the demo's page."""

from __future__ import annotations

import dataclasses
import html
import json
import textwrap
from collections.abc import Iterable, Iterator

from memfile.differences.compare import differences, problems
from memfile.differences.record import (
    DOCUMENT,
    NOTHING,
    REASONS,
    RECORD,
    Kind,
    Reason,
    Reasons,
    Record,
    Seen,
    read_record,
)


def heading(title: str, line: str) -> list[str]:
    return [title, line * len(title), ""]


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 90, break_on_hyphens=False), ""]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [head, *rows]:
        for number, cell in enumerate(row):
            lines.append(f"   {'*' if number == 0 else ' '} - {cell}".rstrip())
    return [*lines, ""]


def rows_of(reason: Reason, seen: Seen) -> list[list[str]]:
    """Case, observation, and what a memfile and each kind of the entry do."""
    rows: dict[tuple[str, str], list[str]] = {}
    for difference in differences(seen):
        if reason.covers(difference):
            found = seen[difference.case]
            row = [difference.memfile, *(found.get(on, {}).get(difference.what, NOTHING) for on in reason.on)]
            rows[difference.case, difference.what] = row
    return [[*key, *row] for key, row in rows.items()]


def names_of(reason: Reason, kinds: Iterable[Kind]) -> list[str]:
    names = {kind.suffix: kind.name for kind in kinds}
    return [names[suffix] for suffix in reason.on]


def alike(seen: Seen, kinds: Iterable[Kind]) -> dict[str, list[list[str]]]:
    """By suite: case, what all of the kinds do, and the kinds that do the same as a memfile."""
    names = {kind.suffix: kind.name for kind in kinds}
    different = {(d.case, d.suffix) for d in differences(seen)}
    suites: dict[str, list[list[str]]] = {}
    for case, found in seen.items():
        same = [suffix for suffix in found if suffix and (case, suffix) not in different]
        if same:
            does = "; ".join(f"{what}: {does}" for what, does in found[""].items())
            suites.setdefault(case.partition(".")[0], []).append(
                [case, does, "; ".join(names[suffix] for suffix in same)])
    return suites


ALIKE = "Each of these tests passes on the kinds that are named, with the same result."


def document(record: Record, reasons: Reasons) -> str:
    lines = [
        ".. SPDX-License-Identifier: GPL-2.0",
        ".. scripts/differences has made this of differences.json and scripts/differences.toml.",
        "",
        *heading("memfile and guest_memfd, call by call", "="),
        *paragraph(
            "The same tests run on every kind of memory that a guest can have through a file descriptor. This "
            "document has the results of a run of ``make check``: first the differences and their reasons, then the "
            "results that are alike, last the tests that cannot run on every kind. A difference that is not here "
            "fails ``make check``, and so does one that is here and does not occur."),
    ]
    for kind in reasons.kinds:
        suffix = f"``*{kind.suffix}``"
        lines += [f"* {text}" if n == 0 else f"  {text}" for n, text in enumerate(
            textwrap.wrap(f"{kind.name} (suites {suffix}): {' '.join(kind.what.split())}", 88))]
    lines += ["", *heading("Differences", "-")]
    for reason in reasons.differences:
        rows = rows_of(reason, record.seen)
        if rows:
            lines += [*heading(reason.title, "~"), *paragraph(reason.why)]
            cells = [[f"``{row[0]}``", *row[1:]] for row in rows]
            lines += table(["Test", "Operation", "memfile", *names_of(reason, reasons.kinds)], cells)
    lines += [*heading("Alike", "-"), *paragraph(
        f"{ALIKE} Where no call is named, the test is about something that no kind may get wrong, such as the content "
        "that a guest reads.")]
    for suite, rows in alike(record.seen, reasons.kinds).items():
        cells = [[f"``{row[0]}``", *row[1:]] for row in rows]
        lines += [*heading(suite, "~"), *table(["Test", "Result", "The same on"], cells)]
    lines += heading("Tests that do not run on every kind", "-")
    for reason in reasons.missing:
        lines += heading(reason.title, "~")
        lines += paragraph(f"Not on {' and '.join(names_of(reason, reasons.kinds))}. {reason.why}")
        lines += paragraph(", ".join(f"``{test}``" for test in reason.tests) + ".")
    return "\n".join(lines).rstrip() + "\n"


def section(now: Seen, kept: Seen, reasons: Reasons) -> str:
    """A part of the demo's page: the tests of its own run, and those that are kept from `make check`."""
    def cells(tag: str, row: Iterable[str]) -> str:
        return "".join(f"<{tag} class=word>{html.escape(cell)}</{tag}>" for cell in row)

    def rows_with(head: list[str], rows: list[list[str]]) -> list[str]:
        out = [f"<div class=scroll><table><tr>{cells('th', head)}</tr>"]
        return [*out, *(f"<tr>{cells('td', row)}</tr>" for row in rows), "</table></div>"]

    seen = {**kept, **now}
    out = [
        "<h2>memfile and guest_memfd, call by call</h2>",
        f"<p id=differences>{len(now)} tests ran on a memfile and on guest_memfd for this page. It has {len(seen)}: "
        f"the results of the others are those of the <code>make check</code> that {RECORD.name} was made of. These "
        "are the differences, and their reasons.</p>",
    ]
    for reason in reasons.differences:
        rows = rows_of(reason, seen)
        if rows:
            out.append(f"<h3>{html.escape(reason.title)}</h3><p>{html.escape(' '.join(reason.why.split()))}</p>")
            out += rows_with(["test", "operation", "memfile", *names_of(reason, reasons.kinds)], rows)
    for problem in problems(Record(now, {}), reasons, False):
        out.append(f"<p><strong>{html.escape(problem)}</strong></p>")
    out.append(f"<h3>Alike</h3><p>{ALIKE}</p>")
    for suite, rows in alike(seen, reasons.kinds).items():
        out.append(f"<details><summary>{html.escape(suite)}: {len(rows)} tests</summary>")
        out += [*rows_with(["test", "result", "the same on"], rows), "</details>"]
    out.append("<h3>Tests that do not run on every kind</h3>")
    for reason in reasons.missing:
        kinds = " and ".join(names_of(reason, reasons.kinds))
        out.append(f"<details><summary>{html.escape(reason.title)}: not on {html.escape(kinds)}</summary>")
        out.append(f"<p>{html.escape(' '.join(reason.why.split()))}</p>")
        out.append(f"<p>{html.escape(', '.join(reason.tests))}</p></details>")
    return "\n".join(out) + "\n"


def written(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def stale_document(record: Record, reasons: Reasons) -> Iterator[str]:
    there = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    if there != document(record, reasons):
        yield f"{DOCUMENT.name} is not what {RECORD.name} and {REASONS.name} make; scripts/differences --write makes it"


def stale_record(record: Record) -> Iterator[str]:
    """The observations of this run are those of differences.json; a case that was skipped here is not compared."""
    kept = read_record(RECORD)
    advice = "; scripts/differences --results .../result.json --complete --write brings it up to date"
    for case in [*record.seen, *(case for case in kept.seen if case not in record.seen)]:
        if case not in kept.seen:
            yield f"{RECORD.name} does not have {case}{advice}"
        elif case in record.seen and record.seen[case] != kept.seen[case]:
            yield f"{RECORD.name} has {case} otherwise{advice}"
    if record.missing != kept.missing:
        yield f"{RECORD.name} has other tests that only a memfile has{advice}"
