# SPDX-License-Identifier: GPL-2.0
"""The kernel to boot: a build tree, and the module for it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from memfile import paths


@dataclasses.dataclass
class Kernel:
    """A build tree made by scripts/build-kernel, and its module."""

    flavour: str
    tree: Path

    @property
    def image(self) -> Path:
        return self.tree / "arch/x86/boot/bzImage"

    @property
    def module(self) -> Path:
        return paths.module(self.tree)

    @property
    def release(self) -> str:
        path = self.tree / "include/config/kernel.release"
        return path.read_text().strip() if path.exists() else "unknown"

    @property
    def config_hash(self) -> str:
        path = self.tree / ".config"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "unknown"


def find_kernel(name: str) -> Kernel:
    """A flavour's name, or the path of a build tree."""
    if "/" in name:
        return Kernel("custom", Path(os.path.abspath(name)))
    return Kernel(name, paths.build_tree(name))
