# SPDX-License-Identifier: GPL-2.0
"""The output of the guest, cut into phases, and whether a mutant was found."""

from __future__ import annotations

import dataclasses
import re

from memfile.check.kernel_log import SPLAT
from memfile.ktap import FAIL, PASS, Case, parse
from memfile.mutants.sources import Mutant
from memfile.program import EXIT_DIED, EXIT_TIMEOUT

KILLED = 128 + 9
SAID = re.compile(r"(?:@@|.*mutants:) (\S+) (disabled|enabled|end)(?: (\d+))?\s*$")


@dataclasses.dataclass
class Phase:
    """The tests of one mutant, while it was disabled or enabled."""

    cases: dict[str, Case] = dataclasses.field(default_factory=dict)
    splats: list[str] = dataclasses.field(default_factory=list)
    # Exit code of the last command; none if it did not come to that.
    code: int | None = None


def phases(output: list[str], console: list[str]) -> dict[tuple[str, str], Phase]:
    """The output of the guest, cut where it names the next mutant."""
    found: dict[tuple[str, str], Phase] = {}
    phase = Phase()
    lines: dict[int, tuple[list[str], list[str]]] = {}
    for line in output:
        if (said := SAID.fullmatch(line)) and said[2] == "end":
            phase.code = int(said[3])
        elif said:
            phase = found[said[1], said[2]] = Phase()
        else:
            guest, kunit = lines.setdefault(id(phase), ([], []))
            if line.startswith("@k "):
                kunit.append(line[3:])
            else:
                guest.append(line)
    for phase in found.values():
        guest, kunit = lines.get(id(phase), ([], []))
        phase.cases = {case.name: case for case in parse(guest)}
        phase.cases |= {case.name.replace(".", ":", 1): case for case in parse(kunit, "kunit")}
    for line in console:
        if said := SAID.fullmatch(line):
            phase = found.get((said[1], said[2]), phase) if said[2] != "end" else phase
        elif SPLAT.search(line):
            phase.splats.append(line.strip())
    return found


def judge(mutant: Mutant, tests: list[str], enabled: Phase, result: dict[str, object]) -> tuple[str, str]:
    """Was it found, and by what?"""
    status = {test: enabled.cases[test].status for test in tests if test in enabled.cases}
    failed = [test for test in tests if status.get(test) == FAIL]
    if mutant.expect == "fail" and len(failed) == len(tests):
        named = f"{len(failed)} tests" if len(failed) > 3 else " and ".join(failed)
        return PASS, f"{named} failed as {'it' if len(failed) == 1 else 'they'} should"
    if mutant.expect == "splat" and enabled.splats:
        return PASS, f"the kernel said: {enabled.splats[0]}"
    hung = enabled.code == KILLED or (enabled.code is None and result["code"] == EXIT_TIMEOUT)
    if mutant.expect == "hang" and hung and len(status) < len(tests):
        return PASS, "the tests did not end"
    if mutant.expect == "died" and enabled.code is None and result["code"] == EXIT_DIED:
        return PASS, str(result["reason"])
    words = [f"{test}: {status.get(test, 'no result')}" for test in tests if test not in failed]
    words += enabled.splats[:1] + ([str(result["reason"])] if enabled.code is None else [])
    return FAIL, f"not found ({mutant.expect} was expected): " + "; ".join(words)
