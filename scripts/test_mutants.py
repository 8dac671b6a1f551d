#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of mutants: python3 scripts/test_mutants.py"""

import contextlib
import importlib.util
import io
import sys
import tempfile
import unittest
from importlib.machinery import SourceFileLoader
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "mutants"
LOADER = SourceFileLoader("mutants", str(SCRIPT))
SPEC = importlib.util.spec_from_loader("mutants", LOADER)
assert SPEC is not None
mutants = importlib.util.module_from_spec(SPEC)
sys.modules["mutants"] = mutants
sys.dont_write_bytecode = True
LOADER.exec_module(mutants)

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
            self.addCleanup(setattr, mutants, name, getattr(mutants, name))
            setattr(mutants, name, self.folder / part)
        self.put("kernel/mm/a.c", "a();\nif (hole)\n\tzap();\nb();\n")
        self.put("kernel/mm/memfile.c", "c();\n")
        self.put("checkout/rust/b.rs", "true\n")
        self.put("checkout/rust/abi/mod.rs", "mod b;\n")

    def put(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def read(self, text: str) -> list:
        return mutants.read_list(self.put("list.toml", text))

    def refused(self, text: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as errors, self.assertRaises(SystemExit):
            self.read(text)
        return errors.getvalue()


class List(MutantsTest):
    def test_text_is_replaced_where_it_is(self) -> None:
        texts, wrong = mutants.all_mutated(self.read(ENTRY))
        self.assertEqual(wrong, [])
        number = mutants.number("hole")
        test = f"({{ extern int memfile_mutant; unlikely(memfile_mutant == {number}); }})"
        self.assertEqual(texts["mm/a.c"], f"a();\nif (hole && !{test})\nb();\n")

    def test_switch_is_added_once(self) -> None:
        texts, _ = mutants.all_mutated(self.read(ENTRY))
        self.assertIn("core_param(memfile_mutant", texts["mm/memfile.c"])
        self.assertIn("fn mutant(number", texts["rust/abi/mod.rs"])
        self.assertNotIn("core_param", texts["mm/a.c"])

    def test_a_mutant_may_have_several_places(self) -> None:
        texts, wrong = mutants.all_mutated(self.read(ENTRY + ALSO))
        self.assertEqual(wrong, [])
        self.assertEqual(texts["rust/b.rs"], f"!crate::abi::mutant({mutants.number('hole')})\n")

    def test_text_that_is_not_there_once_is_named(self) -> None:
        for text, times in (("", 0), ("if (hole)\n\tzap();\n" * 2, 2)):
            self.put("kernel/mm/a.c", text)
            _, wrong = mutants.all_mutated(self.read(ENTRY))
            self.assertIn(f"hole: its text is {times} times in mm/a.c", wrong[0])

    def test_mutants_do_not_share_a_text(self) -> None:
        other = ENTRY.replace('"hole"', '"other"').replace("if (hole)\n", "")
        _, wrong = mutants.all_mutated(self.read(ENTRY + other))
        self.assertEqual(wrong, ["hole and other replace the same text of mm/a.c"])

    def test_missing_file_is_named(self) -> None:
        _, wrong = mutants.all_mutated(self.read(ENTRY.replace("a.c", "z.c")))
        self.assertIn("mm/z.c: there is no such file", wrong[0])

    def test_bad_entries_are_refused(self) -> None:
        self.assertIn("fails", self.refused(ENTRY.replace('fails = ["punch.hole"]', "")))
        self.assertIn("colour", self.refused(ENTRY + "colour = 1\n"))
        self.assertIn("MUTANT", self.refused(ENTRY.replace("MUTANT", "true")))
        self.assertIn("expect", self.refused(ENTRY + 'expect = "nothing"\n'))
        self.assertIn("same name", self.refused(ENTRY + ENTRY))


class Judge(MutantsTest):
    def judge(self, expect: str, results: dict[str, str], code: int, console: str) -> str:
        mutant = self.read(ENTRY + f'expect = "{expect}"\n')[0]
        run = mutants.Mutants(self.folder / "log", [mutant])
        self.put("log/hole/serial.log", console)
        cases = {name: mutants.Case(name, status) for name, status in results.items()}
        result = {"finished": code == 0, "code": code, "reason": "why"}
        return run.judge(mutant, ["punch.hole"], result, cases)[0]

    def test_every_named_test_must_fail(self) -> None:
        self.assertEqual(self.judge("fail", {"punch.hole": "fail"}, 0, ""), "pass")
        self.assertEqual(self.judge("fail", {"punch.hole": "pass"}, 0, ""), "fail")
        self.assertEqual(self.judge("fail", {"punch.hole": "skip"}, 0, ""), "fail")
        self.assertEqual(self.judge("fail", {}, 124, ""), "fail")

    def test_a_complaint_counts_if_it_is_the_tests(self) -> None:
        mark, splat = "memfile-tests: punch.hole\n", "WARNING: at\n"
        passed = {"punch.hole": "pass"}
        self.assertEqual(self.judge("splat", passed, 0, mark + splat), "pass")
        self.assertEqual(self.judge("splat", passed, 0, splat + mark), "fail")
        self.assertEqual(self.judge("fail", passed, 0, mark + splat), "fail")

    def test_an_end_counts_if_it_is_the_expected_one(self) -> None:
        mark = "memfile-tests: punch.hole\n"
        self.assertEqual(self.judge("hang", {}, 124, mark), "pass")
        self.assertEqual(self.judge("died", {}, 255, mark), "pass")
        self.assertEqual(self.judge("died", {}, 124, mark), "fail")
        self.assertEqual(self.judge("hang", {}, 124, "memfile-tests: infra.runs\n"), "fail")
        self.assertEqual(self.judge("hang", {"punch.hole": "pass"}, 0, mark), "fail")


if __name__ == "__main__":
    unittest.main()
