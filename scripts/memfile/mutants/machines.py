# SPDX-License-Identifier: GPL-2.0
"""The machines that run the tests of mutants."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fnmatch
import json
import threading
import time
from pathlib import Path

from memfile import paths
from memfile.check.guest import PLUG, UNPLUG
from memfile.check.outcome import Outcome
from memfile.check.session import Check
from memfile.check.suites import OWN_MACHINE, WITHOUT_PORTS, own_machine
from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.mutants.guards import known_tests, rows_in_words
from memfile.mutants.results import KILLED, SAID, Phase, judge, phases
from memfile.mutants.sources import DEBUG, MUTANTS, Mutant, number
from memfile.paths import read_text

# Functions for the guest's shell. A line of a KUnit test gets a mark, because the kernel prints it.
PRELUDE = """
number=/sys/module/kernel/parameters/memfile_mutant
once=/sys/kernel/debug/clear_warn_once
say() { echo "@@ $*"; echo "mutants: $*" >/dev/kmsg; }
run() { timeout -s KILL $LIMIT memfile-tests --kmsg --time-factor $SLOW --require-memfile "$@"; }
kunit() {
    for test in "$@"; do
        printf %s "$test" >/sys/module/kunit/parameters/filter_glob
        for n in 1 2 3 4 5; do rmmod memfile 2>/dev/null && break; sleep 0.1; done
        dmesg -c >/dev/null
        timeout -s KILL $LIMIT insmod /lib/modules/memfile.ko
        dmesg | sed 's/^/@k /'
    done
    printf none >/sys/module/kunit/parameters/filter_glob
}
"""
# The kernel has no mutants, but the module.
LOAD = """
insmod /add/memfile.ko || exit
number=/sys/module/memfile/parameters/memfile_mutant
"""
# So many mutants share a machine, one after another.
SHARE = 12


class Mutants:
    """One run: the machine room is that of scripts/check."""

    def __init__(self, log: Path, mutants: list[Mutant], slow: int = 1) -> None:
        # The kernel mutants is as fast as plain; the host may be busy.
        self.machines = {
            kernel: Check(argparse.Namespace(kernel=kernel, log=log, tests=[], verbose=False, slow=slow))
            for kernel in (MUTANTS, DEBUG)
        }
        self.log = log
        self.mutants = mutants
        self.known: list[str] = []
        self.outcome = Outcome()
        self.lock = threading.Lock()
        self.boots = 0

    def build(self) -> None:
        for kernel in sorted({mutant.kernel for mutant in self.mutants}):
            build = self.machines[kernel].build
            build("build-kernel", kernel)
            build("build-module", MUTANTS, kdir="" if kernel == MUTANTS else str(paths.build_tree(kernel)))
            if kernel != MUTANTS:
                # What is loaded beside it.
                build("build-module", kernel)
        self.machines[MUTANTS].build("build-selftests")

    def tests(self, mutant: Mutant) -> list[str]:
        return [name for name in self.known if any(fnmatch.fnmatchcase(name, test) for test in mutant.tests)]

    def script(self, batch: list[Mutant]) -> str:
        """For each: the tests while it is disabled, and again while it is enabled."""
        kernel = batch[0].kernel
        slow = self.machines[kernel].slow
        lines = [f"SLOW={slow}", PRELUDE, LOAD if kernel != MUTANTS else ""]
        for mutant in batch:
            tests = self.tests(mutant)
            kunit = [test[len("kunit:"):] for test in tests if test.startswith("kunit:")]
            guest = [test for test in tests if not test.startswith("kunit:")]
            work = [*(["kunit " + " ".join(kunit)] if kunit else []), *(["run " + " ".join(guest)] if guest else [])]
            lines.append(f"LIMIT={mutant.seconds * slow}")
            for state, value in (("disabled", 0), ("enabled", number(mutant.name))):
                # What the kernel says once, it says once for each.
                lines += [f"say {mutant.name} {state}", f"echo {value} >$number", "echo 1 >$once", *work]
                lines += ["rc=$?", "echo 0 >$number", f"say {mutant.name} end $rc"]
                # A test that had to be killed may have left the machine unusable.
                lines += [f"[ $rc != {KILLED} ] || exit $rc"]
        return "\n".join(lines)

    def boot(self, batch: list[Mutant]) -> tuple[dict[str, object], dict[tuple[str, str], Phase]]:
        """One machine for these mutants: how it ended, and what came out of each phase."""
        with self.lock:
            self.boots += 1
            name = f"machine-{self.boots}"
        kernel = batch[0].kernel
        options = ["--kernel", kernel, "--tcg-thread", "single", "--append", "kunit.filter_glob=none"]
        if kernel == MUTANTS:
            options += ["--kunit"]
        else:
            options += ["--no-module", "--add", str(module_with_mutants(kernel))]
        suite = machine_of(batch[0])
        options += OWN_MACHINE.get(suite, [])
        seconds = 60 + sum(mutant.seconds for mutant in batch)
        script = self.script(batch)
        if suite in WITHOUT_PORTS:
            script = f"{UNPLUG}({script})\nrc=$?\n{PLUG}exit $rc"
        result = self.machines[kernel].boot(name, script, options, seconds, self.progress)
        output = read_text(self.log / name / "out.log").splitlines()
        return result, phases(output, read_text(self.log / name / "serial.log").splitlines())

    def progress(self, line: str) -> None:
        if (said := SAID.fullmatch(line.rstrip())) and said[2] == "enabled":
            with self.lock:
                print(f"# {said[1]} is enabled", flush=True)

    def work(self, batch: list[Mutant]) -> None:
        while batch:
            batch = self.machine(batch)

    def machine(self, batch: list[Mutant]) -> list[Mutant]:
        """Judges the first of them at least; those that are left need a fresh machine."""
        result, found = self.boot(batch)
        for n, mutant in enumerate(batch):
            tests = self.tests(mutant)
            disabled = found.get((mutant.name, "disabled"), Phase())
            enabled = found.get((mutant.name, "enabled"), Phase())
            bad = [test for test in tests if test not in disabled.cases or disabled.cases[test].status == FAIL]
            skipped = [test for test in tests if test not in bad and disabled.cases[test].status == SKIP]
            if bad or disabled.splats:
                # The mutants before it may have left something behind.
                if n:
                    return batch[n:]
                words = disabled.splats[:1] or [f"{', '.join(bad)}: fails while it is disabled ({result['reason']})"]
                self.report(mutant.name, FAIL, words[0])
            elif skipped:
                self.report(mutant.name, SKIP, f"{skipped[0]}: {disabled.cases[skipped[0]].reason}")
            else:
                self.report(mutant.name, *judge(mutant, tests, enabled, result))
            if enabled.code is None:
                return batch[n + 1 :]
        return []

    def report(self, name: str, status: str, reason: str) -> None:
        with self.lock:
            self.outcome.cases.append(Case(name, status, reason))
            word = "not ok" if status == FAIL else "ok"
            skip = "SKIP " if status == SKIP else ""
            print(f"{word} {len(self.outcome.cases)} {name} # {skip}{reason}", flush=True)

    def all(self, started: float) -> int:
        self.known = known_tests()
        print(f"KTAP version 1\n1..{len(self.mutants)}", flush=True)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(self.work, batches(self.mutants)))
        seconds = round(time.monotonic() - started, 1)
        cases = [dataclasses.asdict(case) for case in self.outcome.cases]
        (self.log / "result.json").write_text(json.dumps({"seconds": seconds, "cases": cases}, indent=2) + "\n")
        code: int = self.outcome.verdict()[0]
        print(f"# {rows_in_words(self.mutants)}")
        print(f"log: {self.log} ({seconds} s)")
        counts = [self.outcome.count(status) for status in (PASS, FAIL, SKIP)]
        print("{} passed, {} failed, {} skipped".format(*counts))
        return code


def batches(mutants: list[Mutant]) -> list[list[Mutant]]:
    """Those that share a machine; then those that have one of their own, as they end it or ask for it."""
    shared: list[list[Mutant]] = []
    ends = ("hang", "died")
    # After its first complaint lockdep is off, and KASAN mostly silent.
    alone = [mutant for mutant in mutants if mutant.alone or mutant.expect in ends or mutant.kernel == DEBUG]
    for machine in ("", *OWN_MACHINE):
        others = [mutant for mutant in mutants if mutant not in alone and machine_of(mutant) == machine]
        shared = [others[n : n + SHARE] for n in range(0, len(others), SHARE)] + shared
    return shared + [[mutant] for mutant in alone]


def module_with_mutants(kernel: str) -> Path:
    """The module that scripts/build-module makes for a kernel that has none itself."""
    return paths.BUILD / f"module-mutants-{paths.module_name(paths.build_tree(kernel))}/memfile.ko"


def machine_of(mutant: Mutant) -> str:
    """The suite that wants a machine for itself and has the tests of this mutant, or none."""
    machines = {own_machine(test.split(".")[0]) for test in mutant.tests}
    return machines.pop() if len(machines) == 1 else ""
