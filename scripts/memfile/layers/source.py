# SPDX-License-Identifier: GPL-2.0
"""A file of Rust: its modules, its code without comments, and what a `use` names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path


class Broken(Exception):
    """The source is not as this script understands it."""


MOD = re.compile(r"((?:#\[[^\]]*\]\s*)*)(?:pub(?:\s*\([^)]*\))?\s+)?\bmod\s+(\w+)\s*([;{])")
PATH_ATTRIBUTE = re.compile(r'#\[path\s*=\s*"([^"]+)"\s*\]')
BRACE = re.compile(r"[{}]")


@dataclasses.dataclass
class Source:
    """A file that is a module, with the modules inside of it."""

    file: Path
    module: tuple[str, ...]
    # Without comments, strings and character literals; the lines stay.
    code: str
    # Names that a `use` gives, per module inside of the file; and those that others may take.
    names: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    public: set[tuple[str, ...]] = dataclasses.field(default_factory=set)
    # From where to where each module inside of the file reaches, outermost first.
    spans: list[tuple[int, int, tuple[str, ...]]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.spans = [(0, len(self.code) + 1, self.module)]
        for found in MOD.finditer(self.code):
            if found[3] != "{":
                continue
            depth, end = 1, found.end()
            while depth and (brace := BRACE.search(self.code, end)):
                depth += 1 if brace[0] == "{" else -1
                end = brace.end()
            self.spans.append((found.end(), end, (*self.module_at(found.start()), found[2])))

    def module_at(self, at: int) -> tuple[str, ...]:
        return [module for start, stop, module in self.spans if start <= at < stop][-1]

    def line(self, at: int) -> int:
        return self.code.count("\n", 0, at) + 1


@dataclasses.dataclass(frozen=True)
class Use:
    """`user` names `used`, at this line."""

    user: Path
    used: Path
    line: int
    text: str


LITERAL = re.compile(
    r"""
    (?P<line>//[^\n]*)
    | (?P<block>/\*)
    | (?P<raw>\b(?:br|cr|r)(?P<hashes>\#*)".*?"(?P=hashes))
    | (?P<string>\b[bc]?"(?:\\.|[^"\\])*" | "(?:\\.|[^"\\])*")
    | (?P<char>\bb?'(?:\\.[^']*|[^'\\\n])' | '(?:\\.[^']*|[^'\\\n])')
    """,
    re.X | re.S,
)


def blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def without_comments(text: str, strings: bool) -> str:
    """`text` without comments, and without `strings` and characters if these are to go as well."""
    out, at = [], 0
    while found := LITERAL.search(text, at):
        out.append(text[at : found.start()])
        end = found.end()
        if found["block"]:
            depth = 1
            while depth:
                step = re.compile(r"/\*|\*/").search(text, end)
                if not step:
                    raise Broken("a comment does not end")
                depth += 1 if step[0] == "/*" else -1
                end = step.end()
        comment = found["line"] or found["block"]
        part = text[found.start() : end]
        out.append(blank(part) if comment or strings else part)
        at = end
    return "".join([*out, text[at:]])


def use_tree(text: str) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """`a::{b, c as d, e::*}`: each path with its name, and its place in the text."""

    end = 0

    def walk(at: int, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, int]]:
        nonlocal end
        path, begin = prefix, at
        while True:
            token = re.compile(r"\s*(::|[{},*]|\$?\w+|$)").match(text, at)
            if not token:
                raise Broken(f"use {text}")
            word, at = token[1], token.end()
            if word == "::":
                continue
            if word == "{":
                while True:
                    yield from walk(at, path)
                    at = end
                    if text[at - 1 : at] != ",":
                        break
                path = prefix
                # The group ends with its own brace.
                continue
            if word == "*":
                yield (path, "*", begin)
                path = prefix
            elif word in (",", "}", ""):
                if path != prefix:
                    yield (path, path[-1], begin)
                end = at
                return
            elif word == "as":
                name = re.compile(r"\s*(\w+)").match(text, at)
                assert name
                yield (path, name[1], begin)
                at, path = name.end(), prefix
            elif word == "self" and path:
                yield (path, path[-1], begin)
                path = prefix
            else:
                if path == prefix:
                    begin = token.start(1)
                path = (*path, word)

    yield from walk(0, ())
