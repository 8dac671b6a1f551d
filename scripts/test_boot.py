#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of boot: python3 scripts/test_boot.py"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths
from memfile.boot import accelerator
from memfile.boot.initramfs import Root
from memfile.boot.kernel import Kernel


class Accelerator(unittest.TestCase):
    ARGS = argparse.Namespace(icount=False, accel="auto")

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache = Path(folder.name)
        for patch in (
            mock.patch.object(accelerator, "kvm_answers", lambda: None),
            mock.patch.object(paths, "KVM_PROBE", self.cache / "kvm-probe"),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def choose(self) -> str:
        return accelerator.choose_accelerator(self.ARGS, Kernel("plain", self.cache))[0]

    def test_boots_at_the_same_time_probe_once(self) -> None:
        first_probes, others_came = threading.Event(), threading.Event()
        probes, answers = [], []

        def probe(*_: object) -> bool:
            probes.append(threading.current_thread())
            first_probes.set()
            others_came.wait(10)
            return True

        with mock.patch.object(accelerator, "probe_kvm", probe):
            threads = [threading.Thread(target=lambda: answers.append(self.choose())) for _ in range(3)]
            threads[0].start()
            self.assertTrue(first_probes.wait(10))
            for thread in threads[1:]:
                thread.start()
            others_came.set()
            for thread in threads:
                thread.join(10)
        self.assertEqual((len(probes), answers), (1, ["kvm"] * 3))

    def test_answer_of_an_earlier_boot_of_the_host_does_not_count(self) -> None:
        (self.cache / "kvm-probe").write_text("another-boot yes\n")
        with mock.patch.object(accelerator, "probe_kvm", lambda *_: False):
            self.assertEqual(self.choose(), "tcg")
        with mock.patch.object(accelerator, "probe_kvm", side_effect=AssertionError):
            self.assertEqual(self.choose(), "tcg")


class Initramfs(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "root").mkdir()
        self.root = Root(self.folder / "root")

    def unpacked(self) -> dict[str, tuple[str, str, str]]:
        """The mode, the owner and the content of each entry."""
        archive, target = self.folder / "archive", self.folder / "unpacked"
        self.root.pack(archive)
        shown = subprocess.run(["cpio", "-itvn", "--quiet"], input=archive.read_bytes(), capture_output=True, check=True)
        target.mkdir()
        subprocess.run(["cpio", "-id", "--quiet"], input=archive.read_bytes(), cwd=target, check=True)
        found = {}
        for line in shown.stdout.decode().splitlines():
            mode, _, user, group, *_, name = line.split(maxsplit=8)
            path = target / name
            found[name] = (mode, f"{user}:{group}", path.read_text() if path.is_file() else "")
        return found

    def test_files_have_their_content_and_are_roots(self) -> None:
        program, data = self.folder / "program", self.folder / "a name"
        program.write_text("p")
        program.chmod(0o700)
        # As cargo leaves its programs: with a second name.
        os.link(program, self.folder / "other")
        data.write_text("d")
        data.chmod(0o600)
        self.root.text("init", "i\n")
        self.root.file("bin/program", program)
        self.root.file("add/program", program)
        self.root.tree("add/a name", data)
        self.assertEqual(self.unpacked(), {
            "add": ("drwxr-xr-x", "0:0", ""), "add/a name": ("-rw-r--r--", "0:0", "d"),
            "add/program": ("-rwxr-xr-x", "0:0", "p"), "bin": ("drwxr-xr-x", "0:0", ""),
            "bin/program": ("-rwxr-xr-x", "0:0", "p"), "init": ("-rwxr-xr-x", "0:0", "i\n"),
        })

    def test_file_that_has_two_names_is_packed_under_each(self) -> None:
        program = self.folder / "program"
        program.write_text("p")
        program.chmod(0o755)
        os.link(program, self.folder / "other")
        self.root.file("bin/program", program)
        self.root.file("add/program", program)
        self.root.file("add/program", program)
        found = self.unpacked()
        self.assertEqual([found[name][2] for name in ("bin/program", "add/program")], ["p", "p"])


if __name__ == "__main__":
    unittest.main()
