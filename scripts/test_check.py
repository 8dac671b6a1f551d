#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of check: python3 scripts/test_check.py"""

import contextlib
import datetime
import fnmatch
import functools
import io
import json
import sys
import tempfile
import time
import unittest
import unittest.mock
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import reports
from memfile.check import guest, kernel_log, results, suites
from memfile.check.session import Check
from memfile.ktap import FAIL, PASS, SKIP, Case
from memfile.load import script
from memfile.paths import ROOT

LINE = "[    9.9] " + "=" * 66


def report(title: str, *stack: str) -> list[str]:
    return [
        LINE, f"[    9.9] BUG: KCSAN: data-race in {title}", *(f"[    9.9]  {symbol}+0x1/0x2" for symbol in stack),
        "[    9.9] CPU: 0 PID: 1 Comm: memfile-tests", LINE,
    ]


class Races(unittest.TestCase):
    def test_race_without_our_symbols_is_of_others(self) -> None:
        lines, others = kernel_log.without_races_of_others(["before", *report("a / b", "a", "b"), "after"])
        self.assertEqual(lines, ["before", LINE, "after"])
        self.assertEqual(others, ["BUG: KCSAN: data-race in a / b"])

    def test_race_with_one_of_our_symbols_is_ours(self) -> None:
        for symbol in ("kvm_memfile_flush", "memfile_invalidate_start.cold", "_RNvNtCs7_12memfile_main3abi"):
            with self.subTest(symbol):
                console = report("a / b", "a", symbol)
                self.assertEqual(kernel_log.without_races_of_others(console), (console, []))

    def test_race_that_kvm_means_is_of_others(self) -> None:
        title = "kvm_mmu_faultin_pfn / kvm_mmu_invalidate_end"
        lines, others = kernel_log.without_races_of_others(report(title, "kvm_mmu_invalidate_end", "kvm_memfile_end"))
        self.assertEqual((lines, others), ([LINE], [f"BUG: KCSAN: data-race in {title}"]))
        console = report("kvm_mmu_faultin_pfn / kvm_memfile_end", "kvm_memfile_end")
        self.assertEqual(kernel_log.without_races_of_others(console), (console, []))

    def test_case_that_starts_within_a_report_is_kept(self) -> None:
        console = report("a / b", "a")
        mark = "[    9.9] memfile-tests: punch.hole"
        console.insert(3, mark)
        self.assertEqual(kernel_log.without_races_of_others(console)[0], [LINE, mark])

    def test_report_that_was_cut_short_is_kept(self) -> None:
        console = report("a / b", "a")[:-1]
        self.assertEqual(kernel_log.without_races_of_others(console), (console, []))


class KUnit(unittest.TestCase):
    BOOT = ["[ 0.9] KTAP version 1", "[ 0.9] 1..1", "[ 0.9]     KTAP version 1", "[ 0.9]     # Subtest: rust",
            "[ 0.9]     1..1", "[ 0.9]     ok 1 fmt", "[ 0.9] ok 1 rust"]
    NONE = ["[ 0.9] KTAP version 1", "[ 0.9] 1..0"]
    INIT = ["[ 1.0] Run /init as init process"]

    def cases(self, *console: str) -> list[tuple[str, str]]:
        return [(case.name, case.status) for case in guest.kunit_cases(list(console))]

    def test_kernel_need_have_no_suite(self) -> None:
        module = [line.replace("rust", "memfile") for line in self.BOOT]
        self.assertEqual(self.cases(*self.NONE, *self.INIT, *module), [("kunit.memfile.fmt", PASS)])
        self.assertEqual(self.cases(*self.BOOT, *self.INIT, *module), [("kunit.rust.fmt", PASS), ("kunit.memfile.fmt", PASS)])

    def test_module_has_some(self) -> None:
        for boot in (self.BOOT, self.NONE, []):
            self.assertIn(("kunit", FAIL), self.cases(*boot, *self.INIT))
            self.assertIn(("kunit", FAIL), self.cases(*boot, *self.INIT, *self.NONE))

    def test_suite_of_the_kernel_that_fails_or_ends_early_counts(self) -> None:
        module = [line.replace("rust", "memfile") for line in self.BOOT]
        failed = [line.replace("] ok", "] not ok").replace("    ok", "    not ok") for line in self.BOOT]
        self.assertIn(("kunit.rust.fmt", FAIL), self.cases(*failed, *self.INIT, *module))
        self.assertIn(("kunit", FAIL), self.cases(*self.BOOT[:2], *self.INIT, *module))


class Sharing(unittest.TestCase):
    def test_longest_suites_do_not_share_a_machine(self) -> None:
        names = sorted(suites.SECONDS, key=lambda suite: -suites.SECONDS[suite])
        lists = suites.share_out(names)
        self.assertEqual(sorted(lists[0] + lists[1]), sorted(names))
        self.assertEqual([names[0] in shard for shard in lists], [names[1] not in shard for shard in lists])


class Machines(unittest.TestCase):
    def boots(self, *names: str) -> dict[str, list[str]]:
        """The machine of each suite if these cases were chosen."""
        run = Check(script("check").parse_args(["--log", self.enterContext(tempfile.TemporaryDirectory()), *names]))
        with unittest.mock.patch.object(guest, "guest_cases", list):
            jobs = [job for job in guest.guest_tests(run) if isinstance(job, functools.partial)]
            return {job.args[1]: job.args[2] for job in jobs}

    def test_suites_of_one_machine_run_in_it_together(self) -> None:
        boots = self.boots("punch.a", "punch_1g.a", "hugetlb_1g.a", "directmap_1g.a", "zero_1g.a")
        self.assertEqual(boots.pop("hugetlb_1g"), ["punch_1g.a", "hugetlb_1g.a", "zero_1g.a"])
        self.assertEqual(boots, {"directmap_1g": ["directmap_1g.a"], "main-0": ["punch.a"]})

    def test_suite_runs_in_the_machine_of_another_one_alone_too(self) -> None:
        self.assertEqual(self.boots("punch_1g.a"), {"hugetlb_1g": ["punch_1g.a"]})

    def test_machines_of_others_exist(self) -> None:
        self.assertLessEqual(set(suites.MACHINE_OF.values()), set(suites.OWN_MACHINE))
        self.assertFalse(set(suites.MACHINE_OF) & set(suites.OWN_MACHINE))


class Variants(unittest.TestCase):
    CASES = ("punch.hole", "punch.other", "punch_gmem.hole", "stress.long", "contiguous.area")

    def chosen(self, *tests: str) -> list[str]:
        def cases(patterns: list[str]) -> list[str]:
            every = fnmatch.filter
            return [case for case in self.CASES if not patterns or any(
                every([case, case.split(".")[0]], pattern) for pattern in patterns)]

        variant = suites.Variant("some", left_out={"why": ("stress", "other")})
        with unittest.mock.patch.object(suites, "guest_cases", cases):
            return suites.variant_tests("variant_some", variant, list(tests))

    def test_variant_runs_only_if_a_pattern_begins_with_its_word(self) -> None:
        self.assertEqual(self.chosen(), [])
        self.assertEqual(self.chosen("*", "punch.*", "variant_other", "v*"), [])

    def test_variant_is_made_of_the_suites_that_it_concerns(self) -> None:
        for test in ("variant_*", "variant_some"):
            self.assertEqual(self.chosen(test), ["punch"])
        self.assertEqual(self.chosen("variant_some.*.hole"), ["punch.hole"])

    def test_suite_named_in_full_runs_in_any_variant(self) -> None:
        self.assertEqual(self.chosen("variant_some.stress"), ["stress"])
        self.assertEqual(self.chosen("variant_*.stress.l*", "variant_some.punch.hole"), ["stress.long", "punch.hole"])

    def test_suites_that_variants_leave_out_exist_and_are_left_out_once(self) -> None:
        files = {path.stem for path in (ROOT / "selftests/src/suites").glob("*.rs")} | {"fuzz_corpus"}
        for name, variant in suites.VARIANTS.items():
            with self.subTest(name):
                named = [suite for left in variant.left_out.values() for suite in left]
                self.assertLessEqual(set(named), files)
                self.assertEqual(len(named), len(set(named)))

    def test_suite_with_a_machine_or_a_kernel_of_its_own_is_in_no_variant(self) -> None:
        for suite in (*suites.OWN_MACHINE, *suites.MACHINE_OF, *suites.OF_KERNEL):
            self.assertFalse(any(variant.concerns(suite) for variant in suites.VARIANTS.values()))

    def test_new_suite_is_in_every_variant(self) -> None:
        self.assertTrue(all(variant.concerns("new") for variant in suites.VARIANTS.values()))


class Watched(unittest.TestCase):
    def status(self, counters: str) -> str:
        return kernel_log.watched_case("main-0", counters).status

    def test_detector_that_watches_passes(self) -> None:
        self.assertEqual(self.status("enabled: 1\nused_watchpoints: 0\nsetup_watchpoints: 123456\n"), PASS)

    def test_detector_that_says_nothing_or_is_absent_fails(self) -> None:
        self.assertEqual(self.status("enabled: 0\nused_watchpoints: 0\nsetup_watchpoints: 0\n"), FAIL)
        self.assertEqual(self.status(""), FAIL)


class Reports(unittest.TestCase):
    """The reports of a run for other programs: JUnit XML, and JSON for KCIDB."""

    CASES = (
        Case("punch.hole", PASS, seconds=1.25),
        Case("punch.other", FAIL, "a <b>", ["line & \x1b[1m", "more"]),
        Case("host.rust_host.policy::range::tests::a", SKIP, "no reason"),
        Case("kunit", PASS),
    )

    def run_of(self, code: int = 1, reason: str = "a test failed", cases: tuple[Any, ...] = CASES) -> reports.Run:
        return reports.Run(
            name="check-1", kernel="plain", checkout="abc1234-dirty", base="7.3.4", patches="0" * 64,
            started=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), seconds=6.5,
            code=code, reason=reason, cases=list(cases),
        )

    def test_junit_has_every_case_once_with_its_status(self) -> None:
        root = ElementTree.fromstring(reports.junit(self.run_of()))
        self.assertEqual({name: root.get(name) for name in ("tests", "failures", "skipped", "time")},
                         {"tests": "5", "failures": "2", "skipped": "1", "time": "6.5"})
        suites = {suite.get("name"): suite for suite in root}
        self.assertEqual(set(suites), {"punch", "host.rust_host", "kunit", "check"})
        self.assertEqual([case.get("name") for case in suites["punch"]], ["hole", "other"])
        self.assertEqual([case.get("time") for case in suites["punch"]], ["1.25", None])
        failure, skipped = suites["punch"].find("testcase/failure"), suites["host.rust_host"].find("testcase/skipped")
        assert failure is not None and skipped is not None
        self.assertEqual(failure.get("message"), "a <b>")
        self.assertEqual(failure.text, "line & ?[1m\nmore")
        self.assertEqual(skipped.get("message"), "no reason")

    def test_kcidb_has_every_case_once_with_its_status(self) -> None:
        report = json.loads(json.dumps(reports.kcidb(self.run_of(), "me")))
        tests = report["tests"]
        self.assertEqual([test["status"] for test in tests], ["PASS", "FAIL", "SKIP", "PASS", "FAIL"])
        self.assertEqual(tests[2]["path"], "memfile.host.rust_host.policy.range.tests.a")
        self.assertEqual(tests[1]["comment"], "a <b>")
        self.assertEqual(tests[4]["path"], "memfile.check.run")
        self.assertEqual(len({test["id"] for test in tests}), 5)
        self.assertEqual([test.get("duration") for test in tests], [1.25, None, None, None, 6.5])

    def test_kcidb_is_of_the_form_that_it_says(self) -> None:
        """As the schema 5.3 of kcidb-io has it; validated with that once."""
        report = reports.kcidb(self.run_of(), "me")
        self.assertEqual(report["version"], {"major": 5, "minor": 3})
        checkout, build = report["checkouts"][0], report["builds"][0]
        self.assertEqual(build["checkout_id"], checkout["id"])
        for part in (checkout, build, *report["tests"]):
            self.assertRegex(part["id"], r"^me:[^\0]+$")
            self.assertEqual(part["origin"], "me")
            self.assertIsNotNone(datetime.datetime.fromisoformat(part["start_time"]).tzinfo)
        for test in report["tests"]:
            self.assertEqual(test["build_id"], build["id"])
            self.assertRegex(test["path"], r"^[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*$")
        self.assertRegex(checkout["patchset_hash"], r"^[0-9a-f]{64}$")

    def test_names_that_are_no_paths_become_some(self) -> None:
        self.assertEqual(reports.path_of("a.b::c d.e/f..g"), "memfile.a.b.c_d.e_f.g")
        self.assertEqual(reports.path_of("\u00e4.b"), "memfile._.b")

    def test_run_that_passes_but_for_a_splat_fails_in_both(self) -> None:
        passed = (Case("punch.hole", PASS),)
        for code, status in ((0, "PASS"), (3, "FAIL"), (255, "FAIL")):
            run = self.run_of(code, "why", passed)
            self.assertEqual(reports.kcidb(run, "me")["tests"][-1]["status"], status)
            failures = ElementTree.fromstring(reports.junit(run)).get("failures")
            self.assertEqual(failures, "1" if code else "0")

    def finish(self, *options: str) -> Path:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        log = Path(folder.name) / "log"
        run = Check(script("check").parse_args(["--log", str(log), *(text.format(log) for text in options)]))
        run.outcome.cases = list(self.CASES)
        with contextlib.redirect_stdout(io.StringIO()):
            self.assertEqual(results.finish(run, time.monotonic()), 1)
        return log

    def test_both_are_left_in_the_log_folder(self) -> None:
        log = self.finish()
        self.assertEqual(ElementTree.parse(log / "junit.xml").getroot().get("failures"), "2")
        report = json.loads((log / "kcidb.json").read_text())
        self.assertEqual(len(report["tests"]), 5)

    def test_both_go_where_they_are_wanted(self) -> None:
        log = self.finish("--junit", "{}/../j.xml", "--kcidb", "{}/../k.json")
        self.assertEqual(ElementTree.parse(log.parent / "j.xml").getroot().get("tests"), "5")
        self.assertIn("tests", json.loads((log.parent / "k.json").read_text()))
        self.assertFalse((log / "junit.xml").exists())

    def test_series_has_the_hash_that_kcidb_wants(self) -> None:
        base, patches = results.series("plain")
        self.assertRegex(base, r"^\d+\.\d+")
        assert patches is not None
        self.assertRegex(patches, r"^[0-9a-f]{64}$")
        self.assertEqual(results.series("base"), (base, ""))
        with tempfile.NamedTemporaryFile() as patch:
            patch.write(b"a\n")
            patch.flush()
            # printf 'a\n' | sha256sum | cut -c-64 | sha256sum
            self.assertEqual(reports.patchset_hash([Path(patch.name)]),
                             "1b7c99b95cc6fad6d88b2c3fdd0d9faab2a4fd1de0d6a880bd2261ac2592a222")
        self.assertEqual(reports.patchset_hash([]), "")


if __name__ == "__main__":
    unittest.main()
