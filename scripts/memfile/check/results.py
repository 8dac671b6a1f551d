# SPDX-License-Identifier: GPL-2.0
"""The end of a run: what the documents say of it, the summary, and the reports."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable

from memfile import paths, reports
from memfile.check.session import Check
from memfile.check.suites import OTHER_KINDS
from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.paths import SCRIPTS
from memfile.upstream import verdicts

# The name of this system in KCIDB; a submitter agrees on one with KernelCI.
ORIGIN = os.environ.get("MEMFILE_KCIDB_ORIGIN", "memfile")


def documentation(check: Check) -> None:
    """Every test that the documents name exists and, if this run was one of everything, ran."""
    name = "documentation.names_tests_that_exist_and_ran"
    if not check.wanted(name):
        return
    command = [str(SCRIPTS / "check-docs"), "--allow-skips"]
    if not check.args.tests and check.flavour != "base":
        cases = check.log / "cases.json"
        cases.write_text(json.dumps({"cases": [dataclasses.asdict(case) for case in check.outcome.cases]}))
        command += ["--results", str(cases)]
    run = subprocess.run(command, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = run.stdout.splitlines()
    reason = lines[-1] if lines else f"exit code {run.returncode}"
    check.report([Case(name, FAIL if run.returncode else PASS, reason, lines)])


def differences(check: Check) -> None:
    """Differences between a memfile and other kinds of memory are listed; and in a run of everything, those that
    is listed occurs, and the documents are of such a run."""
    name = "differences.are_listed_and_occur"
    of_others = [case for case in check.outcome.cases if case.name.partition(".")[0].endswith(OTHER_KINDS)]
    if check.flavour == "base" or not of_others:
        return
    cases = check.log / "cases.json"
    cases.write_text(json.dumps({"cases": [dataclasses.asdict(case) for case in check.outcome.cases]}))
    command = [str(SCRIPTS / "differences"), "--results", str(cases)]
    # Documents are of the plain kernel of the default base.
    if not (check.args.tests or check.flavour != "plain" or paths.OF_BASE or os.environ.get("KERNEL_SRC")):
        command.append("--complete")
    run = subprocess.run(command, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = run.stdout.splitlines()
    reason = lines[-1] if lines else f"exit code {run.returncode}"
    check.report([Case(name, FAIL if run.returncode else PASS, reason, lines)])


def series(flavour: str) -> tuple[str, str | None]:
    """The kernel that is tested, and the hash of the patches; None if only the user knows the kernel."""
    if os.environ.get("KERNEL_SRC"):
        return "of KERNEL_SRC", None
    return paths.kernel_version(), reports.patchset_hash([] if flavour == "base" else paths.series())


def longest_suites(cases: list[Case]) -> list[tuple[str, float]]:
    """The six suites that took longest, in seconds."""
    seconds: dict[str, float] = defaultdict(float)
    for case in cases:
        seconds[case.name.rpartition(".")[0]] += case.seconds or 0
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:6]
    return [(suite, taken) for suite, taken in longest if taken >= 1]


def finish(check: Check, started: float, compared: Iterable[verdicts.Verdict] = ()) -> int:
    """Says and writes what the run found, and gives its exit code."""
    outcome = check.outcome
    code, words = outcome.verdict()
    counts = [outcome.count(status) for status in (PASS, FAIL, SKIP)]
    summary = {
        "code": code, "reason": words, "kernel": check.flavour,
        "seconds": round(time.monotonic() - started, 1),
        "passed": counts[0], "failed": counts[1], "skipped": counts[2],
        "splats": outcome.splats, "races_of_others": sorted(set(check.races)),
        "cases": [dataclasses.asdict(case) for case in outcome.cases],
    }
    (check.log / "result.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_reports(check, code, words, time.monotonic() - started)
    if outcome.splats:
        print("--- in the kernel log:")
        print("\n".join(outcome.splats[:20]))
    if check.races:
        print(f"{len(check.races)} data races in the rest of the kernel, {len(set(check.races))} of them different")
    for case in outcome.cases:
        if case.status == FAIL:
            print(f"failed: {case.name}" + (f" ({case.reason})" if case.reason else ""))
    if compared := list(compared):
        print(f"upstream: {verdicts.summary(compared)}")
    if longest := longest_suites(outcome.cases):
        print("longest suites: " + ", ".join(f"{suite} {taken:.0f} s" for suite, taken in longest))
    print(f"log: {check.log} ({summary['seconds']} s)")
    print(f"check: {words}, exit code {code}")
    print("{} passed, {} failed, {} skipped".format(*counts))
    return code


def write_reports(check: Check, code: int, reason: str, seconds: float) -> None:
    """Reports for other programs: JUnit XML, and JSON for KCIDB."""
    base, patches = series(check.flavour)
    now = datetime.datetime.now(datetime.UTC)
    run = reports.Run(
        name=check.log.name, kernel=check.flavour, checkout=paths.describe_checkout(), base=base, patches=patches,
        started=now - datetime.timedelta(seconds=seconds), seconds=round(seconds, 1), code=code, reason=reason,
        cases=check.outcome.cases,
    )
    for path, text in (
        (check.args.junit or check.log / "junit.xml", reports.junit(run)),
        (check.args.kcidb or check.log / "kcidb.json", json.dumps(reports.kcidb(run, ORIGIN), indent=2) + "\n"),
    ):
        try:
            path.write_text(text)
        except OSError as error:
            print(f"check: {error}", file=sys.stderr)
