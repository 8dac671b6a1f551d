# SPDX-License-Identifier: GPL-2.0
"""The paths that the programs in Python use; lib.sh has the same for the shell scripts.

No other program names a path of the cache, or the folder of the patches. The rule for the names
of build trees stands here only: lib.sh runs this file for it.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from memfile import environment

ROOT = environment.ROOT
SCRIPTS = ROOT / "scripts"

CACHE = environment.clean()

DEFAULT_BASE = re.sub(r"^#.*\n", "", (ROOT / "patches/DEFAULT").read_text(), flags=re.M).strip()


def _base() -> tuple[str, str]:
    """The kernel that everything is made for, and what the names of its builds end with; as in lib.sh."""
    base = os.environ.get("BASE", DEFAULT_BASE)
    if not re.fullmatch(r"[0-9]+\.[0-9]+", base) or not (ROOT / "patches" / base / "BASE").exists():
        known = " ".join(sorted(path.parent.name for path in (ROOT / "patches").glob("[0-9]*/BASE")))
        print(f"{Path(sys.argv[0]).name}: there are no patches for BASE={base}, but for: {known}", file=sys.stderr)
        sys.exit(2)
    return base, "" if base == DEFAULT_BASE else f"-{base}"


BASE, OF_BASE = _base()
PATCHES = ROOT / "patches" / BASE
BUILD = CACHE / "build"
LOGS = CACHE / "logs"
# The guest's programs, the kernel's own selftests, and what cargo builds for the host.
PROGRAMS = BUILD / "selftests/bin"
TESTS = PROGRAMS / "memfile-tests"
PLOT = BUILD / "selftests/memfile-plot"
FUZZER = BUILD / "fuzz/memfile-fuzz"
# The scripts that the fuzzer has kept.
KEPT = CACHE / "fuzz/kept"
# The kernel of a real guest.
GUEST = BUILD / "guest"
CARGO = BUILD / "cargo"
# The files that scripts/mutants writes.
MUTANTS = CACHE / f"mutants{OF_BASE}"
# The result of the last test boot with /dev/kvm.
KVM_PROBE = CACHE / "kvm-probe"


# The lines of a patch that name a file.
TOUCHED = re.compile(r"^(?:--- a|\+\+\+ b)/([^\t\n]*)|^rename (?:from|to) (.*)", re.M)


def kernel_version() -> str:
    """The kernel that the patches are made for."""
    found = re.search(r"^KERNEL=(\S+)$", (PATCHES / "BASE").read_text(), re.M)
    return found[1] if found else "unknown"


def series(base: str = BASE) -> list[Path]:
    """The patches in their order."""
    folder = ROOT / "patches" / base
    return [folder / name for name in re.findall(r"^([^#\s]\S*)", (folder / "series").read_text(), re.M)]


def touched(patches: Iterable[Path]) -> list[str]:
    """The files that the patches change, add or remove."""
    found = (TOUCHED.findall(patch.read_text(errors="replace")) for patch in patches)
    return sorted({name for pairs in found for pair in pairs for name in pair if name})


def patched_tree() -> Path:
    """The pinned source with the patches."""
    return CACHE / f"src/memfile-{kernel_version()}"


def tree_hash(tree: str | Path) -> str:
    """The part of a name that stands for a tree of the user's."""
    return hashlib.sha256(os.path.realpath(tree).encode()).hexdigest()[:8]


def tree_name(flavour: str, source: str | None = None) -> str:
    """The name of the build tree of a flavour: of a source of the user's, of none (""), or of the base."""
    if source is None:
        return f"{flavour}{OF_BASE}"
    return f"{flavour}-{tree_hash(source)}" if source else flavour


def qemu_folder(flavour: str, source: str = "") -> Path:
    """Where scripts/build-qemu puts a flavour; /add in the test machine has it by the last name."""
    folder = BUILD / tree_name(flavour, source)
    return folder / flavour if source else folder


# QEMU for guests in the test machine, of the user's source if there is one; and QEMU for that machine.
QEMU = qemu_folder("qemu", os.environ.get("QEMU_SRC", ""))
QEMU_LAB = qemu_folder("qemu-tcg") / "qemu-system-x86_64"


def build_tree(flavour: str) -> Path:
    """The folder in which scripts/build-kernel builds a flavour."""
    return BUILD / tree_name(flavour, os.environ.get("KERNEL_SRC") or None)


# The kernel's own selftests.
UPSTREAM = build_tree("upstream") / "bin"


def module_name(tree: Path) -> str:
    """The name of a build tree in the name of the folder of its module."""
    return tree.name if tree.parent == BUILD else tree_hash(tree)


def module(tree: Path) -> Path:
    """The file that scripts/build-module makes for a build tree: memfile.ko."""
    return BUILD / f"module-{module_name(tree)}/memfile.ko"


def log_folder(what: str = "") -> Path:
    """A new name for the logs of a run."""
    parts = [what, datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), str(os.getpid())]
    return LOGS / "-".join(filter(None, parts))


def read_text(path: Path) -> str:
    """What is in the file; nothing if there is none."""
    return path.read_text(errors="replace") if path.exists() else ""


def describe_checkout() -> str:
    """The commit, and whether there is more."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


if __name__ == "__main__":
    if sys.argv[1] == "--module":
        print(module_name(Path(sys.argv[2])), end="")
    elif sys.argv[1] == "--qemu":
        print(qemu_folder(*sys.argv[2:]), end="")
    else:
        print(tree_name(*sys.argv[1:]), end="")
