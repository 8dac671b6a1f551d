#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of QEMU's series and the scripts for it: python3 scripts/test_build_qemu.py"""

import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
PATCHES = SCRIPTS.parent / "patches/qemu-10.0"


def run(script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / script), *args], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


class BuildQemu(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.cache = {"MEMFILE_CACHE": str(self.folder / "cache")}

    def patches(self) -> list[Path]:
        lines = (PATCHES / "series").read_text().splitlines()
        return [PATCHES / line.split()[0] for line in lines if line and not line.startswith("#")]

    def tree(self) -> Path:
        """What is known for a QEMU, but is not the one the series is made for."""
        tree = self.folder / "qemu"
        (tree / "accel/kvm").mkdir(parents=True)
        (tree / "VERSION").write_text("10.0.13\n")
        (tree / "accel/kvm/kvm-all.c").write_text("another QEMU\n")
        return tree

    def test_help_names_both_flavours(self) -> None:
        for script in ("build-qemu", "fetch-qemu"):
            done = run(script, "--help", **self.cache)
            self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(run("build-qemu", "--help", **self.cache).stdout, r"(?s)guest.*lab")

    def test_unknown_arguments_are_refused(self) -> None:
        for script in ("build-qemu", "fetch-qemu"):
            done = run(script, "kvm", **self.cache)
            self.assertEqual((done.returncode, "--help" in done.stderr), (2, True), done.stderr)

    def test_series_names_every_patch_with_a_reason(self) -> None:
        self.assertEqual(self.patches(), sorted(PATCHES.glob("*.patch")))
        for line in (PATCHES / "series").read_text().splitlines():
            self.assertRegex(line, r"^#|^\S+\.patch # \S")

    def test_hashes_are_pinned(self) -> None:
        base = (PATCHES / "BASE").read_text()
        for name in ("SHA256", "DEBIAN_SHA256", "MESON_SHA256"):
            self.assertTrue(re.search(rf"^{name}=[0-9a-f]{{64}}$", base, re.M), name)

    def test_tree_that_does_not_fit_is_left_as_it_was(self) -> None:
        tree = self.tree()
        before = {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}
        done = run("apply-patches", str(tree), **self.cache)
        self.assertEqual(done.returncode, 2)
        self.assertIn("0001-", done.stderr)
        self.assertEqual(before, {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()})


if __name__ == "__main__":
    unittest.main()
