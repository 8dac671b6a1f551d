# SPDX-License-Identifier: GPL-2.0
"""The rules that files cite, and the functions that rules.rst names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from memfile import paths
from memfile.docs.text import LITERAL, relative
from memfile.paths import ROOT
from memfile.program import fail

# Build products, and files that are not the project's text.
NOT_SEARCHED = {".git", "target", "Cargo.lock"}

# Between two numbers there may be the end of a line and the sign of a comment.
GAP = r"[\s/!#*+]*"
CITED = re.compile(rf"\brules?\b{GAP}(\d+(?:{GAP}(?:,{GAP}and\b|,|and\b|or\b|to\b){GAP}(?:rules?\b{GAP})?\d+)*)", re.I)
HEADING = re.compile(r"^Rule (\d+): \S.*\n(?:-{3,}|={3,})$", re.M)
FUNCTION = re.compile(r"([\w./-]+\.(?:c|h|rs|py)): (\w+)\(\)")


def cited_rules(text: str) -> Iterator[tuple[int, int]]:
    """The rules that a text cites, and the line of each."""
    for match in CITED.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        last = 0
        to = False
        for word in re.findall(r"\d+|[a-z]+", match[1], re.I):
            if not word.isdigit():
                to = word.lower() == "to"
                continue
            for rule in range(last + 1 if to else int(word), int(word) + 1):
                yield rule, line
            last, to = int(word), False


def files_searched(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        if path.name in NOT_SEARCHED or path.is_symlink():
            continue
        if path.is_dir():
            yield from files_searched(path)
        else:
            yield path


def rule_problems(root: Path, rules: Path) -> tuple[set[int], list[str]]:
    """The rules that there are; what is cited and missing, or there twice."""
    try:
        headings = [int(number) for number in HEADING.findall(rules.read_text())]
    except OSError as error:
        fail(str(error))
    found = [f"{relative(rules)}: rule {n} is there twice" for n in sorted(set(headings)) if headings.count(n) > 1]
    for path in files_searched(root):
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for rule, line in cited_rules(text):
            if rule not in headings:
                found.append(f"{path.relative_to(root)}:{line}: rule {rule}: there is no such rule")
    return set(headings), found


def patched(name: str) -> str:
    """The text of a file of the kernel that the series has: its changes, and the lines around them."""
    found = []
    for patch in paths.series():
        for part in re.split(r"^diff --git ", patch.read_text(), flags=re.M)[1:]:
            if re.search(rf"^\+\+\+ b/{re.escape(name)}$", part, re.M):
                found.append(part)
    return "\n".join(found)


def function_problems(document: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in LITERAL.finditer(line):
            if not (function := FUNCTION.fullmatch(match[1])):
                continue
            name = re.escape(function[2])
            path = ROOT / function[1]
            if path.is_file():
                defined = rf"\b(?:fn|def) {name}\b" if path.suffix in (".rs", ".py") else rf"\b{name}\("
                source = path.read_text()
            else:
                defined, source = rf"\b{name}\(", patched(function[1])
            if not re.search(defined, source):
                yield f"{relative(document)}:{number}: {match[1]}: there is no such function"
