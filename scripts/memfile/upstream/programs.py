# SPDX-License-Identifier: GPL-2.0
"""The list of the kernel's own selftests, scripts/upstream.toml: what is built and what runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memfile import paths
from memfile.paths import SCRIPTS

LIST = SCRIPTS / "upstream.toml"


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a program."""

    name: str
    # The name of its file in the guest.
    file: str
    args: str = ""
    # Lines for the guest's shell.
    before: str = ""
    quick: bool = False
    limit: int = 60
    # Why only the lines count that say how a test ended; empty if all do.
    results: str = ""
    # Lines that mean nothing.
    ignore: tuple[str, ...] = ()
    # Why it has several results on one kernel, if that is known.
    several: str = ""

    def command(self) -> str:
        shell = "bash " if self.file.endswith(".sh") else ""
        return f"{self.before.strip()}\ncd /tmp/work\n{shell}./{self.file} {self.args}".strip()


@dataclasses.dataclass(frozen=True)
class Expected:
    """A difference that is meant."""

    program: str
    # Every line that one of the kernels has and the other has not must match one of these.
    lines: tuple[str, ...]
    cause: str


class BadList(Exception):
    """The list of programs is not right; says how in one sentence."""


def run_name(program: str) -> str:
    """"x86/a-b" and "a-b.sh" are "a_b"."""
    return program.rpartition("/")[2].removesuffix(".sh").replace("-", "_")


@dataclasses.dataclass
class Programs:
    """The list of selftests."""

    # folder/program, without an ending unless it is a script.
    built: list[str]
    # Likewise; only the patched source has them.
    added: list[str]
    # Of scripts/upstream, with the sources of the kernel that they are made of as well.
    own: dict[str, str]
    sources: dict[str, str]
    scripts: dict[str, str]
    absent: dict[str, str]
    runs: dict[str, Program]
    expected: list[Expected]


def read_list(path: Path = LIST, base: str = paths.BASE) -> Programs:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    own = data.get("bases", {}).get(base, {})
    without = set(own.get("without", "").split())
    listed, added = ([f"{folder}/{name}" for folder, names in data.get(key, {}).items() for name in names.split()]
                     for key in ("folders", "added"))
    if unknown := without - set(listed):
        raise BadList(f"base {base} is without {min(unknown)}, which no folder has")
    built = [name for name in [*listed, *own.get("also", "").split()] if name not in without]
    gone = {run_name(name) for name in without}
    scripts: dict[str, str] = data.get("scripts", {})
    own_programs: dict[str, str] = data.get("own", {})
    programs = [*built, *added, *own_programs, *scripts]
    files = {run_name(name): run_name(name) + (".sh" if name.endswith(".sh") else "") for name in programs}
    if len(files) != len(programs):
        names = [run_name(name) for name in programs]
        raise BadList("two programs have the name " + next(name for name in names if names.count(name) > 1))
    runs = {name: Program(name, file, limit=data["limit"]) for name, file in files.items()}
    known = {field.name for field in dataclasses.fields(Program)} - {"name", "file"} | {"program"}
    for name, table in data.get("run", {}).items():
        if unknown := set(table) - known:
            raise BadList(f"[run.{name}] has a key {min(unknown)!r}")
        settings = dict(table)
        program = settings.pop("program", name)
        if program in gone:
            continue
        if program not in files or (name in files and program != name):
            raise BadList(f"[run.{name}] is of no program")
        settings["ignore"] = tuple(settings.get("ignore", ()))
        runs[name] = Program(name, files[program], **{"limit": data["limit"], **settings})
    expected = [Expected(one["program"], tuple(one["lines"]), one["cause"]) for one in data.get("difference", [])
                if one["program"] not in gone]
    for one in expected:
        if one.program not in runs:
            raise BadList(f"a difference of {one.program}, which does not run")
    sources, absent = data.get("sources", {}), data.get("absent", {})
    return Programs(built, added, own_programs, sources, scripts, absent, runs, expected)


def of_kvm(folder: Path) -> list[str]:
    """KVM's programs for x86. Its Makefile names those of all architectures."""
    makefile = (folder / "kvm/Makefile.kvm").read_text().replace("\\\n", " ")
    lines = re.findall(r"^TEST_GEN_PROGS(?:_EXTENDED)?_(?:COMMON|x86)\s*\+?=([^#\n]*)", makefile, re.M)
    return list(dict.fromkeys(name for line in lines for name in line.split() if not name.startswith("$")))


def fitted(listed: Programs, folder: Path) -> Programs:
    """The list for the folder of any kernel: without what that has not, with all that its KVM has.

    BadList if the folder has no list of KVM's programs.
    """
    try:
        more = [f"kvm/{name}" for name in of_kvm(folder) if f"kvm/{name}" not in {*listed.built, *listed.added}]
    except OSError as error:
        raise BadList(f"{error.filename} cannot be read: {error.strerror}") from error
    names = [run_name(name) for name in more]
    if taken := {name for name in names if name in listed.runs or names.count(name) > 1}:
        raise BadList(f"two programs have the name {min(taken)}")
    runs = {name: Program(name, name) for name in names}
    there = [name for name in listed.built if (folder / name).with_suffix(".c").exists()]
    scripts = {name: beside for name, beside in listed.scripts.items()
               if all((folder / file).exists() for file in (name, *beside.split()))}
    return dataclasses.replace(listed, built=there + more, scripts=scripts, runs={**listed.runs, **runs})


def unnamed(listed: Programs, folder: Path) -> list[str]:
    """Programs of the folders that the list does not name, and those that it names and that are not there."""
    problems = []
    named = {*listed.built, *listed.absent}
    for top in sorted({name.partition("/")[0] for name in listed.built} - {"kvm"}):
        for source in sorted((folder / top).glob("*.c")):
            text = source.read_text(errors="replace")
            if re.search(r"^(int )?main\(|TEST_HARNESS_MAIN", text, re.M) and f"{top}/{source.stem}" not in named:
                problems.append(f"{top}/{source.name} is not in {LIST.name}")
    problems += [f"kvm/{name} is not in {LIST.name}" for name in of_kvm(folder) if f"kvm/{name}" not in named]
    problems += [
        f"{name} of {LIST.name} does not exist" for name in [*listed.built, *listed.scripts]
        if not (folder / name).with_suffix(".sh" if name.endswith(".sh") else ".c").exists()
    ]
    return problems


def build_lines(listed: Programs) -> Iterator[str]:
    """For scripts/build-selftests: "kvm PROGRAM", "script FILE NAME" and "cc NAME SOURCE...".

    The first word ends in "+" if it is of the patched source. A SOURCE begins with "@" if it is of
    scripts/upstream.
    """
    for name in [*listed.built, *listed.added]:
        folder, _, program = name.partition("/")
        mark = "+" if name in listed.added else ""
        if folder == "kvm":
            yield f"kvm{mark} {program}"
            continue
        extra = [part for pattern, parts in listed.sources.items() if fnmatch.fnmatchcase(name, pattern)
                 for part in parts.split()]
        yield " ".join([f"cc{mark}", run_name(name), f"{name}.c", *extra])
    for name, sources in listed.own.items():
        yield f"cc {name} @{name}.c {sources}"
    for name, beside in listed.scripts.items():
        yield f"script {name} {run_name(name)}.sh"
        for other in beside.split():
            yield f"script {other} {Path(other).name}"
