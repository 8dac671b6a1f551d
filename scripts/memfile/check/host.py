# SPDX-License-Identifier: GPL-2.0
"""The tests that run on the host: those of Cargo and of the scripts in Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from memfile import paths, program
from memfile.check.session import Check
from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.paths import ROOT, SCRIPTS


def host_tests(check: Check) -> None:
    """Cargo's tests and Python's."""
    for folder in ("rust/host", "selftests"):
        if (ROOT / folder / "Cargo.toml").exists():
            target = {"CARGO_TARGET_DIR": str(paths.CARGO)}
            command = ["cargo", "test", "--locked", "--no-fail-fast"]
            run_tests(check, f"host.{folder.replace('/', '_')}", command, ROOT / folder, target, cargo_cases)
    for path in sorted(SCRIPTS.glob("test_*.py")):
        run_tests(check, f"host.{path.stem[5:]}", [sys.executable, path.name, "-v"], SCRIPTS, {}, unittest_cases)


def run_tests(
    check: Check, name: str, command: list[str], cwd: Path, env: dict[str, str],
    read: Callable[[str], Iterator[tuple[str, str]]],
) -> None:
    if not (check.wanted(name) or any(test.startswith("host") for test in check.args.tests)):
        return
    program.refuse_if_ending()
    run = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, check=False, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    program.refuse_if_stopped(run.returncode)
    (check.log / f"{name}.log").write_text(run.stdout)
    cases = [Case(f"{name}.{case}", status) for case, status in read(run.stdout)]
    cases = [case for case in cases if check.wanted(case.name) or check.wanted(name)]
    failed = any(case.status == FAIL for case in cases)
    if run.returncode and not failed:
        cases.append(Case(name, FAIL, f"exit code {run.returncode}"))
    if not cases and not check.args.tests:
        cases.append(Case(name, FAIL, "no case ran"))
    if any(case.status == FAIL for case in cases):
        cases[-1].output = run.stdout.splitlines()[-40:]
    check.report(cases)


def cargo_cases(output: str) -> Iterator[tuple[str, str]]:
    """libtest's lines: "test a::b ... ok"."""
    words = {"ok": PASS, "FAILED": FAIL, "ignored": SKIP}
    for match in re.finditer(r"^test (.+?)(?: - should panic)? \.\.\. (ok|FAILED|ignored)", output, re.M):
        yield match[1], words[match[2]]


def unittest_cases(output: str) -> Iterator[tuple[str, str]]:
    """unittest -v's lines: "test_a (module.Class.test_a) ... ok"."""
    for match in re.finditer(r"^(test_\w+) \(.*\) \.\.\. (\w+)", output, re.M):
        yield match[1], PASS if match[2] == "ok" else SKIP if match[2] == "skipped" else FAIL
