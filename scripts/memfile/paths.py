# SPDX-License-Identifier: GPL-2.0
"""Where things are, for the programs in Python; lib.sh has the same for the shell scripts.

No other program names a path of the cache, or the folder of the patches.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import subprocess
import sys
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
UPSTREAM = BUILD / f"upstream{OF_BASE}/bin"
CARGO = BUILD / "cargo"
# The files that scripts/mutants writes.
MUTANTS = CACHE / f"mutants{OF_BASE}"
# The answer of the last look whether /dev/kvm is of use.
KVM_PROBE = CACHE / "kvm-probe"


def kernel_version() -> str:
    """The kernel that the patches are made for."""
    found = re.search(r"^KERNEL=(\S+)$", (PATCHES / "BASE").read_text(), re.M)
    return found[1] if found else "unknown"


def series(base: str = BASE) -> list[Path]:
    """The patches in their order."""
    folder = ROOT / "patches" / base
    return [folder / name for name in re.findall(r"^([^#\s]\S*)", (folder / "series").read_text(), re.M)]


def patched_tree() -> Path:
    """The pinned source with the patches."""
    return CACHE / f"src/memfile-{kernel_version()}"


def tree_hash(tree: str | Path) -> str:
    """What the name of a tree of the user's is made of, as in lib.sh."""
    return hashlib.sha256(os.path.realpath(tree).encode()).hexdigest()[:8]


def build_tree(flavour: str) -> Path:
    """Where scripts/build-kernel builds a flavour."""
    source = os.environ.get("KERNEL_SRC")
    return BUILD / (f"{flavour}-{tree_hash(source)}" if source else f"{flavour}{OF_BASE}")


def module(tree: Path) -> Path:
    """Where scripts/build-module leaves memfile.ko for a build tree."""
    name = tree.name if tree.parent == BUILD else tree_hash(tree)
    return BUILD / f"module-{name}/memfile.ko"


def log_folder(what: str = "", with_process: bool = True) -> Path:
    """A new name for the logs of a run."""
    parts = [what, datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), str(os.getpid()) if with_process else ""]
    return LOGS / "-".join(filter(None, parts))


def describe_checkout() -> str:
    """The commit, and whether there is more."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
