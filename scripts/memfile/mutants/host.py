# SPDX-License-Identifier: GPL-2.0
"""The mutants that the tests of rust/host/src/protocol.rs find: each is a copy of the engine's source."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

from memfile.mutants.sources import OF_HOST, WORD, Edit, Mutant
from memfile.paths import ROOT
from memfile.program import fail


def read_host(path: Path, mutants: list[Mutant]) -> dict[str, Edit]:
    """By the name of the test: those that guests find as well, and those of [[host]]."""
    found: dict[str, Edit] = {mutant.host: mutant.edits[0] for mutant in mutants if mutant.host}
    if len(found) != sum(bool(mutant.host) for mutant in mutants):
        fail("two mutants have the same host")
    for entry in tomllib.loads(path.read_text()).get("host", []):
        name = entry.get("name", "a mutant without name")
        if wrong := OF_HOST ^ set(entry):
            fail(f"{name}: missing or unknown: {', '.join(sorted(wrong))}")
        if name in found or not WORD.search(entry["is"]):
            fail(f"{name}: is there twice, or has no word MUTANT")
        found[name] = Edit(name, entry["file"], entry["was"], entry["is"])
    return found


def host_problems(edits: dict[str, Edit]) -> Iterator[str]:
    for name, edit in edits.items():
        times = (ROOT / edit.file).read_text().count(edit.was)
        if times != 1:
            yield f"{name}: its text is {times} times in {edit.file}, not once: {edit.was}"


def host_modules(edits: dict[str, Edit]) -> str:
    """A module of Rust for each, in which the mutant is enabled."""
    parts = []
    for name, edit in edits.items():
        text = (ROOT / edit.file).read_text().replace(edit.was, edit.becomes)
        # Inner documentation cannot be included.
        lines = [line for line in text.splitlines() if not line.startswith("//!")]
        parts.append("\n".join([f"pub(crate) mod {name} {{", "const MUTANT: bool = true;", *lines, "}", ""]))
    return "".join(parts)
