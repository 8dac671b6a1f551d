#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of check: python3 scripts/test_check.py"""

import sys
import unittest

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
