# SPDX-License-Identifier: GPL-2.0
"""The tests of each mutant, and the rows of from-v7.rst: do they exist?"""

from __future__ import annotations

import fnmatch
import re

from memfile import paths
from memfile.docs.tests import kunit_cases, listed_cases
from memfile.docs.text import Row, table_rows
from memfile.mutants.sources import Mutant, all_mutated
from memfile.paths import ROOT


def problems(mutants: list[Mutant]) -> list[str]:
    """What keeps the list from being used, without a build."""
    found = all_mutated(mutants)[1]
    known = known_tests()
    rows = {row.number: row.guard for row in guarded_rows()}
    for mutant in mutants:
        for test in mutant.tests:
            if not fnmatch.filter(known, test):
                found.append(f"{mutant.name}: there is no test {test}")
        for row in mutant.rows:
            if row not in rows:
                found.append(f"{mutant.name}: from-v7.rst has no row {row} that names a test")
            elif not any(f"``{test}``" in rows[row] for test in mutant.tests):
                found.append(f"{mutant.name}: row {row} names none of its tests")
    return found


def known_tests() -> list[str]:
    return sorted(listed_cases(paths.TESTS) | kunit_cases())


def guarded_rows() -> list[Row]:
    """The rows of from-v7.rst that name a test."""
    document = ROOT / "Documentation/from-v7.rst"
    rows = table_rows(document, document.read_text())
    return [row for row in rows if not re.match(r"none:|open", row.guard)]


def rows_in_words(mutants: list[Mutant]) -> str:
    rows = [row.number for row in guarded_rows()]
    shown = {row for mutant in mutants for row in mutant.rows}
    return f"the defects of {len(shown)} of {len(rows)} rows that name a test can be put back"
