# SPDX-License-Identifier: GPL-2.0
"""Reads KTAP, line by line, from a console or from a program.

Unlike kunit.py it goes on after the first stream, counts a suite that ran no
case as a failure, and compares each plan with what came.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

VERSION = re.compile(r"^( *)(?:KTAP version 1|TAP version 1[34])\s*$")
PLAN = re.compile(r"^( *)1\.\.(\d+)(?:\s*#\s*SKIP\s*(.*))?\s*$", re.IGNORECASE)
SUBTEST = re.compile(r"^( *)# Subtest: (.*\S)\s*$")
RESULT = re.compile(r"^( *)(ok|not ok) (\d+)(?: (?:- )?([^#]*?))?\s*(?:#\s*(\w+):?\s*(.*?))?\s*$")
# The behaviour of a kind of memory, as a case of memfile-tests prints it.
DOES = re.compile(r"^ *# does: (.*?) -> (.*\S)\s*$")
PRINTK_TIME = re.compile(r"^\[ *\d+\.\d+\] ?")

PASS, FAIL, SKIP = "pass", "fail", "skip"
KEPT_LINES = 40


@dataclasses.dataclass
class Case:
    """The result of one case, or of a suite that is itself at fault."""

    name: str
    status: str
    reason: str = ""
    output: list[str] = dataclasses.field(default_factory=list)
    # Each thing that it says it saw, and what it saw: scripts/differences compares them.
    does: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    # How long it took, if that is known: from the result before it, on the clock of the host.
    seconds: float | None = None


@dataclasses.dataclass
class Level:
    """An open stream (the outermost) or suite."""

    indent: int
    name: str = ""
    plan: int | None = None
    skipped: bool = False
    results: int = 0
    failed: bool = False


class Parser:
    """Feed it lines; it gives the cases as they end."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._levels: list[Level] = []
        self._output: list[str] = []
        self._does: dict[str, list[str]] = {}

    def feed(self, line: str) -> list[Case]:
        line = PRINTK_TIME.sub("", line.rstrip("\r\n"))
        if match := VERSION.match(line):
            cases = self._close(len(match[1]))
            self._levels.append(Level(len(match[1])))
            self._output.clear()
            self._does = {}
            return cases
        level = self._levels[-1] if self._levels else None
        if level is None:
            return []
        match = SUBTEST.match(line)
        if match and len(match[1]) == level.indent:
            level.name = match[2]
        elif (match := PLAN.match(line)) and len(match[1]) == level.indent:
            level.plan, level.skipped = int(match[2]), match[3] is not None
            if level.skipped:
                return [Case(self._name(""), SKIP, match[3])]
        elif match := RESULT.match(line):
            return self._result(match)
        elif match := DOES.match(line):
            values = self._does.setdefault(match[1], [])
            if match[2] not in values:
                values.append(match[2])
        elif line.strip():
            self._output = [*self._output[1 - KEPT_LINES :], line.strip()]
        return []

    def finish(self) -> list[Case]:
        """The input has ended: what is open was cut short."""
        return self._close(0)

    def _result(self, match: re.Match[str]) -> list[Case]:
        indent, word, _, name, directive, reason = match.groups()
        if not any(level.indent == len(indent) for level in self._levels):
            return []
        inner = self._levels[-1] if self._levels[-1].indent > len(indent) else None
        cases: list[Case] = []
        if inner:
            inner.name = inner.name or name or ""
            cases = self._close(len(indent) + 1)
        level = self._levels[-1]
        level.results += 1
        status = self._status(word, directive)
        level.failed = level.failed or status == FAIL or any(c.status == FAIL for c in cases)
        # A suite's own line counts only if it says what its cases did not.
        if not inner or (status == FAIL and not (inner.failed or cases)):
            text = reason if directive else "" if not inner else "the suite failed, no case did"
            cases.append(Case(self._name(name or match[3]), status, text or "", self._output, self._does))
        self._output = []
        self._does = {}
        return cases

    def _close(self, indent: int) -> list[Case]:
        """Ends the levels at this indent and deeper."""
        cases: list[Case] = []
        while self._levels and self._levels[-1].indent >= indent:
            level, name = self._levels[-1], self._name("")
            self._levels.pop()
            if level.results == 0 and not level.skipped:
                cases.append(Case(name, FAIL, "no case ran"))
            elif level.plan not in (None, level.results) and not level.skipped:
                reason = f"{level.plan} results planned, {level.results} seen"
                cases.append(Case(name, FAIL, reason, self._output))
        return cases

    def _name(self, last: str) -> str:
        parts = [self._prefix, *(level.name for level in self._levels), last]
        return ".".join(part for part in parts if part) or "stream"

    @staticmethod
    def _status(word: str, directive: str | None) -> str:
        if directive and directive.upper() in ("SKIP", "TODO"):
            return SKIP
        return PASS if word == "ok" else FAIL


def parse(lines: Iterable[str], prefix: str = "") -> list[Case]:
    parser = Parser(prefix)
    cases = [case for line in lines for case in parser.feed(line)]
    return cases + parser.finish()
