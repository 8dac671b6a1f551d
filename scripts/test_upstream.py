#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of upstream: python3 scripts/test_upstream.py"""

import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.ktap import FAIL, PASS, SKIP
from memfile.upstream.guest import BAD_CLOCK, Reader, run_all, script
from memfile.upstream.programs import BadList, Expected, Program, Programs, build_lines, fitted, read_list, unnamed
from memfile.upstream.results import DIED, KILLED, Result
from memfile.upstream.verdicts import judge, summary

ONE = Program("one", "one")
TWO = Program("two", "two")
SPLAT = re.compile("WARNING: ")


def result(*lines: str, code: int = 0, seconds: int = 1) -> Result:
    return Result(code, seconds, list(lines))


class TheList(unittest.TestCase):
    def read(self, text: str) -> Programs:
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write('limit = 5\n[folders]\nkvm = "x86/a-b"\nmm = "c d"\n' + text)
            file.flush()
            return read_list(Path(file.name))

    def test_list_that_is_shipped_can_be_read(self) -> None:
        listed = read_list()
        self.assertGreater(sum(name.startswith("kvm/") for name in listed.built), 100)
        self.assertTrue(any(program.quick for program in listed.runs.values()))
        for one in listed.expected:
            self.assertGreater(len(one.cause), 10)

    def test_every_program_runs_and_a_run_may_have_another_name(self) -> None:
        runs = self.read('[run.c]\nargs = "1"\n[run.c_again]\nprogram = "c"\nlimit = 9\n').runs
        self.assertEqual({name: (run.file, run.args, run.limit) for name, run in runs.items()}, {
            "a_b": ("a_b", "", 5), "c": ("c", "1", 5), "d": ("d", "", 5), "c_again": ("c", "", 9)})

    def test_what_does_not_fit_is_named(self) -> None:
        for text, word in (
            ("[run.e]\n", "run.e"), ('[run.d]\nprogram = "c"\n', "run.d"), ("[run.c]\nargz = 1\n", "argz"),
            ('[scripts]\n"mm/c.sh" = ""\n', "name c"),
            ('[[difference]]\nprogram = "x"\nlines = []\ncause = ""\n', "of x"),
        ):
            with self.subTest(text), self.assertRaisesRegex(BadList, word):
                self.read(text)

    def test_another_base_has_other_programs(self) -> None:
        text = '[bases."7.0"]\nwithout = "mm/d"\nalso = "mm/e"\n[run.d]\nargs = "1"\n'
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write('limit = 5\n[folders]\nmm = "c d"\n' + text)
            file.flush()
            path = Path(file.name)
            self.assertEqual(read_list(path, "7.1").built, ["mm/c", "mm/d"])
            self.assertEqual(read_list(path, "7.0").built, ["mm/c", "mm/e"])
            self.assertEqual(set(read_list(path, "7.0").runs), {"c", "e"})
            path.write_text(path.read_text().replace("mm/d", "mm/f"))
            with self.assertRaisesRegex(BadList, "without mm/f"):
                read_list(path, "7.0")

    def test_program_that_the_kernel_has_and_the_list_has_not_is_found(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for path, text in (
                ("kvm/Makefile.kvm", "TEST_GEN_PROGS_x86 += x86/a-b\nTEST_GEN_PROGS_COMMON = new\n"
                 "TEST_GEN_PROGS_x86 = $(TEST_GEN_PROGS_COMMON)\nTEST_GEN_PROGS_s390 += other\n"),
                ("kvm/x86/a-b.c", ""), ("mm/c.c", "int main(void)"), ("mm/helper.c", "int mainly(void)"),
                ("mm/news.c", "\nTEST_HARNESS_MAIN\n"),
            ):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
            self.assertEqual(unnamed(self.read(""), folder), [
                "mm/news.c is not in upstream.toml", "kvm/new is not in upstream.toml",
                "mm/d of upstream.toml does not exist"])

    def test_list_fits_the_tree_of_a_user(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with self.assertRaisesRegex(BadList, "Makefile.kvm cannot be read"):
                fitted(self.read(""), folder)
            (folder / "kvm/x86").mkdir(parents=True)
            (folder / "mm").mkdir()
            (folder / "kvm/Makefile.kvm").write_text("TEST_GEN_PROGS_x86 += x86/a-b\nTEST_GEN_PROGS_x86 += x86/own\n")
            for path in ("kvm/x86/a-b.c", "kvm/x86/own.c", "mm/c.c"):
                (folder / path).touch()
            listed = fitted(self.read('[scripts]\n"mm/e.sh" = ""\n[added]\nkvm = "x86/added"\n'), folder)
            self.assertEqual(list(build_lines(listed)), ["kvm x86/a-b", "cc c mm/c.c", "kvm x86/own", "kvm+ x86/added"])
            # Those that are gone are told, too.
            self.assertEqual(set(listed.runs), {"a_b", "c", "d", "e", "own", "added"})

    def test_programs_of_a_user_are_all_of_a_line_and_have_names_of_their_own(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "kvm").mkdir()
            makefile = folder / "kvm/Makefile.kvm"
            makefile.write_text("TEST_GEN_PROGS_x86 += x86/a-b own \\\n  x86/more # and\nTEST_GEN_PROGS_x86 += own\n"
                                "TEST_GEN_PROGS_x86 += $(TEST_GEN_PROGS_COMMON)\n")
            self.assertEqual(fitted(self.read(""), folder).built, ["kvm/own", "kvm/x86/more"])
            makefile.write_text("TEST_GEN_PROGS_x86 += own x86/own\n")
            with self.assertRaisesRegex(BadList, "the name own"):
                fitted(self.read(""), folder)

    def test_script_needs_what_lies_beside_it(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for path in ("kvm/Makefile.kvm", "mm/e.sh"):
                (folder / path).parent.mkdir()
                (folder / path).touch()
            listed = self.read('[scripts]\n"mm/e.sh" = "mm/g.sh"\n')
            self.assertEqual(fitted(listed, folder).scripts, {})
            (folder / "mm/g.sh").touch()
            self.assertEqual(fitted(listed, folder).scripts, listed.scripts)

    def test_program_of_the_patches_is_built_of_the_patched_source(self) -> None:
        listed = self.read('[added]\nkvm = "x86/e"\nmm = "f"\n[sources]\n"mm/*" = "mm/x.c"\n')
        self.assertEqual(list(build_lines(listed)), [
            "kvm x86/a-b", "cc c mm/c.c mm/x.c", "cc d mm/d.c mm/x.c", "kvm+ x86/e", "cc+ f mm/f.c mm/x.c"])
        self.assertEqual(set(listed.runs), {"a_b", "c", "d", "e", "f"})

    def test_build_gets_the_sources_of_each(self) -> None:
        listed = self.read('[sources]\n"mm/*" = "mm/x.c"\n"mm/d" = "mm/y.c"\n[scripts]\n"mm/e-f.sh" = "mm/g.sh"\n')
        self.assertEqual(list(build_lines(listed)), [
            "kvm x86/a-b", "cc c mm/c.c mm/x.c", "cc d mm/d.c mm/x.c mm/y.c", "script mm/e-f.sh e_f.sh",
            "script mm/g.sh g.sh"])


class Guest(unittest.TestCase):
    def test_script_is_one_that_a_shell_takes(self) -> None:
        text = script([ONE, Program("b", "b.sh", args="-x 'y z'", before="echo a")])
        run = subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True, check=False)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertIn("echo a\ncd /tmp/work\nbash ./b.sh -x 'y z'\n", text)

    def read(self, text: str) -> tuple[dict[str, Result], str]:
        reader = Reader([ONE, TWO], SPLAT)
        found = [reader.feed(line) for line in text.splitlines(keepends=True)]
        return {program.name: came for program, came in filter(None, found)}, reader.begun

    def test_output_is_cut_where_the_guest_says_it(self) -> None:
        found, begun = self.read(
            "noise\n@@ begin one\na\n\nb\r\n\n@@ kernel [    1.5] fine\n@@ kernel [    1.6][   T7] WARNING: x+0x1/0x2\n"
            "@@ end one 0 3 total: 64 free: 63 \n@@ begin two\nc\n")
        self.assertEqual(found, {
            "one": Result(0, 3, ["a", "", "b", "", "kernel: WARNING: x", "huge pages: total: 64 free: 63"])})
        self.assertEqual(begun, "two")

    def test_line_of_a_program_that_looks_like_another_end_is_none(self) -> None:
        found, begun = self.read("@@ begin one\n@@ end two 0 0 x\n@@ end three 0 0 x\n@@ end one 4 0 x\n")
        self.assertEqual((list(found), found["one"].ended, begun), (["one"], "skip", ""))

    def boots(self, *outputs: str) -> tuple[list[tuple[str, list[str]]], list[tuple[str, int]]]:
        left = list(outputs)
        self.scripts: list[str] = []
        booted: list[tuple[str, list[str]]] = []
        came: list[tuple[str, int]] = []

        def boot(name: str, programs: list[Program], script: str, on_line: Callable[[str], None]) -> None:
            booted.append((name, [program.name for program in programs]))
            self.scripts.append(script)
            for line in left.pop(0).splitlines():
                on_line(line)

        run_all("m", [ONE, TWO], boot, SPLAT, lambda program, result: came.append((program.name, result.code)))
        return booted, came

    def test_program_that_ends_the_machine_does_not_end_the_others(self) -> None:
        booted, came = self.boots("@@ begin one\n", "@@ begin two\n@@ end two 0 1 x\n")
        self.assertEqual(booted, [("m", ["one", "two"]), ("m-1", ["two"])])
        self.assertEqual(came, [("one", DIED), ("two", 0)])

    def test_machine_with_a_bad_clock_is_booted_again_some_times(self) -> None:
        bad = f"{BAD_CLOCK}\n"
        booted, came = self.boots(bad, bad, bad, "@@ begin one\n@@ end one 0 1 x\n@@ begin two\n@@ end two 0 1 x\n")
        self.assertEqual([name for name, _ in booted], ["m", "m-1", "m-2", "m-3"])
        self.assertEqual([BAD_CLOCK in script for script in self.scripts], [True, True, True, False])
        self.assertEqual(came, [("one", 0), ("two", 0)])

    def test_machine_in_which_nothing_begins_is_not_booted_for_ever(self) -> None:
        self.assertEqual(self.boots("no kernel\n"), ([("m", ["one", "two"])], []))


class Verdicts(unittest.TestCase):
    def kind(self, patched: Result | None, base: Result | None, *repeats: Result, meant: str = "",
             program: Program = ONE) -> str:
        expected = [Expected("one", (meant,), "because")] if meant else []
        return judge(program, patched, base, repeats, expected).kind

    def test_what_is_never_twice_the_same_is_no_difference(self) -> None:
        for one, other in (
            ("at 0xffff8880", "at 0x7f12"), ("ok 1 took 3.5 s", "ok 1 took 12 s"), ("  pid=12 tid=13", "  pid=7 tid=9"),
            ("round 5 of 9", "round 6 of 9"), ("\x1b[32mfine", "fine"), ("wait....", "wait......"),
        ):
            with self.subTest(one):
                self.assertEqual(self.kind(result(one), result(other)), "same")

    def test_each_way_to_differ_is_found(self) -> None:
        passed = result("ok 1 a", "ok 2 b")
        for other in (
            result("ok 1 a"), result("ok 1 a", "not ok 2 b"), result("ok 1 a", "ok 2 b # SKIP no memory"),
            result("ok 1 a", "ok 2 b", code=1), result("ok 1 a", "ok 2 b", code=4),
            result("ok 1 a", "ok 2 b", code=KILLED, seconds=60), result("ok 1 a", "ok 2 b", code=DIED),
            result("ok 1 a", "ok 2 b", "kernel: WARNING: x"), result("ok 2 b", "ok 1 a"), None,
        ):
            with self.subTest(str(other)):
                self.assertEqual(self.kind(other, passed), "differs")
                self.assertEqual(self.kind(passed, other), "differs")

    def test_skip_for_another_reason_is_a_difference(self) -> None:
        self.assertEqual(self.kind(result("SKIP: need 2 pages", code=4), result("SKIP: need 4 pages", code=4)), "differs")

    def test_failure_elsewhere_is_a_difference(self) -> None:
        one = result("==== Test Assertion Failure ====", "  a.c:12: x == y", code=254)
        other = result("==== Test Assertion Failure ====", "  a.c:13: x == z", code=254)
        self.assertEqual(self.kind(one, other), "differs")
        self.assertEqual(self.kind(one, one), "same")
        self.assertIn("exit code 254 on both kernels: a.c:12: x == y", judge(ONE, one, one).reason)

    def test_huge_page_that_does_not_come_back_is_a_difference(self) -> None:
        self.assertEqual(self.kind(result("huge pages: free: 63"), result("huge pages: free: 64")), "differs")

    def test_programs_that_are_stopped_are_compared_as_far_as_both_came(self) -> None:
        for code in (KILLED, DIED):
            def run(*lines: str, code: int = code) -> Result:
                return result(*lines, "huge pages: free: 1", code=code, seconds=60)

            self.assertEqual(self.kind(run("ok 1 a"), run("ok 1 a", "ok 2 b")), "same")
            self.assertEqual(self.kind(run("ok 1 a", "not ok 2 b"), run("ok 1 a", "ok 2 b")), "differs")
            self.assertEqual(self.kind(run("ok 1 a"), run("ok 1 a", code=1)), "differs")
            # One that hangs at its beginning does what the other's beginning did.
            self.assertEqual(self.kind(run(), run("ok 1 a")), "differs")
            self.assertEqual(self.kind(run("ok 1 a", "ok 2 b", "ok 3 c"), run("ok 1 a")), "differs")

    def test_killed_early_is_no_timeout(self) -> None:
        self.assertEqual(result(code=KILLED, seconds=60).ended, "timeout")
        self.assertEqual(result(code=KILLED, seconds=5).ended, "exit code 137")

    def test_only_results_count_where_the_list_says_so(self) -> None:
        one, other = result("working on it", "ok 1 a"), result("ok 1 a")
        self.assertEqual(self.kind(one, other), "differs")
        quiet = Program("one", "one", results="threads print in any order")
        self.assertEqual(self.kind(one, other, program=quiet), "same")
        self.assertEqual(self.kind(one, result("not ok 1 a"), program=quiet), "differs")

    def test_result_that_the_unpatched_kernel_has_too_is_not_ours(self) -> None:
        failed, passed = result("not ok 1 a", code=1), result("ok 1 a")
        self.assertEqual(self.kind(failed, passed, passed, failed), "wavers")
        self.assertEqual(self.kind(failed, passed, passed, result("not ok 1 b", code=1)), "differs")

    def test_numbers_that_are_never_the_same_are_not_ours_and_results_are(self) -> None:
        def run(number: int, told: str = "ok 1 a", code: int = 0) -> Result:
            return result(f"skipped {number} pages", told, code=code)

        self.assertEqual(self.kind(run(1), run(2)), "differs")
        self.assertEqual(self.kind(run(1), run(2), run(3)), "wavers")
        # The unpatched kernel gave the same result twice, so it is taken to have no other.
        self.assertEqual(self.kind(run(1), run(2), run(2)), "differs")
        self.assertEqual(self.kind(run(1, "not ok 1 a"), run(2), run(3)), "differs")
        self.assertEqual(self.kind(run(1, code=1), run(2), run(3)), "differs")
        self.assertEqual(self.kind(result("skipped 1 pages"), run(2), run(3)), "differs")
        self.assertEqual(self.kind(result("skipped 1 pages", "ok 1 a", "failed"), run(2), run(3)), "differs")
        self.assertEqual(self.kind(run(1, "not ok 1 a"), run(2, "not ok 1 a"), run(3)), "wavers")

    def test_width_of_a_number_is_as_little_a_result_as_the_number(self) -> None:
        one, other = result("mremap time:       97636ns", "ok 1 a"), result("mremap time:     2479157ns", "ok 1 a")
        self.assertEqual(self.kind(one, other), "same")
        one, other = result("#  999.1 MiB/s, 0 failed"), result("# 2199.191 MiB/s, 0 failed")
        self.assertEqual(self.kind(one, other), "same")
        self.assertEqual(self.kind(one, result("# 2199.191 MiB/s, 1 failed")), "differs")

    def test_expected_difference_is_just_that(self) -> None:
        one, other = result("flags 0x20: allowed"), result("flags 0x20: EINVAL")
        self.assertEqual(self.kind(one, other, meant="flags"), "expected")
        self.assertEqual(self.kind(result("flags x", "not ok 1"), other, meant="flags"), "differs")
        self.assertEqual(self.kind(other, other, meant="flags"), "differs")

    def test_case_has_the_status_of_the_comparison(self) -> None:
        skip = result("1..0 # SKIP - no such CPU", code=4)
        case = judge(ONE, skip, skip).case("upstream.")
        self.assertEqual((case.name, case.status, case.reason), ("upstream.one", SKIP, "on both kernels: no such CPU"))
        failed = result("not ok 1 a", code=1)
        self.assertEqual(judge(ONE, failed, failed).case("").status, PASS)
        case = judge(ONE, failed, result("ok 1 a")).case("")
        self.assertEqual((case.status, case.output[1:]), (
            FAIL, ["-ok 1 a", "-ended: pass", "+not ok 1 a", "+ended: exit code 1"]))

    def test_one_line_sums_up(self) -> None:
        passed, failed, skip = result("ok 1"), result("not ok 1", code=1), result(code=4)
        slow = result(code=KILLED, seconds=60)
        verdicts = [
            judge(ONE, passed, passed), judge(ONE, failed, failed), judge(ONE, skip, skip),
            judge(ONE, slow, slow), judge(ONE, failed, passed),
            judge(ONE, failed, passed, [failed]),
            judge(ONE, failed, passed, [], [Expected("one", ("",), "because")]),
        ]
        self.assertEqual(
            summary(verdicts),
            "5 of 7 programs same as unpatched (1 pass, 1 skip, 1 take too long, 2 fail), "
            "1 of them not the same each time, 1 of these for a cause that is not known, 1 different as expected, "
            "1 different")
        verdict = judge(Program("one", "one", several="two threads race"), failed, passed, [failed])
        self.assertIn("not the same each time (two threads race): run 2", verdict.reason)
        self.assertEqual(
            summary([verdict]), "1 of 1 programs same as unpatched (1 fail), 1 of them not the same each time")
        self.assertEqual(summary(verdicts[:1]), "1 of 1 programs same as unpatched (1 pass)")


if __name__ == "__main__":
    unittest.main()
