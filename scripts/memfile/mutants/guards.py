# SPDX-License-Identifier: GPL-2.0
"""The tests of each mutant, and the rows of v7.toml: do they exist?"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from memfile import paths
from memfile.docs.tests import kunit_cases, listed_cases
from memfile.docs.text import Row, defect_rows
from memfile.mutants.sources import DEBUG, Mutant, all_mutated, in_module
from memfile.paths import ROOT
from memfile.program import fail


def problems(mutants: list[Mutant]) -> list[str]:
    """The faults of the list that can be seen without a build."""
    found = all_mutated(mutants)[1]
    known = known_tests()
    for mutant in mutants:
        if mutant.kernel == DEBUG and not all(in_module(edit.file) for edit in mutant.edits):
            found.append(f"{mutant.name}: on the kernel {DEBUG} only the module can have mutants")
        for test in mutant.tests:
            if not fnmatch.filter(known, test):
                found.append(f"{mutant.name}: there is no test {test}")
    return [*found, *row_problems(mutants, guarded_rows())]


def row_problems(mutants: list[Mutant], rows: list[Row]) -> Iterator[str]:
    """Where the list and the rows that name a test contradict each other."""
    tests = {row.number: row.tests for row in rows}
    for mutant in mutants:
        for number in mutant.rows:
            if number not in tests:
                yield f"{mutant.name}: v7.toml has no row {number} that names a test"
            elif not set(mutant.tests) & set(tests[number]):
                yield f"{mutant.name}: row {number} names none of its tests"
    shown = {number for mutant in mutants for number in mutant.rows}
    for row in rows:
        if row.number in shown and row.no_mutant:
            yield f"{row}: says why it has no mutant, and has one"
        if row.number not in shown and not row.no_mutant:
            yield f"{row}: has no mutant and does not say why"


def known_tests() -> list[str]:
    return sorted(listed_cases(paths.TESTS) | kunit_cases())


def guarded_rows() -> list[Row]:
    """The rows of v7.toml that name a test, and lack nothing."""
    try:
        rows = defect_rows(ROOT / "Documentation/v7.toml")
    except (OSError, ValueError) as error:
        fail(str(error))
    return [row for row in rows if row.tests and not row.open]


def rows_in_words(mutants: list[Mutant]) -> str:
    rows = [row.number for row in guarded_rows()]
    shown = {row for mutant in mutants for row in mutant.rows}
    return f"the defects of {len(shown)} of {len(rows)} rows that name a test can be put back"
