#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of what scripts/check makes of programs on two kernels: python3 scripts/test_comparison.py"""

import contextlib
import io
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.check.comparison import Comparison, Upstream, may_choose, upstream_wanted
from memfile.check.session import Watch
from memfile.ktap import FAIL, PASS, SKIP, Case
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


    def test_glob_that_can_fit_no_program_is_told_from_one_that_can(self) -> None:
        for test in ("*", "upstream.*", "up*", "?pstream.x", "[u]p*", "upstream.slow", "upstream.s*"):
            self.assertTrue(may_choose(test), test)
        for test in ("punch.*", "upstream", "up", "upstreams.*", "variant_*"):
            self.assertFalse(may_choose(test), test)


class TreeOfTheUser(unittest.TestCase):
    """KERNEL_SRC has its own programs."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.kvm = self.folder / "tools/testing/selftests/kvm"
        for patch in (mock.patch.dict("os.environ", {"KERNEL_SRC": str(self.folder)}),
                      mock.patch("memfile.paths.UPSTREAM", self.folder / "build/bin")):
            patch.start()
            self.addCleanup(patch.stop)

    def upstream(self, *tests: str) -> Upstream:
        self.told: list[Case] = []
        check = SimpleNamespace(args=SimpleNamespace(tests=list(tests), all=False), flavour="plain", slow=1,
                                report=self.told.extend)
        return Upstream(check)  # type: ignore[arg-type]

    def test_other_tests_need_no_list_of_programs(self) -> None:
        self.assertEqual(self.upstream("punch.*").tests(), [])
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
            self.upstream("upstream.*").tests()
        self.assertEqual(end.exception.code, 2)
        self.assertIn("Makefile.kvm cannot be read", said.getvalue())

    def test_what_was_never_built_is_no_program_that_does_not_build(self) -> None:
        self.kvm.mkdir(parents=True)
        (self.kvm / "Makefile.kvm").write_text("TEST_GEN_PROGS_x86 += x86/own\n")
        self.assertEqual(self.upstream("punch.*").jobs(), [])
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as end:
            self.upstream("upstream.own").jobs()
        self.assertEqual(end.exception.code, 2)
        self.assertIn("are not built", said.getvalue())
        (self.folder / "build").mkdir()
        (self.folder / "build/.memfile-built").touch()
        self.assertEqual(self.upstream("upstream.own").jobs(), [])
        self.assertEqual([(case.name, case.status) for case in self.told], [("upstream.own", SKIP)])


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
