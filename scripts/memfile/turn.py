# SPDX-License-Identifier: GPL-2.0
"""The turn of a checkout to use the builds in the cache.

All builds of the same kind have one place there, whatever checkout they are made from. So one
checkout at a time uses them, with as many runs as it likes; another waits until these have ended.
lib.sh runs this file for the shell scripts: a lock belongs to the open file, which they hand on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys

from memfile import paths, program

OWNER = paths.CACHE / "locks/checkout"


def take() -> None:
    """Waits for the turn of this checkout, which lasts as long as this program."""
    OWNER.parent.mkdir(parents=True, exist_ok=True)
    take_with(os.open(OWNER, os.O_RDWR | os.O_CREAT, 0o666))


def take_with(descriptor: int) -> None:
    """The same, for a descriptor of the file OWNER."""
    mine = f"{paths.ROOT} {os.stat(paths.ROOT).st_ino}\n"
    while True:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        owner = OWNER.read_text()
        if owner == mine:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = owner.rpartition(" ")[0]
            program.say(f"waiting for a run of {other}; with a MEMFILE_CACHE of its own none has to wait")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        forget_programs()
        OWNER.write_text(mine)


def forget_programs() -> None:
    """Has cargo build the crates of this checkout anew.

    It knows them by their place within a checkout and by time stamps, and so would take those of
    another checkout for them. What they depend on stays.
    """
    for known in paths.BUILD.glob("cargo*/**/.fingerprint/memfile*"):
        shutil.rmtree(known, ignore_errors=True)


def main(argv: list[str]) -> int:
    descriptor, sys.argv[0] = argv
    # The turn is that of the script.
    program.die_with_parent()
    take_with(int(descriptor))
    return 0


if __name__ == "__main__":
    program.run(main)
