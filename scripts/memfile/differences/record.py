# SPDX-License-Identifier: GPL-2.0
"""Read reasons, records, and results of scripts/check."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import subprocess
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memfile import paths
from memfile.ktap import Case
from memfile.paths import ROOT, SCRIPTS
from memfile.program import fail

REASONS = SCRIPTS / "differences.toml"
RECORD = ROOT / "Documentation/differences.json"
DOCUMENT = ROOT / "Documentation/differences.rst"

# The behaviour of a kind of memory in a case: each observation, and the values it had.
Does = dict[str, str]
# Case of a memfile's suite, then suffix of the kind ("" is a memfile).
Seen = dict[str, dict[str, Does]]
NOTHING = "-"

SKIPPED = "skipped"


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Kind:
    suffix: str
    name: str
    what: str


@dataclasses.dataclass(frozen=True)
class Reason:
    """An entry of the list: a difference, or tests that only a memfile has."""

    title: str
    why: str
    on: tuple[str, ...]
    tests: tuple[str, ...]
    what: tuple[str, ...] = ("*",)
    does: tuple[str, ...] = ()

    def covers(self, difference: Difference) -> bool:
        return (
            difference.suffix in self.on and matches(difference.case, self.tests)
            and matches(difference.what, self.what) and difference.does in self.does
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    case: str
    what: str
    suffix: str
    memfile: str
    does: str

    def __str__(self) -> str:
        suite, _, case = self.case.partition(".")
        return f"{suite}{self.suffix}.{case}: {self.what}: {self.does}, and on a memfile {self.memfile}"


@dataclasses.dataclass(frozen=True)
class Reasons:
    kinds: tuple[Kind, ...]
    differences: tuple[Reason, ...]
    missing: tuple[Reason, ...]


@dataclasses.dataclass
class Record:
    """The observations of a run, and for each kind the tests that it has not; those of a suite that runs on
    a memfile only as "suite.*"."""

    seen: Seen
    missing: dict[str, list[str]]


def read_reasons(path: Path) -> Reasons:
    try:
        data = tomllib.loads(path.read_text())
        kinds = tuple(Kind(**entry) for entry in data["kind"])
        suffixes = {kind.suffix for kind in kinds}
        lists = []
        for key in ("difference", "missing"):
            entries = []
            for entry in data.get(key, []):
                words: dict[str, Any] = {
                    name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
                }
                entries.append(Reason(**words))
                if not suffixes.issuperset(entries[-1].on):
                    fail(f"{path.name}: {entries[-1].title}: {entries[-1].on} is not all of the kinds")
            lists.append(tuple(entries))
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path}: {error!r}")
    return Reasons(kinds, lists[0], lists[1])


def read_record(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        fail(f"{path}: {error!r}")


def read_results(path: Path) -> list[Case]:
    """The cases in result.json of scripts/check."""
    names = {field.name for field in dataclasses.fields(Case)}
    try:
        cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
        return [Case(**{key: value for key, value in case.items() if key in names}) for case in cases]
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path} is no result of scripts/check ({error!r})")


def listed_cases() -> list[str]:
    """The cases of memfile-tests."""
    try:
        run = subprocess.run([paths.TESTS, "--list"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"{paths.TESTS} does not list its cases ({error}); scripts/build-selftests makes it")
    # A memfile of huge pages is a memfile: its suites allow no difference.
    return [name for name in run.stdout.split() if not name.partition(".")[0].endswith(("_huge", "_1g", "_hidden"))]
