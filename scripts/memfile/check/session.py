# SPDX-License-Identifier: GPL-2.0
"""One run of scripts/check: what it says and keeps, how it builds, boots and judges a machine."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from memfile import paths, program
from memfile.boot.machine import console_tail
from memfile.check.kernel_log import CASE_MARK, CRASH, SPLAT, without_races_of_others
from memfile.check.outcome import Outcome
from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.paths import SCRIPTS, read_text
from memfile.program import EXIT_DIED, EXIT_TIMEOUT, EXIT_TOOL

# A part of the run that keeps a core busy.
Job = Callable[[], None]


class Watch:
    """Does something when `seconds` pass without a call of again(); never if they are 0."""

    def __init__(self, seconds: float, then: Callable[[], None]) -> None:
        self._seconds, self._then = seconds, then
        self._timer: threading.Timer | None = None
        self.done = False
        self.again()

    def _over(self) -> None:
        self.done = True
        self._then()

    def again(self) -> None:
        self.end()
        if self._seconds:
            self._timer = threading.Timer(self._seconds, self._over)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        if self._timer:
            self._timer.cancel()


class Check:
    """One run: its options, its log folder, what it found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.outcome = Outcome()
        self._print_lock = threading.Lock()
        # Of the rest of the kernel; a few are reported twice.
        self.races: list[str] = []
        self.log: Path = args.log or paths.log_folder("check")
        self.log.mkdir(parents=True, exist_ok=True)
        self.flavour: str = args.kernel
        # The checks of the debug kernels cost that much time.
        self.slow = args.slow * (5 if args.kernel in ("debug", "kcsan") else 1)

    def report(self, cases: list[Case]) -> None:
        with self._print_lock:
            for case in cases:
                word = {PASS: "ok    ", FAIL: "not ok", SKIP: "skip  "}[case.status]
                print(f"{word} {case.name}" + (f" # {case.reason}" if case.reason else ""))
                if case.status == FAIL:
                    for line in case.output:
                        print(f"       | {line}")
            sys.stdout.flush()
            self.outcome.cases += cases

    def wanted(self, name: str) -> bool:
        tests = self.args.tests
        return not tests or any(fnmatch.fnmatchcase(name, test) for test in tests)

    def build(self, *command: str, kdir: str = "") -> None:
        # A KDIR of the user's would give the module to another kernel.
        env = {**os.environ, "KDIR": kdir}
        program.refuse_if_ending()
        run = subprocess.run([str(SCRIPTS / command[0]), *command[1:]], env=env, check=False)
        program.refuse_if_stopped(run.returncode)
        if run.returncode:
            program.fail(f"{' '.join(command)} failed")

    def boot(
        self, name: str, command: str, options: list[str], timeout: int,
        on_line: Callable[[str], None] | None = None, silence: int = 0,
    ) -> dict[str, object]:
        """Runs scripts/boot; gives its result.json, with code and reason.

        A machine that says nothing for `silence` seconds is ended.
        """
        program.refuse_if_ending()
        log = self.log / name
        line = [str(SCRIPTS / "boot"), "--die-with-parent", "--log", str(log)]
        line += ["--timeout", str(timeout * self.slow)]
        line += [*options, "--", "sh", "-c", command]
        log.mkdir(parents=True, exist_ok=True)
        errors = log / "boot.log"
        with errors.open("w") as stderr:
            with subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                watch = Watch(silence * self.slow, process.terminate)
                for text in process.stdout:
                    watch.again()
                    if on_line:
                        on_line(text)
                watch.end()
            code = process.returncode
        if self.args.verbose:
            with self._print_lock:
                print(read_text(log / "serial.log") + read_text(log / "out.log") + read_text(errors))
        if (log / "result.json").exists():
            result: dict[str, object] = json.loads((log / "result.json").read_text())
            return result
        if not watch.done:
            program.refuse_if_stopped(code)
        return {"code": code, "reason": read_text(errors).strip() or "scripts/boot failed"}

    def judge_boot(self, name: str, result: dict[str, object]) -> None:
        """Notes a boot that was lost, and what the kernel said in it."""
        code = int(str(result["code"]))
        if not result.get("finished"):
            lost = code if code in (EXIT_TIMEOUT, EXIT_DIED) else EXIT_TOOL
            self.outcome.lost.append((lost, f"{name}: {result['reason']}"))
            print(f"--- {name}: {result['reason']}; the last console lines:")
            print(console_tail(self.log / name))
            print("---")
        self.outcome.splats += [f"{name}: {text}" for text in self.splats(name)]

    def splats(self, name: str) -> list[str]:
        found, case = [], ""
        lines, others = without_races_of_others(read_text(self.log / name / "serial.log").splitlines())
        self.races += others
        lines += read_text(self.log / name / "out/kmemleak").splitlines()
        meant = [number for number, line in enumerate(lines) if name in CRASH and CRASH[name].search(line)]
        # Once; a second time it is another crash.
        lines = [line for number, line in enumerate(lines) if number not in meant[:1]]
        for line in lines:
            if mark := CASE_MARK.search(line):
                case = f" (in {mark[1]})"
            elif SPLAT.search(line):
                found.append(line.strip() + case)
        return found
