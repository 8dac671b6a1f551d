# SPDX-License-Identifier: GPL-2.0
"""The findings of a run of scripts/check, and its exit code."""

from __future__ import annotations

import dataclasses

from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.program import EXIT_FAILED, EXIT_SPLAT


@dataclasses.dataclass
class Outcome:
    """Everything one run of this script found."""

    cases: list[Case] = dataclasses.field(default_factory=list)
    splats: list[str] = dataclasses.field(default_factory=list)
    # The first boot that did not end as it should: its exit code and reason.
    lost: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(case.status == status for case in self.cases)

    def verdict(self) -> tuple[int, str]:
        passed, failed = self.count(PASS), self.count(FAIL)
        if self.lost:
            return self.lost[0]
        if failed:
            return EXIT_FAILED, "a test failed"
        if not passed:
            return EXIT_FAILED, "no test ran" if not self.cases else "every test was skipped"
        if self.splats:
            return EXIT_SPLAT, "the tests passed, but the kernel log has a splat or a leak"
        return 0, "all passed" if not self.count(SKIP) else "all passed or skipped"


def exit_code_case(name: str, cases: list[Case], code: int) -> list[Case]:
    """A failure the KTAP does not show must not be lost."""
    if not cases:
        return [Case(name, FAIL, "no case ran")]
    if code and not any(case.status == FAIL for case in cases):
        return [Case(name, FAIL, f"every case passed, but the exit code is {code}")]
    return []
