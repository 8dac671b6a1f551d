# SPDX-License-Identifier: GPL-2.0
"""One program on two kernels: are they the same?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.upstream.programs import Expected, Program
from memfile.upstream.results import NUMBER, Result, compared, differences, where_failed, why_skipped

# How often the unpatched kernel may show that a program has more than one result.
REPEATS = 3


@dataclasses.dataclass
class Verdict:
    """One program on both kernels."""

    program: Program
    # same, expected, wavers or differs
    kind: str
    # As Result.ended, of the patched kernel.
    ended: str
    reason: str
    lines: list[str] = dataclasses.field(default_factory=list)

    def case(self, prefix: str) -> Case:
        if self.kind == "differs":
            return Case(f"{prefix}{self.program.name}", FAIL, self.reason, self.lines)
        status = SKIP if self.ended == "skip" else PASS
        return Case(f"{prefix}{self.program.name}", status, self.reason)


def among(program: Program, patched: Result, runs: list[Result]) -> bool:
    """Is this one of the results that these runs show, which differ in order and numbers?

    It has what all of them have, and nothing that none of them has.
    """
    texts = [compared(program, run) for run in runs]
    if any(one == other for number, one in enumerate(texts) for other in texts[:number]):
        return False
    if patched.ended not in {run.ended for run in runs}:
        return False
    sets = [{NUMBER.sub("N", line) for line in text[:-1]} for text in texts]
    own = {NUMBER.sub("N", line) for line in compared(program, patched)[:-1]}
    return len(runs) > 1 and set.intersection(*sets) <= own <= set.union(*sets)


def judge(
    program: Program, patched: Result | None, base: Result | None, repeats: Iterable[Result] = (),
    expected: Iterable[Expected] = (),
) -> Verdict:
    """Are the kernels the same? `repeats` are more runs on the unpatched kernel."""
    if patched is None or base is None:
        which = "patched" if patched is None else "unpatched"
        return Verdict(program, "differs", "", f"it did not run on the {which} kernel")
    meant = [one for one in expected if one.program == program.name]
    lines = differences(program, base, patched)
    if not lines and meant:
        reason = f"a difference is expected and there is none: {meant[0].cause}"
        return Verdict(program, "differs", patched.ended, reason)
    if not lines:
        if patched.ended == "pass":
            # Without the two that each has.
            number = len(compared(program, patched)) - 2
            reason = f"{number} {'line' if number == 1 else 'lines'}, same as unpatched"
        elif patched.ended == "skip":
            reason = f"on both kernels: {why_skipped(patched)}"
        else:
            where = where_failed(patched)
            reason = f"{patched.ended} on both kernels" + (f": {where}" if where else "")
        return Verdict(program, "same", patched.ended, reason)
    for one in meant:
        if all(any(re.search(pattern, line) for pattern in one.lines) for line in lines):
            return Verdict(program, "expected", patched.ended, f"differs as it should: {one.cause}")
    # A program that has several results has them on the unpatched kernel, too.
    seen = list(repeats)
    varies = f"{patched.ended}, not the same each time" + (f" ({program.several})" if program.several else "")
    for number, other in enumerate(seen, 2):
        if not differences(program, other, patched):
            return Verdict(
                program, "wavers", patched.ended,
                f"{varies}: run {number} on the unpatched kernel is the same")
    if among(program, patched, [base, *seen]):
        return Verdict(
            program, "wavers", patched.ended,
            f"{varies}: no two runs on the unpatched kernel are, either")
    again = f", also in {len(seen)} more runs of the unpatched one" if seen else ""
    return Verdict(
        program, "differs", patched.ended,
        f"the kernels differ{again}: unpatched {base.ended}, patched {patched.ended}",
        ["- unpatched, + patched:", *lines[:40]])


def summary(verdicts: Iterable[Verdict]) -> str:
    """The one line at the end."""
    verdicts = list(verdicts)

    def count(choose: Callable[[Verdict], bool]) -> int:
        return sum(map(choose, verdicts))

    same = [v for v in verdicts if v.kind in ("same", "wavers")]
    ended = {
        "pass": sum(v.ended == "pass" for v in same), "skip": sum(v.ended == "skip" for v in same),
        "take too long": sum(v.ended == "timeout" for v in same),
    }
    ended["fail"] = len(same) - sum(ended.values())
    words = ", ".join(f"{number} {word}" for word, number in ended.items() if number)
    others = [
        f"{number} {text}" for number, text in (
            (count(lambda v: v.kind == "wavers"), "of them not the same each time"),
            (count(lambda v: v.kind == "wavers" and not v.program.several), "of these for a cause that is not known"),
            (count(lambda v: v.kind == "expected"), "different as expected"),
            (count(lambda v: v.kind == "differs"), "different"),
        ) if number
    ]
    text = f"{len(same)} of {len(verdicts)} programs same as unpatched"
    return text + (f" ({words})" if words else "") + "".join(f", {other}" for other in others)
