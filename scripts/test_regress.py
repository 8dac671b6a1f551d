#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of regress: python3 scripts/test_regress.py"""

import contextlib
import io
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.load import script

regress = script("regress")

# The bytes that tell one ELF file from another.
ELF64 = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00"
ELF32 = b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x02\x00\x03\x00"
# A test of kvm-unit-tests.
FLAT = ELF32 + bytes(4096 - len(ELF32)) + (0x1BADB002).to_bytes(4, "little")


class Programs(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def file(self, name: str, content: bytes = ELF64, mode: int = 0o755) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
        return path

    def test_what_cannot_run_is_refused_with_the_reason(self) -> None:
        for content, mode, why in (
            (ELF64, 0o755, ""), (b"#!/bin/sh\n", 0o755, ""), (b"#! /usr/bin/env dash\n", 0o755, ""),
            (ELF64, 0o644, "is not executable"), (ELF32, 0o755, "is not a program for x86-64"),
            (b"#!/usr/bin/python3 -E\n", 0o755, "wants python3, which the guest does not have"),
            (b"text", 0o755, "is neither a program nor a script"), (b"", 0o755, "is neither a program nor a script"),
        ):
            with self.subTest(why or content):
                self.assertEqual(regress.why_unfit(self.file("a", content, mode)), why)

    def test_script_of_bash_needs_bash_static(self) -> None:
        path = self.file("a", b"#!/bin/bash\n")
        with mock.patch.object(regress, "BASH", self.folder / "no"):
            self.assertEqual(regress.why_unfit(path), "wants bash: install bash-static")
        with mock.patch.object(regress, "BASH", path):
            self.assertEqual(regress.why_unfit(path), "")

    def test_folder_is_all_its_programs_with_what_lies_beside_them(self) -> None:
        one, other = self.file("d/one"), self.file("d/e/other")
        data = self.file("d/data", b"x", 0o644)
        found = regress.find([self.folder / "d", one])
        self.assertEqual([item.path for item in found], [other, one])
        self.assertEqual(set(found[1].beside), {one, data})

    def test_what_a_folder_has_that_cannot_run_is_named(self) -> None:
        self.file("d/one"), self.file("d/old", ELF32)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found = regress.find([self.folder / "d"])
        self.assertEqual([item.path.name for item in found], ["one"])
        self.assertIn("d/old is left out: it is not a program for x86-64", said.getvalue())

    def test_kernel_in_a_folder_is_not_left_out_for_want_of_qemu(self) -> None:
        self.file("d/one"), self.file("d/a.flat", FLAT, 0o644)
        with mock.patch.object(regress.paths, "QEMU", self.folder / "no"), self.assertRaises(regress.ToolError) as unfit:
            regress.find([self.folder / "d"])
        self.assertIn("a.flat wants QEMU", str(unfit.exception))

    def test_what_is_not_there_is_said_in_a_sentence(self) -> None:
        empty = self.folder / "empty"
        empty.mkdir()
        for path, words in (
            (self.folder / "no", "does not exist"), (empty, "no program"), (self.file("x", b"t"), "neither"),
        ):
            with self.subTest(words), self.assertRaisesRegex(regress.ToolError, words):
                regress.find([path])

    def test_programs_of_the_same_name_are_told_apart_by_their_folders(self) -> None:
        names = regress.names_of(regress.find([self.file("a/t"), self.file("b/t"), self.file("b/u v")]))
        self.assertEqual(list(names), ["a/t", "b/t", "b/u_v"])
        names = regress.names_of(regress.find([self.file("a/t"), self.file("b/u v")]))
        self.assertEqual(list(names), ["t", "u_v"])

    def test_guest_gets_each_program_by_its_own_name(self) -> None:
        named = regress.names_of(regress.find([self.file("a/t"), self.file("b/u v")]))
        regress.stage(named, self.folder / "staged")
        self.assertEqual((self.folder / "staged/p1/u v").read_bytes(), ELF64)
        programs = regress.programs_of(named, "-x 'y'", 7)
        self.assertEqual([program.limit for program in programs], [7, 7])
        self.assertIn("./'u v' -x 'y'\n", programs[1].command() + "\n")

    def test_kernel_for_a_guest_runs_in_qemu(self) -> None:
        path, other = self.file("d/apic.flat", FLAT, 0o644), self.file("d/t")
        with mock.patch.object(regress.paths, "QEMU", self.folder / "qemu"):
            self.assertIn("build-qemu", regress.why_unfit(path))
            self.file("qemu/qemu-system-x86_64")
            named = regress.names_of(regress.find([path, other]))
        regress.stage(named, self.folder / "staged")
        self.assertTrue((self.folder / "staged/p0/run-in-qemu").exists())
        self.assertFalse((self.folder / "staged/p1/run-in-qemu").exists())
        first, second = regress.programs_of(named, "-smp 2", 7)
        self.assertIn("./run-in-qemu apic.flat -smp 2\n", first.command() + "\n")
        self.assertIn("./t -smp 2\n", second.command() + "\n")
        self.assertEqual(regress.libraries(named), [other])

    def test_exit_code_of_qemu_is_the_result_of_the_guest(self) -> None:
        for command, meaning in (
            ("exit 1", 0), ("exit 155", 4), ("exit 3", 1), ("exit 5", 2), ("exit 0", 1), ("exit 124", 1),
            ("echo no machine >&2; exit 1", 1),
        ):
            script = regress.IN_QEMU.replace("/add/qemu/qemu-system-x86_64", f"sh -c '{command}' ")
            with self.subTest(command):
                run = subprocess.run(
                    ["sh", "-c", script], stdout=subprocess.DEVNULL, cwd=self.folder, check=False)
                self.assertEqual(run.returncode, meaning)

    def test_usage_is_refused_with_exit_code_2(self) -> None:
        for argv in ([], ["--limit", "0", "x"], ["--kernel", "base", "x"]):
            with self.subTest(argv), contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as end:
                regress.parse_args(argv)
            self.assertEqual(end.exception.code, 2)

    def test_kernel_that_is_not_built_is_named(self) -> None:
        with mock.patch.dict("os.environ", {"KERNEL_SRC": "/x"}), self.assertRaisesRegex(regress.ToolError, "build-kernel"):
            regress.main([str(self.file("a"))])


if __name__ == "__main__":
    unittest.main()
