#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of ktap.py: python3 scripts/test_ktap.py"""

import sys
import unittest

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.ktap import FAIL, PASS, SKIP, parse


def results(text: str) -> list[tuple[str, str]]:
    return [(case.name, case.status) for case in parse(text.splitlines())]


class Ktap(unittest.TestCase):
    def test_flat_stream(self) -> None:
        text = "KTAP version 1\n1..3\nok 1 a\nnot ok 2 - b\nok 3 c # SKIP no such thing\n"
        self.assertEqual(results(text), [("a", PASS), ("b", FAIL), ("c", SKIP)])

    def test_nested_suites_count_cases_not_suites(self) -> None:
        text = (
            "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: s\n  1..2\n"
            "  ok 1 a\n  ok 2 b\nok 1 s\n"
        )
        self.assertEqual(results(text), [("s.a", PASS), ("s.b", PASS)])

    def test_every_stream_of_a_console_is_read(self) -> None:
        text = (
            "noise\n[    0.1] KTAP version 1\n[    0.1] 1..1\n[    0.1] ok 1 a\nnoise\n"
            "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    # module: m\n"
            "    1..1\nprintk in between\n    not ok 1 b\nnot ok 1 s\n"
        )
        self.assertEqual(results(text), [("a", PASS), ("s.b", FAIL)])

    def test_suite_without_cases_fails(self) -> None:
        text = "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    1..0\nok 1 s\n"
        self.assertEqual(results(text), [("s", FAIL)])

    def test_stream_without_results_fails(self) -> None:
        self.assertEqual(results("KTAP version 1\n1..0\n"), [("stream", FAIL)])

    def test_skipped_stream_is_a_skip(self) -> None:
        self.assertEqual(results("TAP version 13\n1..0 # SKIP no kvm\n"), [("stream", SKIP)])

    def test_missing_results_fail(self) -> None:
        text = "KTAP version 1\n1..3\nok 1 a\n"
        self.assertEqual(results(text), [("a", PASS), ("stream", FAIL)])

    def test_a_stream_cut_within_a_suite_fails(self) -> None:
        text = "KTAP version 1\n1..2\n  KTAP version 1\n  # Subtest: s\n  1..2\n  ok 1 a\n"
        self.assertEqual(results(text), [("s.a", PASS), ("s", FAIL), ("stream", FAIL)])

    def test_suite_that_fails_without_a_failing_case_fails(self) -> None:
        text = "KTAP version 1\n1..1\n  KTAP version 1\n  # Subtest: s\n  1..1\n  ok 1 a\nnot ok 1 s\n"
        self.assertEqual(results(text), [("s.a", PASS), ("s", FAIL)])

    def test_parameterised_cases_nest_deeper(self) -> None:
        text = (
            "KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: s\n    1..1\n"
            "        KTAP version 1\n        # Subtest: c\n        ok 1 one\n        not ok 2 two\n"
            "    not ok 1 c\nnot ok 1 s\n"
        )
        self.assertEqual(results(text), [("s.c.one", PASS), ("s.c.two", FAIL)])

    def test_result_like_text_outside_a_stream_is_noise(self) -> None:
        self.assertEqual(results("ok 1 looks like a result\n"), [])

    def test_diagnostics_stay_with_their_case(self) -> None:
        cases = parse(["KTAP version 1", "1..2", "# about a", "ok 1 a", "# about b", "not ok 2 b"])
        self.assertEqual([case.output for case in cases], [["# about a"], ["# about b"]])


if __name__ == "__main__":
    unittest.main()
