# SPDX-License-Identifier: GPL-2.0
"""The tests that exist, and how they ran."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from memfile.check.controls import CONTROLS
from memfile.docs.text import CARGO, Named
from memfile.paths import ROOT
from memfile.program import fail
from memfile.upstream.programs import read_list

KUNIT_SUITE = re.compile(r"kunit_tests\((\w+)\)")
TEST_FUNCTION = re.compile(r"#\[test\]\s*(?:#\[[^]]*\]\s*)*fn (\w+)\(")


def listed_cases(program: Path) -> set[str]:
    """The cases of memfile-tests."""
    try:
        run = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{program} does not list its cases ({error}); scripts/build-selftests makes it")
    return set(run.stdout.split())


def kunit_cases() -> set[str]:
    """The KUnit tests in the sources of the module: a suite is the rest of its file."""
    found = set()
    for path in (ROOT / "rust").rglob("*.rs"):
        suites = KUNIT_SUITE.split(path.read_text())
        for suite, text in zip(suites[1::2], suites[2::2]):
            found |= {f"kunit:{suite}.{name}" for name in TEST_FUNCTION.findall(text)}
    return found


def script_constants() -> set[str]:
    """The names that scripts/check gives to tests that are not in memfile-tests."""
    return {f"upstream.{name}" for name in read_list().runs} | {f"runner.{name}" for name in CONTROLS}


def cargo_test_exists(name: str) -> bool:
    match = CARGO.fullmatch(name)
    if match is None or not (ROOT / match[1]).is_file():
        return False
    text = (ROOT / match[1]).read_text()
    # A property has its #[test] inside of the macro, in the same form.
    return match[2] in TEST_FUNCTION.findall(text)


def read_results(path: Path) -> dict[str, tuple[str, str]]:
    """Status and reason of every case in result.json of scripts/check."""
    try:
        cases = json.loads(path.read_text())["cases"]
        return {case["name"]: (case["status"], case.get("reason", "")) for case in cases}
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path} is no result of scripts/check ({error!r})")


def result_of(name: str, results: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    if name.startswith("kunit:"):
        return results.get(name.replace(":", ".", 1))
    match = CARGO.fullmatch(name)
    if match is None:
        return results.get(name)
    crate = Path(match[1]).parent
    while crate != Path(".") and not (ROOT / crate / "Cargo.toml").exists():
        crate = crate.parent
    prefix = f"host.{str(crate).replace('/', '_')}."
    for case, result in results.items():
        if case.startswith(prefix) and re.split(r"::|\.", case)[-1] == match[2]:
            return result
    return None


def problems(args: argparse.Namespace, tests: list[Named]) -> Iterator[str]:
    plain = {t.name for t in tests if not t.name.startswith(("kunit:", "cargo:"))}
    constants = script_constants()
    known = kunit_cases() | constants
    if plain - constants:
        known |= listed_cases(args.program)
    results = read_results(args.results) if args.results else None
    for test in tests:
        exists = cargo_test_exists(test.name) if test.name.startswith("cargo:") else test.name in known
        if not exists:
            yield f"{test}: there is no such test"
            continue
        if results is None:
            continue
        status, reason = result_of(test.name, results) or ("missing", "")
        words = {"fail": "failed", "skip": "was skipped", "missing": "did not run"}
        if status in words and not (status == "skip" and args.allow_skips):
            yield f"{test}: {words[status]}" + (f" ({reason})" if reason else "")
