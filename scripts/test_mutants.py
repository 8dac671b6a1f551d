#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of mutants: python3 scripts/test_mutants.py"""

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

from memfile.docs.text import Row
from memfile.ktap import Case
from memfile.mutants import guards, host, results, sources
from memfile.mutants.machines import Mutants, batches, machine_of
from memfile.mutants.results import Phase

ENTRY = """
[[mutant]]
name = "hole"
what = "a hole"
file = "mm/a.c"
was = '''
if (hole)
	zap();
'''
is = "if (hole && !MUTANT)"
fails = ["punch.hole"]
"""
ALSO = "[[mutant.also]]\nfile = \"rust/b.rs\"\nwas = \"true\"\nis = \"!MUTANT\"\n"


class MutantsTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        for name, part in (("ROOT", "checkout"), ("PATCHED_TREE", "kernel")):
            (self.folder / part).mkdir()
            self.addCleanup(setattr, sources, name, getattr(sources, name))
            setattr(sources, name, self.folder / part)
        patch = mock.patch.object(host, "ROOT", self.folder / "checkout")
        patch.start()
        self.addCleanup(patch.stop)
        self.put("kernel/mm/a.c", "a();\nif (hole)\n\tzap();\nb();\n")
        self.put("kernel/mm/memfile.c", "c();\n")
        self.put("checkout/rust/b.rs", "true\n")
        self.put("checkout/rust/abi/mod.rs", "mod b;\n")
        self.put("checkout/rust/shim.c", "d();\n")

    def put(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def read(self, text: str) -> list[Any]:
        return sources.read_list(self.put("list.toml", text))

    def refused(self, text: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as errors, self.assertRaises(SystemExit):
            self.read(text)
        return errors.getvalue()


class Rows(MutantsTest):
    def problems(self, *, rows: str, tests: tuple[str, ...] = ("punch.hole",), no_mutant: str = "") -> str:
        row = Row("v7.toml", 1, "A1", tests, "", "", no_mutant)
        return "\n".join(guards.row_problems(self.read(ENTRY + f"rows = {rows}\n"), [row]))

    def test_row_and_mutant_name_the_same_test(self) -> None:
        self.assertEqual(self.problems(rows='["A1"]'), "")
        self.assertIn("names none of its tests", self.problems(rows='["A1"]', tests=("punch.other",)))
        self.assertIn("has no row A2", self.problems(rows='["A1", "A2"]'))

    def test_row_without_a_mutant_says_why(self) -> None:
        self.assertIn("does not say why", self.problems(rows="[]"))
        self.assertEqual(self.problems(rows="[]", no_mutant="It concerns cost."), "")
        self.assertIn("and has one", self.problems(rows='["A1"]', no_mutant="It concerns cost."))


class List(MutantsTest):
    def test_text_is_replaced_where_it_is(self) -> None:
        texts, wrong = sources.all_mutated(self.read(ENTRY))
        self.assertEqual(wrong, [])
        number = sources.number("hole")
        test = f"({{ extern int memfile_mutant; unlikely(memfile_mutant == {number}); }})"
        self.assertEqual(texts["mm/a.c"], f"a();\nif (hole && !{test})\nb();\n")

    def test_switch_is_added_once(self) -> None:
        texts, _ = sources.all_mutated(self.read(ENTRY))
        self.assertIn("core_param(memfile_mutant", texts["mm/memfile.c"])
        self.assertIn("fn mutant(number", texts["rust/abi/mod.rs"])
        self.assertIn("#ifdef MEMFILE_OWN_SWITCH", texts["rust/shim.c"])
        self.assertNotIn("core_param", texts["mm/a.c"])

    def test_a_mutant_may_have_several_places(self) -> None:
        texts, wrong = sources.all_mutated(self.read(ENTRY + ALSO))
        self.assertEqual(wrong, [])
        self.assertEqual(texts["rust/b.rs"], f"!crate::abi::mutant({sources.number('hole')})\n")

    def test_text_that_is_not_there_once_is_named(self) -> None:
        for text, times in (("", 0), ("if (hole)\n\tzap();\n" * 2, 2)):
            self.put("kernel/mm/a.c", text)
            _, wrong = sources.all_mutated(self.read(ENTRY))
            self.assertIn(f"hole: its text is {times} times in mm/a.c", wrong[0])

    def test_mutants_do_not_share_a_text(self) -> None:
        other = ENTRY.replace('"hole"', '"other"').replace("if (hole)\n", "")
        _, wrong = sources.all_mutated(self.read(ENTRY + other))
        self.assertEqual(wrong, ["hole and other replace the same text of mm/a.c"])

    def test_missing_file_is_named(self) -> None:
        _, wrong = sources.all_mutated(self.read(ENTRY.replace("a.c", "z.c")))
        self.assertIn("mm/z.c: there is no such file", wrong[0])

    def test_kernel_that_checks_itself_has_mutants_of_the_module_only(self) -> None:
        def found(text: str) -> str:
            with mock.patch.object(guards, "known_tests", lambda: ["punch.hole"]):
                with mock.patch.object(guards, "guarded_rows", lambda: []):
                    return "\n".join(guards.problems(self.read(text + 'kernel = "debug"\n')))

        self.assertIn("only the module", found(ENTRY))
        self.assertEqual(found(ENTRY.replace("mm/a.c", "rust/b.rs").replace("\nif (hole)\n\tzap();\n", "true")), "")

    def test_bad_entries_are_refused(self) -> None:
        self.assertIn("fails", self.refused(ENTRY.replace('fails = ["punch.hole"]', "")))
        self.assertIn("colour", self.refused(ENTRY + "colour = 1\n"))
        self.assertIn("MUTANT", self.refused(ENTRY.replace("MUTANT", "true")))
        self.assertIn("expect", self.refused(ENTRY + 'expect = "nothing"\n'))
        self.assertIn("kernel", self.refused(ENTRY + 'kernel = "plain"\n'))
        self.assertIn("same name", self.refused(ENTRY + ENTRY))


class Host(MutantsTest):
    """Copies of the engine's source for the tests of rust/host."""

    OWN = '[[host]]\nname = "own"\nwhat = "it"\nfile = "rust/b.rs"\nwas = "true"\nis = "!MUTANT"\n'
    SHARED = ENTRY.replace("mm/a.c", "rust/b.rs").replace("[[mutant]]", '[[mutant]]\nhost = "shared"')

    def read_host(self, text: str) -> dict[str, sources.Edit]:
        return host.read_host(self.folder / "list.toml", self.read(text))

    def test_each_is_the_source_with_its_mutant_enabled(self) -> None:
        self.put("checkout/rust/b.rs", "//! About b.\ntrue\nif (hole)\n\tzap();\n")
        edits = self.read_host(self.SHARED + self.OWN)
        self.assertEqual(list(host.host_problems(edits)), [])
        self.assertEqual(
            host.host_modules(edits),
            "pub(crate) mod shared {\nconst MUTANT: bool = true;\ntrue\nif (hole && !MUTANT)\n}\n"
            "pub(crate) mod own {\nconst MUTANT: bool = true;\n!MUTANT\nif (hole)\n\tzap();\n}\n")

    def test_text_that_is_not_there_once_is_named(self) -> None:
        self.put("checkout/rust/b.rs", "true true\n")
        found = list(host.host_problems(self.read_host(ENTRY + self.OWN)))
        self.assertEqual(found, ["own: its text is 2 times in rust/b.rs, not once: true"])

    def test_bad_entries_are_refused(self) -> None:
        for text in (self.OWN + 'fails = ["a.b"]\n', self.OWN * 2, self.OWN.replace("!MUTANT", "false")):
            with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
                self.read_host(ENTRY + text)


class Judge(MutantsTest):
    OUTPUT = """
@@ hole disabled
KTAP version 1
1..1
  KTAP version 1
  # Subtest: punch
  1..1
  ok 1 hole
ok 1 punch
@@ hole end 0
@@ hole enabled
@k [    1.0] KTAP version 1
@k [    1.0]     KTAP version 1
@k [    1.0]     # Subtest: memfile_range
@k [    1.0]     1..1
@k [    1.0]     not ok 1 clips
@k [    1.0] not ok 1 memfile_range
@@ hole end 1
@@ other disabled
"""

    def test_output_is_cut_into_phases(self) -> None:
        console = ["x", "[ 1.0] mutants: hole enabled", "[ 2.0] WARNING: y", "[ 3.0] mutants: other disabled"]
        found = results.phases(self.OUTPUT.splitlines(), console)
        disabled, enabled = found["hole", "disabled"], found["hole", "enabled"]
        self.assertEqual({name: case.status for name, case in disabled.cases.items()}, {"punch.hole": "pass"})
        statuses = {name: case.status for name, case in enabled.cases.items()}
        self.assertEqual(statuses, {"kunit:memfile_range.clips": "fail"})
        self.assertEqual((disabled.code, enabled.code, found["other", "disabled"].code), (0, 1, None))
        self.assertEqual((disabled.splats, enabled.splats), ([], ["[ 2.0] WARNING: y"]))

    def judge(self, expect: str, status: str, code: int | None, machine: int = 0, splats: list[str] | None = None) -> str:
        mutant = self.read(ENTRY + f'expect = "{expect}"\n')[0]
        cases = {"punch.hole": Case("punch.hole", status)} if status else {}
        phase = Phase(cases, splats or [], code)
        return results.judge(mutant, ["punch.hole"], phase, {"code": machine, "reason": "why"})[0]

    def test_every_named_test_must_fail(self) -> None:
        self.assertEqual(self.judge("fail", "fail", 1), "pass")
        self.assertEqual(self.judge("fail", "pass", 0), "fail")
        self.assertEqual(self.judge("fail", "skip", 0), "fail")
        self.assertEqual(self.judge("fail", "", None, 124), "fail")
        self.assertEqual(self.judge("fail", "", None, 255), "fail")
        self.assertEqual(self.judge("fail", "fail", None, 255), "pass")

    def test_a_complaint_counts_where_it_is_expected(self) -> None:
        self.assertEqual(self.judge("splat", "pass", 0, splats=["WARNING"]), "pass")
        self.assertEqual(self.judge("splat", "pass", 0), "fail")
        self.assertEqual(self.judge("fail", "pass", 0, splats=["WARNING"]), "fail")

    def test_an_end_counts_where_it_is_expected(self) -> None:
        self.assertEqual(self.judge("hang", "", 137), "pass")
        self.assertEqual(self.judge("hang", "", None, 124), "pass")
        self.assertEqual(self.judge("hang", "pass", 0), "fail")
        self.assertEqual(self.judge("died", "", None, 255), "pass")
        self.assertEqual(self.judge("died", "", None, 124), "fail")
        self.assertEqual(self.judge("died", "pass", 0), "fail")


class Machines(MutantsTest):
    """Mutants share a machine; boots are made up here."""

    def run_with(self, boots: list[Any], names: list[str]) -> dict[str, str]:
        text = "".join(ENTRY.replace('"hole"', f'"{name}"') for name in names)
        run = Mutants(self.folder / "log", self.read(text))
        run.known = ["punch.hole"]
        asked = []

        def boot(batch: list[Any]) -> tuple[dict[str, object], dict[Any, Any]]:
            asked.append([mutant.name for mutant in batch])
            found = {}
            for (name, state), status in boots[len(asked) - 1].items():
                cases = {"punch.hole": Case("punch.hole", status)} if status else {}
                found[name, state] = Phase(cases, [], 0 if status else None)
            return {"code": 0, "reason": "ok", "finished": True}, found

        with mock.patch.object(run, "boot", boot), contextlib.redirect_stdout(io.StringIO()):
            run.work(run.mutants)
        self.asked = asked
        return {case.name: case.status for case in run.outcome.cases}

    def test_each_passes_disabled_and_fails_enabled(self) -> None:
        good = {(n, s): r for n in "ab" for s, r in (("disabled", "pass"), ("enabled", "fail"))}
        self.assertEqual(self.run_with([good], ["a", "b"]), {"a": "pass", "b": "pass"})

    def test_a_dirty_machine_is_given_up(self) -> None:
        first = {("a", "disabled"): "pass", ("a", "enabled"): "fail", ("b", "disabled"): "fail", ("b", "enabled"): "fail"}
        second = {("b", "disabled"): "pass", ("b", "enabled"): "pass"}
        self.assertEqual(self.run_with([first, second], ["a", "b"]), {"a": "pass", "b": "fail"})
        self.assertEqual(self.asked, [["a", "b"], ["b"]])

    def test_one_that_fails_disabled_in_a_fresh_machine_is_not_found(self) -> None:
        first = {("a", "disabled"): "fail", ("a", "enabled"): "fail"}
        self.assertEqual(self.run_with([first], ["a"]), {"a": "fail"})

    def test_one_that_is_skipped_disabled_is_skipped(self) -> None:
        first = {("a", "disabled"): "skip", ("a", "enabled"): "skip"}
        self.assertEqual(self.run_with([first], ["a"]), {"a": "skip"})

    def test_a_lost_machine_loses_one_mutant(self) -> None:
        first = {("a", "disabled"): "pass", ("a", "enabled"): ""}
        second = {("b", "disabled"): "pass", ("b", "enabled"): "fail"}
        self.assertEqual(self.run_with([first, second], ["a", "b"]), {"a": "fail", "b": "pass"})
        self.assertEqual(self.asked, [["a", "b"], ["b"]])

    def test_some_have_a_machine_of_their_own(self) -> None:
        ends = {
            "a": "", "b": "alone = true\n", "c": 'expect = "died"\n', "d": 'expect = "splat"\n',
            "e": 'kernel = "debug"\n', "f": 'kernel = "debug"\n',
        }
        text = "".join(ENTRY.replace('"hole"', f'"{name}"') + end for name, end in ends.items())
        found = [[mutant.name for mutant in batch] for batch in batches(self.read(text))]
        self.assertEqual(found, [["a", "d"], ["b"], ["c"], ["e"], ["f"]])

    def test_the_machine_is_that_of_the_tests(self) -> None:
        def machine(*tests: str) -> str:
            fails = ", ".join(f'"{test}"' for test in tests)
            [mutant] = self.read(ENTRY.replace('"punch.hole"', fails))
            return machine_of(mutant)

        self.assertEqual(machine("punch.hole"), "")
        self.assertEqual(machine("hugetlb_1g.hole", "punch_1g.hole"), "hugetlb_1g")
        self.assertEqual(machine("punch.hole", "punch_1g.hole"), "")


if __name__ == "__main__":
    unittest.main()
