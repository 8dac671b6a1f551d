#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of what bench writes, and of growth: python3 scripts/test_bench_output.py"""

import json
import sys
import unittest
from collections import Counter
from html.parser import HTMLParser

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.bench import counts, growth, page, profile, text, windows
from test_bench import SYMBOLS, WRITTEN, figure, table_of


class Checker(HTMLParser):
    """The open tags, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


class Output(unittest.TestCase):
    def result(self) -> text.Result:
        rows = table_of(figure("first <touch>", "memfile", 1020), figure("first <touch>", "guest_memfd", 1000))
        gib = counts.private_rows({
            ("populate 1 GiB", "memfile, 2M (THP)"): figure("populate 1 GiB", "memfile, 2M (THP)", 51200, page=1 << 21),
            ("populate 1 GiB", "guest_memfd"): figure("populate 1 GiB", "guest_memfd", 262144000),
        }, "stores")
        functions = Counter({"kvm_a": 7})
        return text.Result(
            kernel="7.3.4", rows=[*rows, *gib],
            missing=[{"name": "populate 1 GiB", "subject": "memfile on hugetlbfs, 1G", "reason": "no page"}],
            profiles=[profile.Profile("first <touch>", "memfile", functions, "guest_memfd", Counter())],
            alone=[figure("something", "memfile", 4711)],
            changes=[counts.Change("first <touch>", "memfile", "guest_memfd", 1000, 1020, 2)],
        )

    def test_text_has_costs_sizes_missing_profiles_and_changes(self) -> None:
        out = text.text(self.result())
        for part in ("MISSED", "1.020", "no page", "kvm_a", "WORSE", "+2.00%", "TLB flushes", "Beside nothing", "4711"):
            self.assertIn(part, out)
        # A page of 2M takes 100 instructions, one of 4K 1000.
        self.assertRegex(out, r"populate 1 GiB +memfile, 2M \(THP\) +2M +51200 +0\.0002 +100 +0\.100\n")

    def test_json_can_be_read_back_and_compared_with(self) -> None:
        result = self.result()
        saved = json.loads(json.dumps(result.as_json()))
        self.assertEqual(saved["profiles"][0]["functions"], {"kvm_a": 7})
        self.assertEqual(saved["changes"][0]["verdict"], "WORSE")
        self.assertEqual(counts.changes(saved, result.rows), [])

    def test_csv_is_as_wide_as_its_head(self) -> None:
        lines = text.csv_lines(self.result().rows)
        self.assertEqual({len(line) for line in lines}, {len(lines[0])})

    def test_page_has_everything_and_needs_nothing_else(self) -> None:
        html = page.html(self.result())
        checker = Checker()
        checker.feed(html)
        self.assertEqual(checker.open, [])
        for part in ("1 of 2 rows meet", "first <touch>", "Missing on this machine: 1.", "more than the noise: 1.", "kvm_a", "no page"):
            self.assertIn(part, checker.text)
        for part in ("<svg id=ratios", "<svg id=sizes", "prefers-color-scheme: dark", "@media print"):
            self.assertIn(part, html)
        for link in ("src=", "href=", "@import", "url(", "<script"):
            self.assertNotIn(link, html)

    def test_result_without_rows_is_a_page(self) -> None:
        self.assertIn("0 of 0", page.html(text.Result("7.3.4", [], [], [], None)))


def point(size: int, instructions: int, work: int = 1, run: int = 0, window: int = 9) -> dict[str, object]:
    return {
        "name": "hole, by size of the hole", "subject": "memfile", "page": 4096, "run": run, "times": 1,
        "instructions": instructions, "flushes": None, "windows": [[window, 1]], "size": size, "work": work,
    }


class TheGrowth(unittest.TestCase):
    def of(self, *points: dict[str, object]) -> growth.Series:
        found = growth.series({"growth": list(points)}, windows.windows_of(WRITTEN), SYMBOLS)
        self.assertEqual(len(found), 1)
        return found[0]

    def test_same_cost_at_all_sizes_is_met(self) -> None:
        one = self.of(point(4096, 1000), point(1 << 30, 1100))
        self.assertAlmostEqual(one.whole.growth, 1.1)
        self.assertTrue(one.met)

    def test_cost_that_grows_with_the_size_is_missed(self) -> None:
        one = self.of(point(1, 1000), point(10, 2000), point(1000, 9000))
        self.assertEqual((one.whole.growth, one.met), (9.0, False))
        self.assertLess(one.whole.at_most, 2.1)
        self.assertEqual([step.growth for step in one.steps], [2.0, 4.5])
        self.assertEqual(one.worst.after.size, 1000)

    def test_one_step_too_large_is_missed_though_the_whole_is_not(self) -> None:
        one = self.of(point(1, 1000), point(2, 1000), point(4, 1000), point(8, 1250), point(1024, 1250))
        self.assertEqual((one.whole.met, one.worst.met, one.met), (True, False, False))
        self.assertEqual(one.worst.after.size, 8)

    def test_many_small_steps_are_missed_as_a_whole(self) -> None:
        one = self.of(*(point(1 << n, int(1000 * 1.09**n)) for n in range(11)))
        self.assertEqual((all(step.met for step in one.steps), one.whole.met, one.met), (True, False, False))

    def test_most_expensive_size_counts_wherever_it_is(self) -> None:
        one = self.of(point(1, 1000), point(1024, 2500), point(2048, 1000))
        self.assertEqual((one.whole.growth, one.met), (2.5, False))

    def test_cost_may_grow_with_the_work(self) -> None:
        self.assertTrue(self.of(point(1, 1000), point(64, 64000, work=64)).met)

    def test_what_guest_memfd_does_is_no_miss(self) -> None:
        points = [point(1, 1000), point(8, 5000), {**point(1, 900), "subject": "guest_memfd"}]
        for theirs, met in ((4600, True), (4000, False)):
            other = {**point(8, theirs), "subject": "guest_memfd"}
            found = growth.series({"growth": [*points, other]}, {}, SYMBOLS)
            self.assertEqual(next(one.met for one in found if one.subject == "memfile"), met)

    def test_runs_are_one_point_and_repeated_turns_are_not_counted(self) -> None:
        one = self.of(point(1, 5000, window=0), point(1, 5010, run=1, window=0), point(2, 900))
        self.assertEqual([(p.cost, p.noise) for p in one.points], [(5000 - 4100, 10), (900, 0)])

    def test_sizes_are_bytes_where_the_name_says_so(self) -> None:
        table = growth.tables([self.of(point(4096, 1000), point(1 << 40, 1000))])[0]
        self.assertEqual(table.head[1:3], ["4K", "1T"])
        self.assertEqual(table.lines[0][-1], "met")

    def test_every_table_is_as_wide_as_its_head(self) -> None:
        one = self.of(point(1, 1000), point(2, 1000), point(4, 5000))
        table = growth.tables([one])[0]
        self.assertEqual(len(table.lines[0]), len(table.head))
        lines = growth.csv_lines([one])
        self.assertEqual({len(line) for line in lines}, {len(lines[0])})
        self.assertEqual([line[-1] for line in lines[1:]], ["", "met", "missed"])

    def test_growth_shows_the_largest_ratio_to_guest_memfd(self) -> None:
        theirs = [{**one, "subject": "guest_memfd"} for one in (point(1, 1000), point(2, 2000))]
        found = growth.series({"growth": [point(1, 900), point(2, 2100), *theirs]}, {}, SYMBOLS)
        lines = growth.tables(found)[0].lines
        self.assertEqual({line[0]: line[3] for line in lines}, {"memfile": "1.050", "guest_memfd": ""})

    def test_growth_is_compared_with_a_saved_result_size_by_size(self) -> None:
        one = self.of(point(4096, 1000), point(4096, 1010, run=1), point(1 << 30, 2000))
        saved = json.loads(json.dumps(text.Result("7.3.4", [], [], [], None, [one]).as_json()))
        self.assertEqual(growth.changes(saved, [one]), [])
        other = self.of(point(4096, 1011), point(1 << 30, 2100), point(1 << 40, 2000))
        found = [(change.reference, change.verdict) for change in growth.changes(saved, [other])]
        self.assertEqual(found, [("at 1G", "WORSE"), ("at 1T", "new")])
        self.assertEqual([c.verdict for c in growth.changes(saved, [])], ["gone", "gone"])

    def test_series_without_guest_memfd_says_why(self) -> None:
        one = self.of({**point(1, 1000), "name": "punch 1 page, by observers of the file"})
        self.assertIn("(no other memory has observers)", growth.tables([one])[0].title)

    def test_ordinary_memory_is_not_judged(self) -> None:
        one = self.of({**point(1, 1000), "subject": "memfd of a VM"}, {**point(2, 9000), "subject": "memfd of a VM"})
        self.assertEqual((growth.tables([one])[0].lines[0][-1], growth.csv_lines([one])[-1][-1]), ("", ""))

    def test_result_saved_without_growth_can_be_compared_with(self) -> None:
        self.assertEqual([c.verdict for c in growth.changes({"rows": []}, [self.of(point(1, 1000))])], ["new"])


if __name__ == "__main__":
    unittest.main()
