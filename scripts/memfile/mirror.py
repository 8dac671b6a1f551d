# SPDX-License-Identifier: GPL-2.0
"""A source tree of links to the files of another, for a kernel that differs from it in a few: patches.sh runs this.

Only links are ever made or removed through their own names, and folders are real ones: so nothing is
written to the other tree. A mirror is renewed in place, because a build may be reading it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path, PurePath

from memfile import paths

# What put_files of patches.sh leaves if it is interrupted, and the name of a link before it has its place.
NEW = ".memfile-new"


def clear(path: str) -> None:
    """Removes what is there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


class Mirror:
    """The tree `to`, of links to that of `own`, without the files that are touched: the caller writes these."""

    def __init__(self, own: str, to: str, touched: Iterable[str], cache: str = "") -> None:
        self.own, self.to, self.cache = own, to, cache
        self.touched = set(touched)
        self.above = {str(folder) for name in self.touched for folder in PurePath(name).parents}

    def left_out(self, name: str) -> bool:
        """Git's, what was built in the tree, and the cache, which has the mirror."""
        at_top = "/" not in name and (name in (".git", ".memfile-files") or name.startswith("build-"))
        return at_top or name.endswith(NEW) or os.path.join(self.own, name) == self.cache

    def renew(self, folder: str = "") -> None:
        """Makes the mirror of a folder what the folder is now."""
        to = os.path.join(self.to, folder)
        if os.path.lexists(to) and (os.path.islink(to) or not os.path.isdir(to)):
            clear(to)
        os.makedirs(to, exist_ok=True)
        have = set()
        with os.scandir(os.path.join(self.own, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if self.left_out(name):
                    continue
                have.add(entry.name)
                # A touched file below a link to a folder would be written to where the link leads.
                if entry.is_dir(follow_symlinks=False) or (name in self.above and entry.is_dir()):
                    self.renew(name)
                elif name not in self.touched:
                    self.link(name)
        self.prune(folder, have)

    def link(self, name: str) -> None:
        source, link = os.path.join(self.own, name), os.path.join(self.to, name)
        if os.path.islink(link) and os.readlink(link) == source:
            return
        if os.path.isdir(link) and not os.path.islink(link):
            clear(link)
        if os.path.lexists(link + NEW):
            clear(link + NEW)
        os.symlink(source, link + NEW)
        os.replace(link + NEW, link)

    def prune(self, folder: str, have: set[str]) -> None:
        """Removes what the other tree has no more, and all but the copies of what is touched."""
        with os.scandir(os.path.join(self.to, folder)) as entries:
            for entry in list(entries):
                name = os.path.join(folder, entry.name)
                is_folder = entry.is_dir(follow_symlinks=False)
                if name in self.touched:
                    if not entry.is_file(follow_symlinks=False):
                        clear(entry.path)
                elif entry.name in have:
                    continue
                elif is_folder and name in self.above:
                    self.prune(name, set())
                    if not os.listdir(entry.path):
                        os.rmdir(entry.path)
                else:
                    clear(entry.path)


def main(own: str, to: str) -> None:
    # One path a line; a name is any bytes.
    touched = [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines()]
    Mirror(own, to, touched, os.path.realpath(paths.CACHE)).renew()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        print(f"{Path(sys.argv[1]).name}: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
