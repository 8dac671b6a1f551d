# SPDX-License-Identifier: GPL-2.0
"""The result of a program on one kernel, and the differences of two results."""

from __future__ import annotations

import dataclasses
import difflib
import re

from memfile.upstream.programs import Program

KSFT_SKIP = 4
KILLED = 128 + 9
# Stands for the exit code of a program with which the machine ended.
DIED = -1


@dataclasses.dataclass
class Result:
    """The result of a program on one kernel."""

    # DIED if the machine ended with it.
    code: int
    seconds: int
    lines: list[str]
    limit: int = 60

    @property
    def ended(self) -> str:
        if self.code == 0:
            return "pass"
        if self.code == KSFT_SKIP:
            return "skip"
        if self.code == DIED:
            return "ends the machine"
        # By no other: the guest's clock, in whole seconds.
        if self.code == KILLED and self.seconds + 1 >= self.limit:
            return "timeout"
        return f"exit code {self.code}"


ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
# The words that tell how a test, or a part of it, ended.
TELLS = re.compile(
    r"^\s*(# *)*(not )?ok\b|^\s*1\.\.\d|\[ *(PASS|FAIL|SKIP|OK|XFAIL|XPASS) *\]|\b(PASS|FAIL)(ED)?\b"
    r"|skip|fail|assert|panic|error|unexpected|\bdone\b|^kernel: |^huge pages: ", re.I)
# Addresses, times, and dots as long as something takes; also what names a process.
VARIES = (
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,16}\b", re.I), "ADDRESS"),
    (re.compile(r"\b(pid|tid|seed)( ?[=:] ?)-?\d+", re.I), r"\1\2NUMBER"),
    (re.compile(r"\b\d+(\.\d+)? ?([munµ]?s|secs?|seconds?|usecs?|msecs?|ns|MB/s|GB/s|MiB/s|cycles)\b"), "TIME"),
    (re.compile(r"\b\d+\.\d+s?\b"), "FRACTION"),
    (re.compile(r"\.{3,}"), "..."),
)
NUMBER = re.compile(r"\d+")


def normal(line: str) -> str:
    """A line without what is never twice the same."""
    line = ESCAPES.sub("", line).rstrip()
    for pattern, word in VARIES:
        line = pattern.sub(word, line)
    # In a column a longer number leaves less blanks.
    line = re.sub(r"[ \t]+", " ", line)
    # Numbers are a part of the result only in a line that tells one.
    return line if TELLS.search(line) else NUMBER.sub("N", line)


def compared(program: Program, result: Result) -> list[str]:
    """The part of a result that must be the same on both kernels."""
    lines: list[str] = []
    for text in result.lines:
        line = normal(text)
        if not line or any(re.search(pattern, line) for pattern in program.ignore):
            continue
        if program.results and not TELLS.search(line):
            continue
        # A line that is said again and again is said once.
        if not lines or lines[-1] != line:
            lines.append(line)
    return [*lines, f"ended: {result.ended}"]


def differences(program: Program, base: Result, patched: Result) -> list[str]:
    """Lines of one only: "-" of the unpatched, "+" of the patched kernel."""
    one, other = compared(program, base), compared(program, patched)
    if base.ended == patched.ended and base.ended in ("timeout", "ends the machine"):
        # Both were stopped, but not at the same line. One that came half as far has hung.
        said = [[line for line in lines if not line.startswith("huge pages: ")][:-1] for lines in (one, other)]
        common, most = sorted(map(len, said))
        if 2 * common < most:
            return [f"{sign}{len(lines)} lines before it was stopped" for sign, lines in zip("-+", said)]
        one, other = said[0][:common], said[1][:common]
    diff = difflib.unified_diff(one, other, lineterm="", n=0)
    return [line for line in diff if not re.match(r"(---|\+\+\+|@@) ?", line)]


def why_skipped(result: Result) -> str:
    for line in reversed(result.lines):
        if re.search(r"skip", line, re.I):
            return re.sub(r"^1\.\.0 +# ?SKIP:?( -)? *", "", line.strip(), flags=re.I)
    said = [line for line in result.lines if line.strip() and not line.startswith("huge pages: ")]
    return said[-1].strip() if said else "it skipped itself"


def where_failed(result: Result) -> str:
    """The first line that says what went wrong."""
    for pattern in (r"^\s*\S+\.[ch]:\d+: ", r"^\s*(# *)?not ok\b", r"fail|error|assert"):
        for line in result.lines:
            if re.search(pattern, line, re.I) and not line.startswith("==== Test Assertion"):
                return line.strip()[:160]
    return ""
