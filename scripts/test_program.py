#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of how programs begin and end, and whose turn it is: python3 scripts/test_program.py"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths, program, turn
from memfile.check import controls, guest, host
from memfile.check.kernel_log import SPLAT
from memfile.check.session import Check
from memfile.ktap import Case
from memfile.upstream.guest import run_all
from memfile.upstream.programs import Program
from memfile.upstream.results import Result

# What a shell in the background has ignored cannot be trapped.
DEFAULT = ["env", "--default-signal=HUP,INT,TERM"]


class Scratch(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()

    def start(self, *line: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*DEFAULT, *line], env={**os.environ, "MEMFILE_CACHE": str(self.folder / "cache"), **variables},
            cwd=paths.SCRIPTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        self.addCleanup(process.stdout.close)
        return process

    def python(self, text: str) -> subprocess.Popen[str]:
        return self.start(sys.executable, "-EBc", f"import os, subprocess, sys\nfrom memfile import program\n{text}")

    def number(self, name: str) -> int:
        """The process that has written its number into this file."""
        path = self.folder / name
        while not path.exists() or not path.read_text().endswith("\n"):
            time.sleep(0.01)
        return int(path.read_text())

    def expect_gone(self, process: int) -> None:
        """It ends, or has ended and waits for its parent."""
        status = Path(f"/proc/{process}/status")
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if "State:\tZ" in status.read_text():
                    return
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(0.01)
        self.fail(f"process {process} is still there")

    def child(self, name: str) -> str:
        """A command of the shell that says its number, and does not end."""
        return f"echo $$ >{self.folder}/{name}; while :; do sleep 0.1; done"


class Ends(Scratch):
    def ends(self, text: str, code: int, output: str) -> None:
        process = self.python(f"def main(argv):\n    {text}\nsys.argv = ['scripts/some']\nprogram.run(main)")
        said, _ = process.communicate()
        self.assertEqual((process.returncode, said), (code, output))

    def test_code_is_that_of_the_program(self) -> None:
        self.ends("return 7", 7, "")

    def test_what_the_user_has_to_mend_is_one_sentence_and_2(self) -> None:
        self.ends("raise program.ToolError('there is no kernel')", 2, "some: there is no kernel\n")
        self.ends("open('/nonexistent/x')", 2, "some: /nonexistent/x: No such file or directory\n")
        self.ends("program.fail('there is no kernel')", 2, "some: there is no kernel\n")

    def test_signal_ends_the_children_of_all_threads_as_well(self) -> None:
        for number in program.SIGNALS:
            process = self.python(f"""
import concurrent.futures
def wait(name):
    program.refuse_if_ending()
    command = '{self.child("NAME")}'.replace('NAME', name)
    program.refuse_if_stopped(subprocess.run(['sh', '-c', command]).returncode)
    print('it goes on', flush=True)
def main(argv):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        list(pool.map(wait, ['first', 'second']))
    return 0
program.run(main)""")
            first = self.number("first")
            process.send_signal(number)
            said, _ = process.communicate(timeout=20)
            self.assertEqual((process.returncode, said), (128 + number, ""))
            self.expect_gone(first)
            # A child that could begin is one of a program that has ended.
            with contextlib.suppress(FileNotFoundError):
                self.expect_gone(int((self.folder / "second").read_text() or -1))
                (self.folder / "second").unlink()
            (self.folder / "first").unlink()

    def test_program_dies_with_its_parent_if_it_is_told_to(self) -> None:
        (self.folder / "child.py").write_text(f"""
import sys
sys.path.insert(0, {str(paths.SCRIPTS)!r})
from memfile import program
import os, time
def main(argv):
    program.die_with_parent()
    open({str(self.folder / "child")!r}, "w").write(str(os.getpid()) + "\\n")
    time.sleep(1000)
program.run(main)
""")
        parent = self.python(f"subprocess.run([sys.executable, '-EB', '{self.folder}/child.py'])")
        child = self.number("child")
        parent.kill()
        self.expect_gone(child)


class Logged(Scratch):
    """What lib.sh runs with its output in a file."""

    def setUp(self) -> None:
        super().setUp()
        self.script = self.folder / "some"
        self.script.write_text(f"""#!/bin/bash -p
. {paths.SCRIPTS}/lib.sh
lock some
command() {{ bash -c '{self.child("inner")}' & {self.child("outer").replace("$$", "$BASHPID")}; }}
logged {self.folder}/log "a title" command || exit 2
""")
        self.script.chmod(0o755)

    def ended_by(self, process: subprocess.Popen[str], number: int) -> None:
        """A signal for the process ends the command as well, all of it."""
        inner, outer = self.number("inner"), self.number("outer")
        process.send_signal(number)
        said, _ = process.communicate(timeout=20)
        self.assertEqual((process.returncode, said), (128 + number, ""))
        self.expect_gone(inner)
        self.expect_gone(outer)
        # What looks whether the command has ended sees it soon: then nobody holds the lock.
        subprocess.run(["flock", "-w", "20", str(self.folder / "cache/locks/some"), "true"], check=True)
        for name in ("inner", "outer"):
            (self.folder / name).unlink()

    def test_signal_ends_all_that_the_command_has_started(self) -> None:
        for number in program.SIGNALS:
            self.ended_by(self.start(str(self.script)), number)

    def test_signal_for_the_program_that_runs_the_script_ends_it_as_well(self) -> None:
        for number in program.SIGNALS:
            text = f"program.run(lambda argv: subprocess.run(['{self.script}']).returncode)"
            self.ended_by(self.python(text), number)

    def test_cache_that_cannot_be_written_is_named(self) -> None:
        process = self.start("bash", "-pc", ". ./lib.sh; lock some", "some", MEMFILE_CACHE="/proc/nothing")
        said, _ = process.communicate()
        self.assertEqual(process.returncode, 2)
        self.assertIn("the cache /proc/nothing cannot be written: name another with MEMFILE_CACHE", said)


class Turns(Scratch):
    """One checkout at a time uses what is built."""

    def setUp(self) -> None:
        super().setUp()
        with contextlib.ExitStack() as patches:
            for what, name, value in (
                (turn, "OWNER", self.folder / "locks/checkout"), (paths, "BUILD", self.folder / "build"),
                (sys, "argv", ["some"]),
            ):
                patches.enter_context(unittest.mock.patch.object(what, name, value))
            self.addCleanup(patches.pop_all().close)
        (self.folder / "locks").mkdir()
        self.known = self.folder / "build/cargo/x86/release/.fingerprint/memfile-selftests-1234"
        self.others = self.known.parent / "libc-1234"

    def build(self) -> None:
        for path in (self.known, self.others):
            path.mkdir(parents=True, exist_ok=True)

    def take(self, checkout: str) -> int:
        """The turn of a checkout; a descriptor that holds it."""
        root = self.folder / checkout
        root.mkdir(exist_ok=True)
        descriptor = os.open(turn.OWNER, os.O_RDWR | os.O_CREAT, 0o666)
        with unittest.mock.patch.object(paths, "ROOT", root):
            turn.take_with(descriptor)
        return descriptor

    def test_runs_of_one_checkout_share_their_turn(self) -> None:
        first, second = self.take("a"), self.take("a")
        os.close(first)
        os.close(second)

    def test_programs_of_another_checkout_are_built_anew(self) -> None:
        os.close(self.take("a"))
        self.build()
        os.close(self.take("a"))
        self.assertTrue(self.known.exists())
        os.close(self.take("b"))
        self.assertFalse(self.known.exists())
        self.assertTrue(self.others.exists())

    def test_programs_of_a_new_checkout_at_the_same_place_are_built_anew(self) -> None:
        os.close(self.take("a"))
        self.build()
        (self.folder / "a").rename(self.folder / "old")
        os.close(self.take("a"))
        self.assertFalse(self.known.exists())

    def test_who_waits_ends_without_a_word_and_leaves_nobody_waiting(self) -> None:
        # The turn of another checkout.
        (self.folder / "cache/locks").mkdir(parents=True)
        owner = (self.folder / "cache/locks/checkout").open("w+")
        self.addCleanup(owner.close)
        owner.write("/elsewhere 1\n")
        owner.flush()
        fcntl.flock(owner, fcntl.LOCK_SH)
        for number in program.SIGNALS:
            process = self.start("bash", "-pc", ". ./lib.sh; take_turn", "some")
            assert process.stdout is not None
            self.assertIn("waiting for a run of /elsewhere", process.stdout.readline())
            [waits] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            # As from a terminal, or a kill of the script alone.
            os.kill(process.pid if number == signal.SIGTERM else int(waits), number)
            said, _ = process.communicate(timeout=20)
            self.assertNotIn("Traceback", said)
            self.expect_gone(int(waits))

    def test_another_checkout_waits_until_the_last_run_has_ended(self) -> None:
        first, second = self.take("a"), self.take("a")
        said, taken = io.StringIO(), threading.Event()

        def other() -> None:
            descriptor = self.take("b")
            taken.set()
            os.close(descriptor)

        with contextlib.redirect_stderr(said):
            waiting = threading.Thread(target=other)
            waiting.start()
            while "\n" not in said.getvalue():
                time.sleep(0.01)
            # What such a run starts still gets its turn.
            os.close(self.take("a"))
            os.close(first)
            self.assertFalse(taken.is_set())
            os.close(second)
            waiting.join()
        self.assertTrue(taken.is_set())
        self.assertIn(f"waiting for a run of {self.folder}/a; ", said.getvalue())


class Boots(Scratch):
    """A machine that a signal has ended is not one that has stopped."""

    def setUp(self) -> None:
        super().setUp()
        (self.folder / "boot").write_text(f"#!/bin/sh\necho boot >>{self.folder}/boots\nexit $(cat {self.folder}/code)\n")
        (self.folder / "boot").chmod(0o755)
        session = unittest.mock.patch("memfile.check.session.SCRIPTS", self.folder)
        session.start()
        self.addCleanup(session.stop)
        arguments = argparse.Namespace(kernel="plain", log=self.folder / "log", tests=[], verbose=False, slow=1)
        self.check = Check(arguments)

    def boots(self, code: int) -> int:
        (self.folder / "code").write_text(str(code))
        (self.folder / "boots").write_text("")
        with contextlib.redirect_stdout(io.StringIO()), unittest.mock.patch.object(
                guest, "guest_cases", return_value=["qemu.some"]):
            guest.guest_boot(self.check, "qemu", ["qemu"], ["--emulator", "x"], False)
        return len((self.folder / "boots").read_text().split())

    def test_machine_that_was_lost_has_a_second_one(self) -> None:
        self.assertEqual(self.boots(program.EXIT_DIED), 2)

    def test_signal_boots_no_second_one(self) -> None:
        for code in program.EXIT_STOPPED:
            with self.assertRaises(program.Stopped) as stopped:
                self.boots(code)
            self.assertEqual(stopped.exception.code, code)
            self.assertEqual((self.folder / "boots").read_text().split(), ["boot"])

    def test_boot_that_fails_by_itself_has_no_second_one(self) -> None:
        self.assertEqual(self.boots(program.EXIT_TOOL), 1)

    def test_signal_ends_the_tests_on_the_host(self) -> None:
        begun = []

        def command(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
            begun.append(1)
            return subprocess.CompletedProcess([], -signal.SIGTERM, "")

        with unittest.mock.patch("subprocess.run", command):
            with self.assertRaises(program.Stopped) as stopped:
                host.host_tests(self.check)
        self.assertEqual((stopped.exception.code, begun, self.check.outcome.cases), (143, [1], []))
        with unittest.mock.patch.object(program, "_ending", [130]):
            for job in (lambda: host.host_tests(self.check), *controls.controls(self.check, controls.CONTROLS)):
                with self.assertRaises(program.Stopped):
                    job()

    def test_signal_ends_the_programs_that_are_compared(self) -> None:
        (self.folder / "code").write_text("130")
        seen: list[Case] = []

        def boot(name: str, programs: list[Program], script: str, on_line: object) -> None:
            self.check.boot(name, script, [], 1)

        def each(one: Program, result: Result) -> None:
            seen.append(Case(one.name, "", str(result.code)))

        programs = [unittest.mock.Mock(spec=Program, limit=1) for _ in range(3)]
        for one in programs:
            one.name = "some"
            one.command.return_value = "true"
        with self.assertRaises(program.Stopped):
            run_all("upstream", list(programs), boot, SPLAT, each)
        self.assertEqual((seen, (self.folder / "boots").read_text().split()), ([], ["boot"]))


if __name__ == "__main__":
    unittest.main()
