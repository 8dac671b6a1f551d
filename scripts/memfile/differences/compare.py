# SPDX-License-Identifier: GPL-2.0
"""The observations on each kind of memory, their differences, and those that are not listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memfile.differences.record import NOTHING, SKIPPED, Difference, Kind, Reasons, Record, Seen, matches
from memfile.ktap import PASS, SKIP, Case


def split(name: str, suites: set[str], kinds: Iterable[Kind]) -> tuple[str, str]:
    """The memfile's case of this name, and the suffix of the kind that it ran on."""
    suite, _, case = name.partition(".")
    for kind in kinds:
        base = suite.removesuffix(kind.suffix)
        if base != suite and base in suites:
            return f"{base}.{case}", kind.suffix
    return name, ""


def suites_of(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def observe(cases: Iterable[Case], names: list[str], kinds: Iterable[Kind]) -> Seen:
    """The observations in the cases that ran on a memfile and on another kind."""
    suites, known = suites_of(names), set(names)
    seen: Seen = {}
    for case in cases:
        if case.name not in known or case.status not in (PASS, SKIP):
            continue
        base, suffix = split(case.name, suites, kinds)
        if case.status == SKIP and not suffix:
            continue
        does = {what: " or ".join(values) for what, values in case.does.items()}
        seen.setdefault(base, {})[suffix] = {SKIPPED: case.reason} if case.status == SKIP else does
    return {case: found for case, found in seen.items() if "" in found and len(found) > 1}


def missing_cases(names: list[str], kinds: Iterable[Kind]) -> dict[str, list[str]]:
    """For each kind what only a memfile has."""
    kinds = list(kinds)
    suites = suites_of(names)
    have: dict[str, set[str]] = {"": set(), **{kind.suffix: set() for kind in kinds}}
    for name in names:
        base, suffix = split(name, suites, kinds)
        have[suffix].add(base)
    found = {}
    there = {suite for kind in kinds for suite in suites_of(have[kind.suffix])}
    for kind in kinds:
        alone = [
            name if name.partition(".")[0] in there else name.partition(".")[0] + ".*"
            for name in names if name in have[""] - have[kind.suffix]
        ]
        found[kind.suffix] = list(dict.fromkeys(alone))
    return found


def differences(seen: Seen) -> Iterator[Difference]:
    for case, found in seen.items():
        memfile = found[""]
        for suffix, does in found.items():
            if not suffix:
                continue
            both = [what for what in memfile if what in does and memfile[what] != does[what]]
            for what in both:
                yield Difference(case, what, suffix, memfile[what], does[what])
            # Where they differ, one of them may go on and see more. Else both see the same things.
            for what in [*memfile, *does]:
                if not both and (what in memfile) != (what in does):
                    yield Difference(case, what, suffix, memfile.get(what, NOTHING), does.get(what, NOTHING))


def problems(record: Record, reasons: Reasons, complete: bool) -> Iterator[str]:
    found = list(differences(record.seen))
    for difference in found:
        if not any(reason.covers(difference) for reason in reasons.differences):
            yield f"{difference}: not in the list"
    if not complete:
        return
    for reason in reasons.differences:
        covered = [difference for difference in found if reason.covers(difference)]
        for suffix in reason.on:
            for test in reason.tests:
                if not any(d.suffix == suffix and matches(d.case, [test]) for d in covered):
                    yield f'"{reason.title}": {test} is not different on {suffix} any more'
        for does in reason.does:
            if all(difference.does != does for difference in covered):
                yield f'"{reason.title}": no kind does "{does}" any more'
        for what in reason.what:
            if not any(matches(difference.what, [what]) for difference in covered):
                yield f'"{reason.title}": "{what}" is not different any more'
    for kind in reasons.kinds:
        there = [reason for reason in reasons.missing if kind.suffix in reason.on]
        alone = record.missing.get(kind.suffix, [])
        for name in alone:
            if not any(matches(name, reason.tests) for reason in there):
                yield f"{name} runs on a memfile and not on {kind.suffix}: not in the list"
        for reason in there:
            for test in reason.tests:
                if not any(matches(name, [test]) for name in alone):
                    yield f'"{reason.title}": {test} runs on {kind.suffix}, or on no memfile'
