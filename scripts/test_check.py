#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of check: python3 scripts/test_check.py"""

import fnmatch
import sys
import unittest
import unittest.mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from load import script

check = script("check")

LINE = "[    9.9] " + "=" * 66


def report(title: str, *stack: str) -> list[str]:
    return [
        LINE, f"[    9.9] BUG: KCSAN: data-race in {title}", *(f"[    9.9]  {symbol}+0x1/0x2" for symbol in stack),
        "[    9.9] CPU: 0 PID: 1 Comm: memfile-tests", LINE,
    ]


class Races(unittest.TestCase):
    def test_race_without_our_symbols_is_of_others(self) -> None:
        lines, others = check.without_races_of_others(["before", *report("a / b", "a", "b"), "after"])
        self.assertEqual(lines, ["before", LINE, "after"])
        self.assertEqual(others, ["BUG: KCSAN: data-race in a / b"])

    def test_race_with_one_of_our_symbols_is_ours(self) -> None:
        for symbol in ("kvm_memfile_flush", "memfile_invalidate_start.cold", "_RNvNtCs7_12memfile_main3abi"):
            with self.subTest(symbol):
                console = report("a / b", "a", symbol)
                self.assertEqual(check.without_races_of_others(console), (console, []))

    def test_race_that_kvm_means_is_of_others(self) -> None:
        title = "kvm_mmu_faultin_pfn / kvm_mmu_invalidate_end"
        lines, others = check.without_races_of_others(report(title, "kvm_mmu_invalidate_end", "kvm_memfile_end"))
        self.assertEqual((lines, others), ([LINE], [f"BUG: KCSAN: data-race in {title}"]))
        console = report("kvm_mmu_faultin_pfn / kvm_memfile_end", "kvm_memfile_end")
        self.assertEqual(check.without_races_of_others(console), (console, []))

    def test_case_that_starts_within_a_report_is_kept(self) -> None:
        console = report("a / b", "a")
        mark = "[    9.9] memfile-tests: punch.hole"
        console.insert(3, mark)
        self.assertEqual(check.without_races_of_others(console)[0], [LINE, mark])

    def test_report_that_was_cut_short_is_kept(self) -> None:
        console = report("a / b", "a")[:-1]
        self.assertEqual(check.without_races_of_others(console), (console, []))


class Sharing(unittest.TestCase):
    def test_longest_suites_do_not_share_a_machine(self) -> None:
        suites = sorted(check.SECONDS, key=lambda suite: -check.SECONDS[suite])
        lists = check.share_out(suites)
        self.assertEqual(sorted(lists[0] + lists[1]), sorted(suites))
        self.assertEqual([suites[0] in shard for shard in lists], [suites[1] not in shard for shard in lists])


class Variants(unittest.TestCase):
    CASES = ("punch.hole", "punch.other", "punch_gmem.hole", "stress.long", "contiguous.area")

    def chosen(self, *tests: str) -> list[str]:
        def cases(patterns: list[str]) -> list[str]:
            every = fnmatch.filter
            return [case for case in self.CASES if not patterns or any(
                every([case, case.split(".")[0]], pattern) for pattern in patterns)]

        variant = check.Variant("some", suites=("punch", "punch_gmem", "contiguous"))
        with unittest.mock.patch.object(check, "guest_cases", cases):
            return check.variant_tests("variant_some", variant, list(tests))

    def test_variant_runs_only_if_a_pattern_begins_with_its_word(self) -> None:
        self.assertEqual(self.chosen(), [])
        self.assertEqual(self.chosen("*", "punch.*", "variant_other", "v*"), [])

    def test_variant_is_made_of_the_suites_that_it_concerns(self) -> None:
        for test in ("variant_*", "variant_some"):
            self.assertEqual(self.chosen(test), ["punch", "punch_gmem"])
        self.assertEqual(self.chosen("variant_some.*.hole"), ["punch.hole", "punch_gmem.hole"])

    def test_suite_named_in_full_runs_in_any_variant(self) -> None:
        self.assertEqual(self.chosen("variant_some.stress"), ["stress"])
        self.assertEqual(self.chosen("variant_*.stress.l*", "variant_some.punch.hole"), ["stress.long", "punch.hole"])

    def test_suites_of_variants_exist(self) -> None:
        files = {path.stem for path in (check.ROOT / "selftests/src/suites").glob("*.rs")}
        for name, variant in check.VARIANTS.items():
            with self.subTest(name):
                suites = {suite.removesuffix("_gmem") for suite in variant.suites + variant.without}
                self.assertLessEqual(suites, files)


class Watched(unittest.TestCase):
    def status(self, counters: str) -> str:
        return check.watched_case("main-0", counters).status

    def test_detector_that_watches_passes(self) -> None:
        self.assertEqual(self.status("enabled: 1\nused_watchpoints: 0\nsetup_watchpoints: 123456\n"), check.PASS)

    def test_detector_asleep_or_absent_fails(self) -> None:
        self.assertEqual(self.status("enabled: 0\nused_watchpoints: 0\nsetup_watchpoints: 0\n"), check.FAIL)
        self.assertEqual(self.status(""), check.FAIL)


if __name__ == "__main__":
    unittest.main()
