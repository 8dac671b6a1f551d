#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of what scripts/check makes of programs on two kernels: python3 scripts/test_comparison.py"""

import sys
import threading
import unittest

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.check.comparison import Comparison, upstream_wanted
from memfile.check.session import Watch
from memfile.ktap import FAIL, PASS
from memfile.upstream.programs import Program
from memfile.upstream.results import Result

ONE = Program("one", "one")
TWO = Program("two", "two")


def result(*lines: str, code: int = 0, seconds: int = 1) -> Result:
    return Result(code, seconds, list(lines))


class Choice(unittest.TestCase):
    QUICK, SLOW = Program("quick", "quick", quick=True), Program("slow", "slow")

    def wanted(self, *tests: str, everything: bool = False) -> list[str]:
        return [one.name for one in (self.QUICK, self.SLOW) if upstream_wanted(one, list(tests), everything)]

    def test_quick_ones_unless_all_are_asked_for(self) -> None:
        for tests in ((), ("upstream.*",), ("*",), ("punch.*", "upstream*")):
            self.assertEqual(self.wanted(*tests), ["quick"])
            self.assertEqual(self.wanted(*tests, everything=True), ["quick", "slow"])
        self.assertEqual(self.wanted("punch.*", everything=True), [])

    def test_glob_that_says_more_chooses_among_all(self) -> None:
        self.assertEqual(self.wanted("upstream.slow"), ["slow"])
        self.assertEqual(self.wanted("upstream.s*", "upstream.q*"), ["quick", "slow"])


class Comparing(unittest.TestCase):
    """Results come in any order."""

    def setUp(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.comparison = Comparison(
            [ONE, TWO], lambda cases: self.told.extend((case.name, case.status) for case in cases), "u.", ())

    def test_program_is_told_once_both_kernels_have_run_it(self) -> None:
        self.comparison.add(True, ONE, result("ok 1"))
        self.assertEqual(self.told, [])
        self.comparison.add(False, ONE, result("ok 1"))
        self.assertEqual(self.told, [("u.one", PASS)])

    def test_difference_is_told_only_after_more_runs(self) -> None:
        self.comparison.add(False, ONE, result("ok 1"))
        self.comparison.add(True, ONE, result("not ok 1", code=1))
        self.assertEqual((self.told, self.comparison.open()), ([], [ONE]))
        self.comparison.again(ONE, result("ok 1"))
        self.assertEqual(self.comparison.open(), [ONE])
        self.comparison.again(ONE, result("not ok 1", code=1))
        self.assertEqual((self.told, self.comparison.open()), ([("u.one", PASS)], []))

    def test_what_did_not_run_on_one_kernel_fails(self) -> None:
        self.comparison.add(True, ONE, result("ok 1"))
        self.assertEqual(self.comparison.open(), [])
        self.comparison.close()
        self.assertEqual(self.told, [("u.one", FAIL), ("u.two", FAIL)])


class Silence(unittest.TestCase):
    """A machine that says nothing any more is ended."""

    def test_silence_is_noticed(self) -> None:
        ended = threading.Event()
        Watch(0.01, ended.set)
        self.assertTrue(ended.wait(60))

    def test_machine_that_ended_is_not_ended_again(self) -> None:
        ended = threading.Event()
        watch = Watch(3600, ended.set)
        watch.again()
        watch.end()
        assert watch._timer is not None
        self.assertTrue(watch._timer.finished.is_set())
        self.assertIsNone(Watch(0, ended.set)._timer)
        self.assertFalse(ended.is_set())


if __name__ == "__main__":
    unittest.main()
