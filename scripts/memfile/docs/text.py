# SPDX-License-Identifier: GPL-2.0
"""What the documents say: the tests that they name, and the rows of from-v7.rst."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

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
    """A row of the table in from-v7.rst: its number, and its last column."""

    document: str
    line: int
    number: str
    guard: str

    @property
    def open(self) -> bool:
        return self.guard.startswith("open")

    @property
    def settled(self) -> bool:
        named = any(is_test(match[1]) for match in LITERAL.finditer(self.guard))
        return self.open or named or re.match(r"none: \S", self.guard) is not None

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


def table_rows(document: Path, text: str) -> Iterator[Row]:
    """The rows of every list-table: "* - number" and then "- column"."""
    columns: list[str] = []
    start = 0

    def row() -> Iterator[Row]:
        if columns and columns[0] != "No.":
            yield Row(relative(document), start, columns[0], columns[-1])

    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"   \* - (.*)", line):
            yield from row()
            columns, start = [match[1].strip()], number
        elif columns and (match := re.match(r"     - (.*)", line)):
            columns.append(match[1].strip())
        elif columns and line.startswith("       "):
            columns[-1] = f"{columns[-1]} {line.strip()}".strip()
        elif line.strip():
            yield from row()
            columns = []
    yield from row()
