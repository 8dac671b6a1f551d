#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of fuzz: python3 scripts/test_fuzz.py"""

import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.load import script

fuzz = script("fuzz")


class Record(unittest.TestCase):
    TEXT = "== run-1\n0 a\n== wrong-1\n# said\n0 a\n== run-2\n0 b\n1 c\n== run-3\n0 d"

    def test_all_parts_are_there_also_the_last_which_was_cut(self) -> None:
        notes = fuzz.read_record(self.TEXT)
        self.assertEqual([(note.kind, note.number) for note in notes],
            [("run", 1), ("wrong", 1), ("run", 2), ("run", 3)])
        self.assertEqual(notes[1].steps, ["0 a"])
        self.assertEqual(notes[2].steps, ["0 b", "1 c"])

    def test_record_of_a_machine_that_did_not_start_is_empty(self) -> None:
        self.assertEqual(fuzz.read_record(""), [])


class Shorten(unittest.TestCase):
    def test_only_what_is_needed_is_left(self) -> None:
        steps = [str(n) for n in range(40)]
        needed = {"3", "17", "39"}
        self.assertEqual(fuzz.shorten(steps, lambda some: needed <= set(some)), ["3", "17", "39"])

    def test_last_step_stays(self) -> None:
        self.assertEqual(fuzz.shorten(["a"], lambda some: True), ["a"])


class Runs(unittest.TestCase):
    """The handling of the end of a machine, without one."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        kept = mock.patch.object(fuzz, "KEPT", self.folder / "cache/kept")
        kept.start()
        self.addCleanup(kept.stop)

    def run_once(self, record: str, code: int, reason: str, fails: bool = True) -> Any:
        args = fuzz.parse_args(["--log", str(self.folder / "log"), "--seed", "5"])
        run = fuzz.Fuzz(args)

        def boot(command: str, files: list[Path], seconds: float, **_: bool) -> object:
            run.boots += 1
            log = self.folder / f"log/machine-{run.boots}"
            log.mkdir()
            (log / "record").write_text(record)
            return log, code, reason

        with (
            mock.patch.object(run, "boot", boot),
            mock.patch.object(run, "replay", lambda files, times: ["again"] if fails else []),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            run.machine(10, 5)
        return run

    def test_nothing_wrong(self) -> None:
        self.assertEqual(self.run_once("== run-1\n0 a\n", 0, "ok").wrong, [])

    def test_machine_that_is_lost_is_the_last_script_made_shorter(self) -> None:
        run = self.run_once("== run-1\n0 a\n== run-2\n0 b\n0 c\n", 255, "Kernel panic")
        self.assertEqual([path.name for path in run.wrong], ["lost-1"])
        self.assertEqual(run.wrong[0].read_text().splitlines()[0], "# Kernel panic")
        # It fails without any of the other steps: one step stays.
        self.assertEqual(run.wrong[0].read_text().splitlines()[1:], ["0 c"])

    def test_machine_that_is_not_lost_again_keeps_what_was_before(self) -> None:
        run = self.run_once("== run-1\n0 a\n== run-2\n0 b\n", 255, "Kernel panic", fails=False)
        self.assertIn("0 b", run.wrong[0].read_text())
        before = (run.log / "lost-1-before").read_text()
        self.assertEqual([note.number for note in fuzz.read_record(before)], [1, 2])

    def test_wrong_script_is_kept_in_its_shortest_form(self) -> None:
        run = self.run_once("== run-1\n0 a\n0 b\n== wrong-1\n# lost\n0 a\n0 b\n== least-1\n# lost\n0 b\n", 1, "1")
        self.assertEqual(run.wrong[0].read_text(), "# lost\n0 b\n")

    def test_scripts_that_reach_new_code_are_kept_for_the_next_run(self) -> None:
        self.run_once("== run-1\n0 a\n== kept-7\n0 a\n", 0, "ok")
        self.assertEqual(fuzz.KEPT.read_text(), "== kept-5-7\n0 a\n")

    def leaked(self, record: str, needed: set[str]) -> Any:
        """Memory leaks whenever all of these steps run."""
        run = self.run_once(record, 0, "ok")
        run.boots = 1

        def replay(files: list[Path], times: int) -> list[str]:
            there = {line for file in files for line in file.read_text().splitlines()}
            return [f"{fuzz.LEAK}: unreferenced object"] if needed <= there else []

        with mock.patch.object(run, "replay", replay), contextlib.redirect_stdout(io.StringIO()):
            run.leaked("unreferenced object", [note.text for note in fuzz.read_record(record) if note.kind == "run"])
        return run.wrong[0].read_text().splitlines()

    def test_leak_is_the_one_script_that_leaks_made_shorter(self) -> None:
        record = "".join(f"== run-{n}\n0 a{n}\n0 b{n}\n" for n in range(9))
        self.assertEqual(self.leaked(record, {"0 b6"}), ["# unreferenced object", "0 b6"])

    def test_leak_may_take_several_scripts(self) -> None:
        record = "".join(f"== run-{n}\n0 a{n}\n" for n in range(9))
        said = self.leaked(record, {"0 a2", "0 a7"})
        self.assertEqual(said, ["# unreferenced object", "== 1", "0 a2", "== 2", "0 a7"])

    def test_leak_that_does_not_come_again_keeps_all_scripts(self) -> None:
        said = self.leaked("== run-1\n0 a\n== run-2\n0 b\n", {"0 c"})
        self.assertEqual(said[1:], ["# not again by the same scripts", "== 1", "0 a", "== 2", "0 b"])

    def test_machine_that_leaks_is_looked_into(self) -> None:
        with mock.patch.object(fuzz.Fuzz, "leaked") as leaked, mock.patch.object(fuzz, "leak", return_value="object"):
            self.run_once("== run-1\n0 a\n", 0, "ok")
        leaked.assert_called_once_with("object", ["0 a\n"])

    def test_machine_that_does_not_start_is_no_result(self) -> None:
        with self.assertRaises(fuzz.ToolError):
            self.run_once("", 255, "the guest never reached its init")


if __name__ == "__main__":
    unittest.main()
