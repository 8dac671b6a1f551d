# SPDX-License-Identifier: GPL-2.0
"""Programs on two kernels: the kernel's own selftests, or a user's."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from memfile import paths
from memfile.check.kernel_log import SPLAT
from memfile.check.session import Check, Job
from memfile.ktap import SKIP, Case
from memfile.paths import read_text
from memfile.program import fail
from memfile.upstream import guest
from memfile.upstream.guest import BAD_CLOCK, BEGIN, MACHINE, run_all
from memfile.upstream.programs import LIST, BadList, Expected, Program, fitted, read_list
from memfile.upstream.results import Result
from memfile.upstream.verdicts import REPEATS, Verdict, judge

# Programs of the kernel's own selftests that share a machine.
UPSTREAM_MACHINE = 24
# So many of them, and a line says how far it is.
PROGRESS = 20

ABSENT = "KERNEL_SRC does not have it, or it does not build there"

# The files that these programs need.
Files = Callable[[list[Program]], list[Path]]


def upstream_wanted(program: Program, tests: list[str], everything: bool) -> bool:
    name = f"upstream.{program.name}"
    if not tests:
        return program.quick or everything
    # A glob that an empty name fits is of all programs.
    return any(
        fnmatch.fnmatchcase(name, test) and (program.quick or everything or not fnmatch.fnmatchcase("upstream.", test))
        for test in tests
    )


def may_choose(test: str, prefix: str = "upstream.") -> bool:
    """Can a glob fit names that begin so?"""
    start = re.split(r"[*?[]", test)[0]
    return start.startswith(prefix) or (start != test and prefix.startswith(start))


class Comparison:
    """The results of both kernels, as they come; each is told when there are two."""

    def __init__(
        self, programs: list[Program], report: Callable[[list[Case]], None],
        prefix: str = "upstream.", expected: Iterable[Expected] | None = None,
    ) -> None:
        self.programs = programs
        self._prefix = prefix
        self.verdicts: list[Verdict] = []
        self._report = report
        self._lock = threading.Lock()
        self._expected = list(read_list().expected if expected is None else expected) if programs else []
        # By name: the results of the patched kernel, of the other one, and of the latter again.
        self._patched: dict[str, Result] = {}
        self._base: dict[str, Result] = {}
        self._repeats: dict[str, list[Result]] = {}
        self._told: set[str] = set()

    def add(self, patched: bool, program: Program, result: Result) -> None:
        with self._lock:
            (self._patched if patched else self._base)[program.name] = result
            if program.name in self._patched and program.name in self._base:
                self._tell(program, last=False)

    def again(self, program: Program, result: Result) -> None:
        with self._lock:
            self._repeats.setdefault(program.name, []).append(result)
            self._tell(program, last=False)

    def open(self) -> list[Program]:
        """Those that ran on both kernels and differ so far."""
        with self._lock:
            return [program for program in self.programs
                    if program.name not in self._told and {program.name} <= self._patched.keys() & self._base.keys()]

    def close(self) -> None:
        """Tells what is left."""
        with self._lock:
            for program in self.programs:
                if program.name not in self._told:
                    self._tell(program, last=True)

    def _tell(self, program: Program, last: bool) -> None:
        name = program.name
        verdict = judge(
            program, self._patched.get(name), self._base.get(name), self._repeats.get(name, ()), self._expected)
        if verdict.kind == "differs" and not last:
            return
        self._told.add(name)
        self.verdicts.append(verdict)
        self._report([verdict.case(self._prefix)])
        if len(self._told) % PROGRESS == 0:
            print(f"--- {len(self._told)} of {len(self.programs)} programs are compared", flush=True)


class Upstream:
    """The kernel's own selftests, on the patched and on the unpatched kernel."""

    def __init__(self, check: Check, files: Files | None = None) -> None:
        self.check = check
        self.compared = Comparison([], check.report)
        # Tools that programs need in the guest.
        self.files: Files = files or functools.partial(guest.files, folder=paths.UPSTREAM)

    def tests(self) -> list[Program]:
        """Those that are quick; all with --all, or if a glob says more than upstream.*"""
        if self.check.flavour == "base":
            return []
        chosen_names = self.check.args.tests
        source = os.environ.get("KERNEL_SRC")
        # A tree without KVM's programs may well be tested with others.
        if source and chosen_names and not any(map(may_choose, chosen_names)):
            return []
        try:
            listed = read_list()
            if source:
                listed = fitted(listed, Path(source) / "tools/testing/selftests")
        except BadList as error:
            fail(f"{LIST.name}: {error}")
        runs = listed.runs.values()
        chosen = [program for program in runs if upstream_wanted(program, chosen_names, self.check.args.all)]
        return [dataclasses.replace(program, limit=program.limit * self.check.slow) for program in chosen]

    def jobs(self) -> list[Job]:
        """The kernel's selftests on both kernels."""
        programs = self.tests()
        if programs and os.environ.get("KERNEL_SRC"):
            if not (paths.UPSTREAM.parent / ".memfile-built").exists():
                fail("the selftests of KERNEL_SRC are not built: `scripts/build-selftests --upstream` builds them")
            absent = [program for program in programs if not (paths.UPSTREAM / program.file).exists()]
            programs = [program for program in programs if program not in absent]
            self.check.report([Case(f"upstream.{program.name}", SKIP, ABSENT) for program in absent])
        self.compared = Comparison(programs, self.check.report)
        jobs: list[Job] = []
        for number, start in enumerate(range(0, len(programs), UPSTREAM_MACHINE)):
            part = programs[start : start + UPSTREAM_MACHINE]
            for kernel in (self.check.flavour, "base"):
                each = functools.partial(self.compared.add, kernel != "base")
                jobs.append(functools.partial(self.boot, f"upstream-{kernel}-{number}", kernel, part, each))
        return jobs

    def boot(
        self, name: str, kernel: str, programs: list[Program],
        each: Callable[[Program, Result], None],
    ) -> None:
        def machine(name: str, programs: list[Program], script: str, on_line: Callable[[str], None]) -> None:
            options = ["--kernel", kernel, "--tcg-thread", os.environ.get("TCG_THREAD", "single"), *MACHINE]
            for file in self.files(programs):
                options += ["--add", str(file)]
            limits = [program.limit // self.check.slow for program in programs]
            limit, silence = 120 + sum(limits), 120 + 2 * max(limits)
            result = self.check.boot(name, script, options, limit, on_line, silence)
            said = read_text(self.check.log / name / "out.log").splitlines()
            if BAD_CLOCK not in said and not any(BEGIN.match(line) for line in said):
                self.check.judge_boot(name, result)

        run_all(name, programs, machine, SPLAT, each)

    def again(self) -> None:
        """Run the programs that differ on the unpatched kernel again: they may have several results there, too."""
        for number in range(2, REPEATS + 2):
            programs = self.compared.open()
            if programs:
                self.boot(f"upstream-again-{number}", "base", programs, self.compared.again)
        self.compared.close()
