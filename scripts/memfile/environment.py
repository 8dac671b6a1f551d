# SPDX-License-Identifier: GPL-2.0
"""The environment that the scripts in Python work in, and hand on: as lib.sh makes it for the others."""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Characters that are special to make, to the shells that it starts, or to QEMU.
SPECIAL = re.compile(r"""[\s:,;#%$&'"`\\()\[\]{}*?<>|=!]""")


def passing() -> list[str]:
    """The names and patterns that come through."""
    lines = (ROOT / "scripts/environment").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def default_cache(variables: Mapping[str, str], shared: Path = Path("/var/cache/memfile")) -> str:
    """The folder for all users if this one can write there, else one of this user's own, as in lib.sh."""
    own = variables.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(own):
        own = os.path.join(variables.get("HOME") or "/nonexistent", ".cache")
    if os.access(shared, os.W_OK) or not shared.exists() and os.access(shared.parent, os.W_OK):
        return str(shared)
    return os.path.join(own, "memfile")


def clean(variables: MutableMapping[str, str] = os.environ) -> Path:
    """Leaves of the environment what scripts/environment names. Gives the folder of the cache."""
    patterns = passing()
    for name, value in list(variables.items()):
        if not value or not any(fnmatchcase(name, pattern) for pattern in patterns):
            del variables[name]
    folder = variables.get("TMPDIR", "/tmp")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        variables.pop("TMPDIR", None)
    # Tools speak English, and UTF-8.
    variables["LC_ALL"] = "C.UTF-8"
    # Not all work in the folder that it may be relative to.
    variables["MEMFILE_CACHE"] = os.path.abspath(variables.get("MEMFILE_CACHE") or default_cache(variables))
    return Path(variables["MEMFILE_CACHE"])


def refuse_special_paths(script: str) -> None:
    """Ends this process if the checkout or the cache lies where nothing can be built."""
    for path, what, remedy in (
        (str(ROOT), "the checkout", "move it"),
        (os.environ["MEMFILE_CACHE"], "the cache", "name another with MEMFILE_CACHE"),
    ):
        if found := SPECIAL.search(path):
            problem = f'has a "{found[0]}" in it, which make or QEMU takes apart'
            print(f'{script}: the path of {what}, "{path}", {problem}: {remedy}', file=sys.stderr)
            sys.exit(2)
