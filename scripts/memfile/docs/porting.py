# SPDX-License-Identifier: GPL-2.0
"""The table of porting.rst: a row for each file that the patches of the kernel change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from memfile import paths
from memfile.docs.text import LITERAL, relative

TABLE = re.compile(r"^Files that the shim touches\n=+\n(.*?)(?=^[^\n]+\n[=-]{3,}\n|\Z)", re.M | re.S)
# The first column of a row.
FILES = re.compile(r"^   \* - (.*?)(?=^     - )", re.M | re.S)


def named(text: str) -> Iterator[tuple[int, str]]:
    """The files of the table, and the line of each. A name without a folder is in that of the one before
    it, or in any if there is none before it in its row; one that ends in / is a folder."""
    for table in TABLE.finditer(text):
        for row in FILES.finditer(table[1]):
            folder = ""
            for match in LITERAL.finditer(row[1]):
                before, slash, name = match[1].rpartition("/")
                if slash and name:
                    folder = before + slash
                line = text.count("\n", 0, table.start(1) + row.start(1) + match.start()) + 1
                yield line, match[1] if slash else folder + name


def covers(name: str, file: str) -> bool:
    if name.endswith("/"):
        return file.startswith(name)
    return file == name or ("/" not in name and file.endswith(f"/{name}"))


def porting_problems(document: Path, text: str) -> list[str]:
    """The files without a row, and the rows without a file."""
    bases = [path.parent.name for path in sorted(paths.PATCHES.parent.glob("[0-9]*/BASE"))]
    files = {file: base for base in bases for file in paths.touched(paths.series(base))}
    rows = list(named(text))
    found = [f"{relative(document)}:{line}: {name}: no patch changes it" for line, name in rows
             if not any(covers(name, file) for file in files)]
    return found + [f"{relative(document)}: {file}: it has no row, but a patch of {files[file]} changes it"
                    for file in sorted(files) if not any(covers(name, file) for _, name in rows)]
