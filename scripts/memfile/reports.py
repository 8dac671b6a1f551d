# SPDX-License-Identifier: GPL-2.0
"""Writes the results of scripts/check for other programs: JUnit XML, and JSON for KCIDB."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from memfile.ktap import FAIL, PASS, SKIP, Case

# The version of KCIDB's format that this is.
KCIDB_VERSION = {"major": 5, "minor": 3}
# Characters that neither format may contain.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclasses.dataclass
class Run:
    """One run of scripts/check."""

    # Unique among the runs of this origin.
    name: str
    # The configuration of the kernel: plain, debug ...
    kernel: str
    # The checkout, as `git describe` names it, and the version of the kernel.
    checkout: str
    base: str
    # SHA-256 in the form of KCIDB, see patchset_hash(); None if it is not known.
    patches: str | None
    # Start and duration.
    started: datetime.datetime
    seconds: float
    # Exit code and reason of the whole.
    code: int
    reason: str
    cases: list[Case]


def verdict(run: Run) -> Case:
    """The run itself as a case: a machine that died and a splat are not in any other."""
    return Case("check.run", FAIL if run.code else PASS, f"exit code {run.code}: {run.reason}")


def text_of(lines: Iterable[str]) -> str:
    return CONTROL.sub("?", "\n".join(lines))


def junit(run: Run) -> str:
    """JUnit XML: a test suite for all that comes before the last dot of a name."""
    suites: dict[str, list[Case]] = {}
    for case in [*run.cases, verdict(run)]:
        suites.setdefault(case.name.rpartition(".")[0] or case.name, []).append(case)

    def counts(cases: list[Case]) -> dict[str, str]:
        return {
            "tests": str(len(cases)), "errors": "0",
            "failures": str(sum(case.status == FAIL for case in cases)),
            "skipped": str(sum(case.status == SKIP for case in cases)),
        }

    everything = [case for cases in suites.values() for case in cases]
    attributes = {"name": f"memfile-{run.kernel}", "time": f"{run.seconds:.1f}", **counts(everything)}
    root = ElementTree.Element("testsuites", attributes)
    for name, cases in suites.items():
        timestamp = run.started.isoformat(timespec="seconds")
        suite = ElementTree.SubElement(
            root, "testsuite", {"name": text_of([name]), "timestamp": timestamp, **counts(cases)})
        for case in cases:
            element = ElementTree.SubElement(
                suite, "testcase", classname=text_of([name]), name=text_of([case.name.rpartition(".")[2]]))
            if case.seconds is not None:
                element.set("time", f"{case.seconds:.2f}")
            if case.status == FAIL:
                failure = ElementTree.SubElement(element, "failure", message=text_of([case.reason or "failed"]))
                failure.text = text_of(case.output)
            elif case.status == SKIP:
                ElementTree.SubElement(element, "skipped", message=text_of([case.reason]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def path_of(name: str) -> str:
    """A name as KCIDB has paths: parts of letters, digits, "_" and "-", with dots between them."""
    parts = (re.sub(r"[^\w-]", "_", part, flags=re.ASCII) for part in re.split(r"\.|::", name))
    return ".".join(["memfile", *filter(None, parts)])


def kcidb(run: Run, origin: str) -> dict[str, Any]:
    """A report for KCIDB: one checkout, one build, one test for each case."""
    checkout = f"{origin}:{run.checkout}-{run.base}"
    build = f"{origin}:{run.name}"
    words = {PASS: "PASS", FAIL: "FAIL", SKIP: "SKIP"}
    tests: list[dict[str, object]] = []
    for number, case in enumerate([*run.cases, verdict(run)], 1):
        test: dict[str, object] = {
            "id": f"{build}-{number}", "origin": origin, "build_id": build,
            "path": path_of(case.name), "status": words[case.status], "start_time": run.started.isoformat(),
        }
        if case.reason:
            test["comment"] = text_of([case.reason])
        if case.output:
            test["log_excerpt"] = text_of(case.output)[-16000:]
        if case.seconds is not None:
            test["duration"] = case.seconds
        tests.append(test)
    # The last is the run: it took the time.
    tests[-1]["duration"] = run.seconds
    source: dict[str, object] = {
        "id": checkout, "origin": origin, "valid": True, "start_time": run.started.isoformat(),
        "tree_name": "memfile", "comment": f"Linux {run.base} with the patches of memfile {run.checkout}",
    }
    if run.patches is not None:
        source["patchset_hash"] = run.patches
    return {
        "version": KCIDB_VERSION,
        "checkouts": [source],
        "builds": [{
            "id": build, "origin": origin, "checkout_id": checkout, "architecture": "x86_64",
            "config_name": run.kernel, "status": "PASS", "start_time": run.started.isoformat(),
        }],
        "tests": tests,
    }


def patchset_hash(patches: Iterable[Path]) -> str:
    """KCIDB's hash of a series: that of the lines with the hashes of the patches."""
    hashes = [hashlib.sha256(patch.read_bytes()).hexdigest() for patch in patches]
    return hashlib.sha256("".join(f"{value}\n" for value in hashes).encode()).hexdigest() if hashes else ""
