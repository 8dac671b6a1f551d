#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of QEMU's series and the scripts for it: python3 scripts/test_build_qemu.py"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from memfile import paths

SCRIPTS = Path(__file__).resolve().parent
PATCHES = SCRIPTS.parent / "patches/qemu-10.0"
RELEASE = re.findall(r"^RELEASE=(\S+)", (PATCHES / "BASE").read_text(), re.M)[0]


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
        """A source that is known for a QEMU, but is not the one the series is made for."""
        tree = self.folder / "qemu"
        (tree / "accel/kvm").mkdir(parents=True)
        (tree / "VERSION").write_text("10.0.13\n")
        (tree / "accel/kvm/kvm-all.c").write_text("another QEMU\n")
        return tree

    def own_tree(self) -> Path:
        """The part of the source that the series touches, in a folder of the user's."""
        base = paths.CACHE / f"src/qemu-base-{RELEASE}"
        if not (base / "VERSION").exists():
            self.skipTest(f"the source is not in {base} yet; scripts/fetch-qemu gets it")
        names = {"VERSION"}
        for patch in self.patches():
            names.update(re.findall(r"^(?:--- a|\+\+\+ b)/(\S+)", patch.read_text(), re.M))
        tree = self.folder / "own"
        for name in names:
            if (base / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(base / name, tree / name)
        return tree

    def buildable(self, tree: Path) -> Path:
        """The same with the configure script of a QEMU that is built in no time."""
        for tool in ("ninja", "gcc", "pkg-config"):
            if not shutil.which(tool):
                self.skipTest(f"{tool} is missing; scripts/setup --qemu installs it")
        rule = f"rule copy\n command = cp {shutil.which('true')} $out\n"
        build = rule + f"build qemu-system-x86_64: copy {tree}/VERSION\n"
        (tree / "configure").write_text(f"#!/bin/sh\ncat >build.ninja <<'END'\n{build}END\n")
        (tree / "configure").chmod(0o755)
        return tree

    def named_by_paths(self, name: str, **env: str) -> Path:
        """What the programs in Python take for a path of QEMU."""
        program = f"from memfile import paths; print(paths.{name})"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True,
            env={**os.environ, **env},
        )
        return Path(done.stdout.strip())

    @staticmethod
    def content(tree: Path) -> dict[Path, bytes]:
        return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file()}

    def test_own_tree_gets_the_series_once_and_can_lose_it(self) -> None:
        tree = self.own_tree()
        first, count = self.content(tree), len(self.patches())
        done = run("apply-patches", str(tree), **self.cache)
        self.assertEqual((done.returncode, done.stdout), (0, f"{tree}: {count} patches applied\n"), done.stderr)
        patched = self.content(tree)
        self.assertNotEqual(first, patched)
        done = run("apply-patches", str(tree), **self.cache)
        self.assertEqual((done.returncode, done.stdout), (0, f"{tree}: {count} patches already applied\n"), done.stderr)
        self.assertEqual(patched, self.content(tree))
        done = run("apply-patches", "--reverse", str(tree), **self.cache)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(first, self.content(tree))

    def test_own_tree_that_only_the_last_patch_does_not_fit_is_left_as_it_was(self) -> None:
        tree = self.own_tree()
        last = self.patches()[-1]
        earlier = "".join(patch.read_text() for patch in self.patches()[:-1])
        # A line that it needs as it is, in a file that only it changes there.
        parts = re.split(r"^--- a/(\S+)\n", last.read_text(), flags=re.M)
        needed = [(name, line) for name, part in zip(parts[1::2], parts[2::2])
                  for line in re.findall(r"^[- ](\s*\S.*)\n", part, re.M)]
        for name, line in needed:
            text = (tree / name).read_text()
            if text.count(line) == 1 and line not in earlier:
                (tree / name).write_text(text.replace(line, line + " /* of our own */"))
                break
        else:
            self.fail("the last patch needs no line that is there once")
        before = self.content(tree)
        done = run("build-qemu", QEMU_SRC=str(tree), **self.cache)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
        self.assertIn(last.name, done.stderr)
        self.assertIn("is left as it was", done.stderr)
        self.assertEqual(before, self.content(tree))

    def test_what_is_no_source_of_qemu_is_refused_with_one_sentence(self) -> None:
        kernel = self.folder / "linux"
        (kernel / "mm").mkdir(parents=True)
        for name in ("Kbuild", "mm/shmem.c"):
            (kernel / name).write_text("")
        for tree in (kernel, self.folder, self.folder / "nothing", Path(__file__)):
            done = run("build-qemu", QEMU_SRC=str(tree), **self.cache)
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
            self.assertIn(f"{tree} is not a source tree of QEMU", done.stderr)
        spaced = self.folder / "of mine"
        done = run("build-qemu", QEMU_SRC=str(spaced), **self.cache)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (2, 1), done.stderr)
        self.assertIn('has a " " in it', done.stderr)

    def test_guests_qemu_has_one_name_in_the_test_machine_whatever_its_source(self) -> None:
        tree = self.buildable(self.own_tree())
        done = run("build-qemu", QEMU_SRC=str(tree), **self.cache)
        self.assertEqual(done.returncode, 0, done.stderr)
        own = Path(done.stdout.splitlines()[-1])
        pinned = self.named_by_paths("QEMU", **self.cache)
        self.assertNotEqual(own, pinned)
        self.assertEqual(own, self.named_by_paths("QEMU", QEMU_SRC=str(tree), **self.cache))
        # Where scripts/boot --add puts it, and where the test programs look for it.
        source = (SCRIPTS.parent / "selftests/src/qemu.rs").read_text()
        expected = re.findall(r'qemu: "(/add/[^"]+)"', source)
        self.assertTrue((own / "qemu-system-x86_64").exists())
        for folder in (own, pinned):
            self.assertEqual(expected, [f"/add/{folder.name}/qemu-system-x86_64"])

    def test_test_machine_is_never_emulated_by_a_qemu_of_the_users(self) -> None:
        # The pinned source, fetched and patched.
        tree = self.buildable(self.own_tree())
        base, patched = (self.folder / f"cache/src/{name}-{RELEASE}" for name in ("qemu-base", "qemu"))
        shutil.copytree(tree, base)
        shutil.copytree(tree, patched)
        self.assertEqual(run("apply-patches", str(patched), **self.cache).returncode, 0)
        (patched / ".git").mkdir()
        for env in ({}, {"QEMU_SRC": str(self.folder / "nothing")}):
            done = run("build-qemu", "lab", **env, **self.cache)
            self.assertEqual(done.returncode, 0, done.stderr)
            lab = Path(done.stdout.splitlines()[-1]) / "qemu-system-x86_64"
            self.assertTrue(lab.exists())
            self.assertEqual(lab, self.named_by_paths("QEMU_LAB", **env, **self.cache))

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
