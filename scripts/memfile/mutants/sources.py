# SPDX-License-Identifier: GPL-2.0
"""The list of mutants, scripts/mutants.toml, and the sources with all of them in it."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import zlib
from pathlib import Path

from memfile import paths
from memfile.paths import MUTANTS as OUT
from memfile.paths import ROOT
from memfile.program import fail

PATCHED_TREE = paths.patched_tree()

WORD = re.compile(r"\bMUTANT\b")
# How the word MUTANT reads in C and in Rust.
C_TEST = "({{ extern int memfile_mutant; unlikely(memfile_mutant == {}); }})"
RUST_TEST = "crate::abi::mutant({})"
# Where the number is kept, and how the module gets at it.
SWITCH = {
    "mm/memfile.c": """
/* Which mutant is enabled; scripts/mutants has added this. */
int memfile_mutant;
EXPORT_SYMBOL_GPL(memfile_mutant);
core_param(memfile_mutant, memfile_mutant, int, 0644);
""",
    "rust/abi/mod.rs": """
/// Is this mutant enabled? `scripts/mutants` has added this.
pub(crate) fn mutant(number: kernel::ffi::c_int) -> bool {
    extern "C" {
        static memfile_mutant: kernel::ffi::c_int;
    }
    // SAFETY: The kernel writes it before there are modules.
    unsafe { memfile_mutant == number }
}
""",
    # For a kernel that has no mutants of its own.
    "rust/shim.c": """
#ifdef MEMFILE_OWN_SWITCH
/* Which mutant is enabled; scripts/mutants has added this. */
int memfile_mutant;
module_param(memfile_mutant, int, 0644);
#endif
""",
}

# How a mutant shows: its tests fail, or pass beside a line in the kernel log, or do not end.
EXPECTED = ("fail", "splat", "hang", "died")
# The kernel that has all of them, and one that checks itself, for which only the module is built anew.
MUTANTS, DEBUG = "mutants", "debug"
REQUIRED = {"name", "what", "file", "was", "is", "fails"}
FIELDS = REQUIRED | {"also", "rows", "expect", "seconds", "alone", "host", "kernel"}
OF_HOST = REQUIRED - {"fails"}
# For its tests, once.
SECONDS = 100


@dataclasses.dataclass(frozen=True)
class Edit:
    """One place of a mutant: a text that is once in the file, and what it becomes."""

    mutant: str
    file: str
    was: str
    becomes: str

    @property
    def text(self) -> str:
        test = (RUST_TEST if self.file.endswith(".rs") else C_TEST).format(number(self.mutant))
        return WORD.sub(lambda _: test, self.becomes)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An entry of the list."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    rows: tuple[str, ...]
    expect: str
    seconds: int
    # No test may have run in its machine before.
    alone: bool
    # The test of the host that finds it as well, if there is one.
    host: str
    # On which it runs.
    kernel: str


def number(name: str) -> int:
    """Stays as it is when other mutants come and go: so do the files without changes."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def in_module(file: str) -> bool:
    """Of the checkout, or of the patched kernel?"""
    return (ROOT / file).is_file()


def read_list(path: Path) -> list[Mutant]:
    try:
        entries = tomllib.loads(path.read_text())["mutant"]
    except (OSError, tomllib.TOMLDecodeError, LookupError) as error:
        fail(f"{path}: {error!r}")
    mutants = []
    for entry in entries:
        name = entry.get("name", "a mutant without name")
        if wrong := (REQUIRED - set(entry)) | (set(entry) - FIELDS):
            fail(f"{name}: missing or unknown: {', '.join(sorted(wrong))}")
        if entry.get("expect", "fail") not in EXPECTED:
            fail(f"{name}: expect is one of {', '.join(EXPECTED)}")
        if entry.get("kernel", MUTANTS) not in (MUTANTS, DEBUG):
            fail(f"{name}: kernel is {MUTANTS} or {DEBUG}")
        edits = []
        for part in (entry, *entry.get("also", ())):
            file = part.get("file", entry["file"])
            edits.append(Edit(name, file, part["was"].strip("\n"), part["is"].strip("\n")))
            if not WORD.search(part["is"]):
                fail(f"{name}: the word MUTANT is missing, so it could not be disabled")
        mutants.append(Mutant(
            name, entry["what"], tuple(edits), tuple(entry["fails"]), tuple(entry.get("rows", ())),
            entry.get("expect", "fail"), entry.get("seconds", SECONDS), entry.get("alone", False),
            entry.get("host", ""), entry.get("kernel", MUTANTS),
        ))
    if len({number(mutant.name) for mutant in mutants}) != len(mutants):
        fail("two mutants have the same name")
    return mutants


def mutated(file: str, edits: list[Edit]) -> tuple[str, list[str]]:
    """The file with all its mutants in it, and what does not fit."""
    source = ROOT / file if in_module(file) else PATCHED_TREE / file
    if not source.is_file():
        return "", [f"{file}: there is no such file; scripts/build-kernel makes the patched tree"]
    text, wrong, places = source.read_text(), [], []
    for edit in edits:
        if (times := text.count(edit.was)) == 1:
            places.append((text.index(edit.was), edit))
        else:
            wrong.append(f"{edit.mutant}: its text is {times} times in {file}, not once: {edit.was}")
    places.sort(key=lambda place: place[0])
    for (at, first), (next_at, second) in zip(places, places[1:]):
        if at + len(first.was) > next_at:
            wrong.append(f"{first.mutant} and {second.mutant} replace the same text of {file}")
    for at, edit in reversed(places):
        text = text[:at] + edit.text + text[at + len(edit.was):]
    return text + SWITCH.get(file, ""), wrong


def all_mutated(mutants: list[Mutant]) -> tuple[dict[str, str], list[str]]:
    """Every file that is not as it was, and what does not fit."""
    texts, wrong = {}, []
    edits = [edit for mutant in mutants for edit in mutant.edits]
    for file in sorted({edit.file for edit in edits} | set(SWITCH)):
        texts[file], found = mutated(file, [edit for edit in edits if edit.file == file])
        wrong += found
    return texts, wrong


def write_sources(mutants: list[Mutant]) -> None:
    """The kernel's files that have mutants, and the module with its own: what changes, changes."""
    texts, wrong = all_mutated(mutants)
    if wrong:
        fail("\n  ".join(["the list does not fit:", *wrong]))
    module = [ROOT / "Kbuild", *(ROOT / "rust").rglob("*")]
    module = [path for path in module if path.is_file() and "host" not in path.relative_to(ROOT).parts]
    files = {f"module/{path.relative_to(ROOT)}": path.read_text() for path in module}
    for file, text in texts.items():
        files[f"{'module' if in_module(file) else 'kernel'}/{file}"] = text
    for folder in ("kernel", "module"):
        for path in (OUT / folder).rglob("*"):
            if path.is_file() and str(path.relative_to(OUT)) not in files:
                path.unlink()
    for file, text in files.items():
        path = OUT / file
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
