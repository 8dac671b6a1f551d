#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of check-docs: python3 scripts/test_check_docs.py"""

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.docs import porting, rules
from memfile.load import script

check_docs = script("check-docs")

PROPERTY = "cargo:rust/host/src/properties.rs::overlap_is_symmetric_and_agrees_with_intersection"
KUNIT = "kunit:memfile_range.neighbours_do_not_overlap"


class CheckDocs(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        program = self.folder / "memfile-tests"
        program.write_text("#!/bin/sh\necho punch.hole\necho guest.runs\n")
        program.chmod(0o755)
        # Most tests are not about the rules that a tree cites.
        (self.folder / "empty").mkdir()
        self.options = ["--program", str(program), "--tree", str(self.folder / "empty")]

    def run_on(self, text: str, *options: str, name: str = "a.rst") -> tuple[int, str]:
        document = self.folder / name
        document.write_text(text)
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = check_docs.main([*self.options, *options, str(document)])
            except SystemExit as stop:
                code = stop.code
        return code, output.getvalue()

    def results(self, cases: dict[str, str]) -> list[str]:
        path = self.folder / "result.json"
        path.write_text(json.dumps({"cases": [{"name": n, "status": s} for n, s in cases.items()]}))
        return ["--results", str(path)]

    def row(self, *fields: str, number: str = "A1") -> str:
        text = ("defect", "raised", "memfile")
        return "\n".join(["[[row]]", f'number = "{number}"', *(f'{name} = "a"' for name in text), *fields, ""])

    def test_tests_that_exist(self) -> None:
        text = f"``punch.hole``, ``node.rs`` and ``a->b``\n``{KUNIT}`` ``{PROPERTY}``\n"
        self.assertEqual(self.run_on(text)[0], 0)

    def test_tests_that_do_not_exist(self) -> None:
        for name in ("punch.hol", "kunit:memfile_range.no", "kunit:", PROPERTY + "x", "cargo:a.rs::b"):
            code, output = self.run_on(f"well ``punch.hole``\nand ``{name}``\n")
            self.assertEqual(code, 1, name)
            self.assertIn(f"a.rst:2: {name}: there is no such test", output)

    def test_names_of_the_runner(self) -> None:
        self.assertEqual(self.run_on("``upstream.memfd_test`` ``runner.hang``")[0], 0)
        self.assertEqual(self.run_on("``upstream.memfd_tes``")[0], 1)

    def test_document_that_names_nothing(self) -> None:
        self.assertEqual(self.run_on("no test")[0], 2)

    def test_program_that_is_not_there(self) -> None:
        self.assertEqual(self.run_on("``punch.hole``", "--program", "/nonexistent")[0], 2)

    def test_results(self) -> None:
        text = f"``punch.hole``\n``{KUNIT}``\n``{PROPERTY}``\n"
        good = {
            "punch.hole": "pass",
            "kunit.memfile_range.neighbours_do_not_overlap": "pass",
            "host.rust_host.properties::overlap_is_symmetric_and_agrees_with_intersection": "pass",
        }
        self.assertEqual(self.run_on(text, *self.results(good))[0], 0)
        for name in good:
            for status, words in (("fail", "failed"), ("skip", "was skipped"), ("", "did not run")):
                cases = {k: v for k, v in good.items() if k != name}
                cases |= {name: status} if status else {}
                code, output = self.run_on(text, *self.results(cases))
                self.assertEqual(code, 1, f"{name} {status}")
                self.assertIn(words, output)
        skipped = self.results({**good, "punch.hole": "skip"})
        self.assertEqual(self.run_on(text, "--allow-skips", *skipped)[0], 0)

    def test_results_that_are_none(self) -> None:
        path = self.folder / "bad.json"
        for text in ("", "[]", "{}", '{"cases": [1]}'):
            path.write_text(text)
            self.assertEqual(self.run_on("``punch.hole``", "--results", str(path))[0], 2, text)

    def test_cited_rules(self) -> None:
        def cited(text: str) -> list[int]:
            return [rule for rule, _ in rules.cited_rules(text)]

        self.assertEqual(cited("// (rule 3)"), [3])
        self.assertEqual(cited("Rules 9, 14 and 21; rule 2, rule 5"), [9, 14, 21, 2, 5])
        self.assertEqual(cited("rules 6 to 9, 13 to 15"), [6, 7, 8, 9, 13, 14, 15])
        self.assertEqual(cited("(rules 18\n//! and 19)"), [18, 19])
        self.assertEqual(cited("+ * see rule\n+ * 16: nothing sleeps"), [16])
        self.assertEqual(cited("the rule of 3, overruled 4 times, rules for 5"), [])

    def test_every_cited_rule_exists(self) -> None:
        tree = self.folder / "tree"
        (tree / "target").mkdir(parents=True)
        (tree / "target/built.rs").write_text(f"// rule {98}\n")
        (tree / "a.rs").write_text("// Rule 14\n")
        self.assertEqual(self.run_on("``punch.hole``", "--tree", str(tree))[0], 0)
        (tree / "a.rs").write_text(f"// rules 14\n// and {99}\n")
        code, output = self.run_on("``punch.hole``", "--tree", str(tree))
        self.assertEqual(code, 1)
        self.assertIn(f"a.rs:1: rule {99}: there is no such rule", output)

    def test_rule_that_is_there_twice(self) -> None:
        document = self.folder / "rules.rst"
        document.write_text("Rule 1: a\n---------\n\nRule 1: b\n---------\n")
        rule, found = rules.rule_problems(self.folder / "empty", document)
        self.assertEqual(rule, {1})
        self.assertEqual(found, [f"{document}: rule 1 is there twice"])

    def test_functions_that_rules_are_kept_in(self) -> None:
        good = ("rust/policy/range.rs: frames_of()", "mm/memfile.c: memfile_create()", "mm/shmem.c: shmem_fallocate()")
        for name in good:
            self.assertEqual(self.run_on(f"``punch.hole`` ``{name}``")[0], 0, name)
        for name in ("rust/policy/range.rs: frames_off()", "rust/policy/no.rs: frames_of()",
                     "mm/memfile.c: memfile_creat()", "mm/slub.c: memfile_create()"):
            code, output = self.run_on(f"``punch.hole``\n``{name}``")
            self.assertEqual(code, 1, name)
            self.assertIn(f"a.rst:2: {name}: there is no such function", output)

    def test_each_file_of_the_patches_has_a_row_in_porting(self) -> None:
        text = check_docs.PORTING.read_text()
        self.assertEqual(porting.porting_problems(check_docs.PORTING, text), [])
        for was, becomes, problem in (
            ("``arch/x86/kvm/mmu/tdp_mmu.c``", "", "arch/x86/kvm/mmu/tdp_mmu.c: it has no row, but a patch of"),
            ("``paging_tmpl.h``", "``mmu.h``", "arch/x86/kvm/mmu/mmu.h: no patch changes it"),
            ("``tools/testing/selftests/``", "``tools/testing/selftests/kvm/``", "memfd/inaccessible_test.c: it has no row"),
        ):
            table = text.partition("\nThe move to 7.2\n")[0]
            self.assertEqual(table.count(was), 1)
            found = porting.porting_problems(check_docs.PORTING, table.replace(was, becomes))
            self.assertIn(problem, "\n".join(found))

    def test_names_of_the_table_of_porting(self) -> None:
        row = "   * - ``a/b/c.c``, ``d.h``,\n       ``Kconfig``\n     - ``x.c``\n     - ``y.c``\n"
        text = f"Files that the shim touches\n===========================\n\n{row}   * - ``Makefile``\n     - \n\nNext\n====\n{row}"
        self.assertEqual(list(porting.named(text)), [(4, "a/b/c.c"), (4, "a/b/d.h"), (5, "a/b/Kconfig"), (8, "Makefile")])

    def test_rows(self) -> None:
        other = self.row('tests = ["guest.runs"]', number="A2")

        def run(fields: tuple[str, ...], *options: str) -> tuple[int, str]:
            return self.run_on(other + self.row(*fields), *options, name="v7.toml")

        tests, untested, missing = 'tests = ["punch.hole"]', 'untested = "does not apply"', 'open = "half of it"'
        for good in ((tests,), (untested,), (missing,), (missing, tests)):
            self.assertEqual(run(good)[0], 0, good)
        for bad in ((), (tests, untested), ("tests = []",), ('untested = ""',)):
            code, output = run(bad)
            self.assertEqual(code, 1, bad)
            self.assertIn("v7.toml:8: row A1: does not name tests or say why", output)
        code, output = run(('tests = ["punch.hol"]',))
        self.assertEqual(code, 1)
        self.assertIn("v7.toml:8: punch.hol: there is no such test", output)
        self.assertEqual(run((tests,), "--closed")[0], 0)
        self.assertEqual(run((missing,), "--closed")[0], 1)

    def test_file_of_rows_that_is_none(self) -> None:
        row = self.row('tests = ["guest.runs"]')
        for text in ("[[row", "[row]", self.row('test = "guest.runs"'), row + row, row.replace('raised = "a"', "")):
            self.assertEqual(self.run_on(text, name="v7.toml")[0], 2, text)


if __name__ == "__main__":
    unittest.main()
