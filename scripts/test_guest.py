#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of scripts/guest, with a machine that is a script: python3 scripts/test_guest.py"""

import subprocess
import sys
import unittest

sys.dont_write_bytecode = True

from memfile.surroundings import Surroundings

# Its arguments to a file, the output of memfile-vm and the console to the log folder if there is one.
BOOT = """#!/bin/bash
printf '%s\\n' "$@" >"{folder}/arguments"
while [ $# -gt 0 ] && [ "$1" != -- ]; do
	[ "$1" != --log ] || {{ mkdir -p "$2"; cp "{folder}/out.log" "{folder}/serial.log" "$2"; }}
	shift
done
exit "$(cat "{folder}/code")"
"""


class Guest(Surroundings):
    def setUp(self) -> None:
        super().setUp()
        self.copy = self.copy_of_checkout("checkout")
        for name, text in (
            ("boot", BOOT.format(folder=self.folder)),
            ("build-qemu", "#!/bin/sh\necho /qemu\n"),
            ("fetch-guest", "#!/bin/sh\necho /guest\n"),
        ):
            (self.copy / "scripts" / name).write_text(text)

    def run_guest(self, *args: str, code: int, out: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "code").write_text(str(code))
        (self.folder / "out.log").write_text(out)
        (self.folder / "serial.log").write_text("the machine's console\n")
        return self.run_it(self.copy / "scripts/guest", *args, env={**self.settings, **env}, cwd=self.copy)

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()

    def test_shell_that_does_not_come_up_shows_the_end_of_the_output(self) -> None:
        out = "".join(f"line {n}\n" for n in range(100))
        done = self.run_guest("--shell", code=125, out=out)
        self.assertEqual(done.returncode, 125)
        self.assertIn("\nline 99\n", done.stderr)
        self.assertNotIn("line 9\n", done.stderr)
        self.assertIn("exit code 125; the log is in ", done.stderr)

    def test_shell_whose_machine_died_shows_the_end_of_the_console(self) -> None:
        for code in (124, 255):
            done = self.run_guest("--shell", code=code)
            self.assertEqual(done.returncode, code)
            self.assertIn("the machine's console\n", done.stderr)

    def test_shell_that_ends_with_a_code_of_its_own_says_nothing_more(self) -> None:
        for code in (0, 1, 3):
            done = self.run_guest("--shell", code=code)
            self.assertEqual((done.returncode, done.stderr), (code, ""))

    def test_users_words_reach_the_machine(self) -> None:
        done = self.run_guest(
            code=7, MEMFILE_GUEST_CMD="echo 'a  b'; exit 7", MEMFILE_GUEST_ARGS="-device edu",
            MEMFILE_GUEST_MEM="2G", MEMFILE_GUEST_TIMEOUT="3600",
        )
        self.assertEqual((done.returncode, done.stderr), (7, ""))
        arguments = self.arguments()
        for option, value in (("--timeout", "3600"), ("--size", "2G"), ("--cmd", "echo 'a  b'; exit 7")):
            self.assertEqual(arguments[arguments.index(option) + 1], value)
        self.assertEqual(arguments[-3:], ["--", "-device", "edu"])

    def test_machine_has_a_limit_unless_the_user_names_another(self) -> None:
        for args, limit in (((), "900"), (("--shell",), "86400")):
            self.run_guest(*args, code=0)
            arguments = self.arguments()
            self.assertEqual(arguments[arguments.index("--timeout") + 1], limit)


if __name__ == "__main__":
    unittest.main()
