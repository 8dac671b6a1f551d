# SPDX-License-Identifier: GPL-2.0
"""The contents of the documents: the tests that they name, and the rows of v7.toml."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memfile.paths import ROOT

LITERAL = re.compile(r"``(.+?)``")
CASE = re.compile(r"(?:kunit:)?([a-z][a-z0-9_]*)\.([a-z][a-z0-9_]*)")
CARGO = re.compile(r"cargo:([\w./-]+\.rs)::(\w+)")
FILE_ENDINGS = {"c", "h", "rs", "ko", "py", "sh", "rst", "md", "json", "log", "config", "toml"}


@dataclasses.dataclass(frozen=True)
class Named:
    """A test that a document names."""

    document: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of v7.toml: its number, the tests that it names, or why it names none."""

    document: str
    line: int
    number: str
    tests: tuple[str, ...]
    untested: str
    open: str
    no_mutant: str

    @property
    def settled(self) -> bool:
        """It has tests or the reason why there are none, and not both; or it is open."""
        return bool(self.open) or bool(self.tests) != bool(self.untested)

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: row {self.number}"


def is_test(literal: str) -> bool:
    if literal.startswith(("kunit:", "cargo:")):
        return True
    match = CASE.fullmatch(literal)
    return match is not None and match[2] not in FILE_ENDINGS


def relative(document: Path) -> str:
    return str(document.relative_to(ROOT)) if document.is_relative_to(ROOT) else str(document)


def named_tests(document: Path, text: str) -> Iterator[Named]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in LITERAL.finditer(line):
            if is_test(match[1]):
                yield Named(relative(document), number, match[1])


def row_tests(rows: list[Row]) -> Iterator[Named]:
    for row in rows:
        yield from (Named(row.document, row.line, test) for test in row.tests)


def defect_rows(document: Path) -> list[Row]:
    """The rows of v7.toml. A row that is not as its first lines say is an error of the file."""
    text = document.read_text()
    try:
        entries = tomllib.loads(text)["row"]
        rows = [_row(document, text, entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{relative(document)}: {error!r}") from error
    numbers = [row.number for row in rows]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ValueError(f"{relative(document)}: there twice: {' '.join(twice)}")
    return rows


def _row(document: Path, text: str, entry: dict[str, Any]) -> Row:
    number = entry["number"]
    if strange := set(entry) - {"number", "defect", "raised", "memfile", "tests", "untested", "open", "no_mutant"}:
        raise ValueError(f"row {number} has {' '.join(sorted(strange))}")
    if not all(entry[field] for field in ("defect", "raised", "memfile")):
        raise ValueError(f"row {number} has an empty field")
    line = text.count("\n", 0, text.index(f'number = "{number}"')) + 1
    reasons = (str(entry.get(field, "")) for field in ("untested", "open", "no_mutant"))
    return Row(relative(document), line, number, tuple(entry.get("tests", ())), *reasons)
