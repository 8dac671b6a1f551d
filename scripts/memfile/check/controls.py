# SPDX-License-Identifier: GPL-2.0
"""This runner on runs that end badly: does it notice?"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable

from memfile import program
from memfile.check.outcome import exit_code_case
from memfile.check.session import Check, Job
from memfile.ktap import FAIL, PASS, Case, Parser
from memfile.paths import SCRIPTS

KTAP_HEAD = "printf 'KTAP version 1\\n1..1\\n"
# name: command in the guest, exit code of the runner, seconds.
CONTROLS: dict[str, tuple[str, int, int]] = {
    "passing_test": (f"{KTAP_HEAD}ok 1 a\\n'", 0, 60),
    "failing_test": (f"{KTAP_HEAD}not ok 1 a\\n'; exit 1", 1, 60),
    "failing_exit_code": (f"{KTAP_HEAD}ok 1 a\\n'; exit 1", 1, 60),
    "suite_without_cases": (
        f"{KTAP_HEAD}  KTAP version 1\\n  # Subtest: s\\n  1..0\\nok 1 s\\n'", 1, 60),
    "no_output": ("true", 1, 60),
    "kernel_warning": (
        f"echo WARNING >/sys/kernel/debug/provoke-crash/DIRECT; {KTAP_HEAD}ok 1 a\\n'", 3, 60),
    "kernel_oops": (
        f"{KTAP_HEAD}ok 1 a\\n'; echo EXCEPTION >/sys/kernel/debug/provoke-crash/DIRECT; sleep 9", 255, 60),
    "kernel_panic": (f"{KTAP_HEAD}ok 1 a\\n'; echo c >/proc/sysrq-trigger; sleep 9", 255, 60),
    "hang": (f"{KTAP_HEAD}ok 1 a\\n'; sleep 999", 124, 10),
    "vm_lost": (f"{KTAP_HEAD}ok 1 a\\n'; poweroff -f; sleep 9", 255, 60),
    "cfi_failure": (
        f"{KTAP_HEAD}ok 1 a\\n'; echo CFI_FORWARD_PROTO >/sys/kernel/debug/provoke-crash/DIRECT; sleep 9", 255, 60),
}
# Controls of one kernel only: is its check enabled, and does it stop what it finds?
CONTROL_OF = {"cfi_failure": "cfi"}


def controls(check: Check, names: Iterable[str]) -> list[Job]:
    """This runner on runs that end badly, each in a process of its own."""

    def run(name: str) -> None:
        command, expected, timeout = CONTROLS[name]
        log = check.log / f"runner-{name}"
        line = [str(SCRIPTS / "check"), "--kernel", check.flavour, "--log", str(log)]
        line += ["--timeout", str(timeout), "--run", command]
        program.refuse_if_ending()
        process = subprocess.run(line, capture_output=True, text=True, check=False, errors="replace")
        program.refuse_if_stopped(process.returncode)
        output = process.stdout + process.stderr
        (log / "check.log").write_text(output)
        case = Case(f"runner.{name}", PASS)
        if process.returncode != expected:
            reason = f"exit code {process.returncode}, not {expected}"
            case = Case(f"runner.{name}", FAIL, reason, output.splitlines()[-30:])
        check.report([case])

    names = [name for name in names if CONTROL_OF.get(name, check.flavour) == check.flavour]
    return [functools.partial(run, name) for name in names if check.wanted(f"runner.{name}")]


def run_one(check: Check, command: str) -> None:
    """--run: one command that writes KTAP, judged like the tests."""
    parser = Parser()
    seen: list[Case] = []

    def on_line(text: str) -> None:
        seen.extend(parser.feed(text))

    options = ["--kernel", check.flavour, "--cpus", "1", "--no-module"]
    result = check.boot("main", command, options, check.args.timeout, on_line)
    seen += parser.finish()
    check.report(seen)
    check.judge_boot("main", result)
    if result.get("finished"):
        check.report(exit_code_case("run", seen, int(str(result["code"]))))
