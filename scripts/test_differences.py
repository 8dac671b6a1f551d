#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of differences: python3 scripts/test_differences.py"""

import contextlib
import io
import json
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths
from memfile.differences import documents
from memfile.ktap import parse
from memfile.load import script

differences = script("differences")

REASONS = """
[[kind]]
suffix = "_b_m"
name = "b, mapped"
what = "the third"
[[kind]]
suffix = "_b"
name = "b"
what = "the other"
[[difference]]
title = "Reading"
why = "b has no such call."
on = ["_b"]
tests = ["a.read"]
does = ["EINVAL"]
[[missing]]
title = "Sizes"
why = "b has one."
on = ["_b", "_b_m"]
tests = ["own.*"]
"""

KTAP = """KTAP version 1
1..3
  KTAP version 1
  # Subtest: a
  1..2
  # does: read -> EPERM
  # does: read -> EPERM
  ok 1 read
  ok 2 same
ok 1 a
  KTAP version 1
  # Subtest: a_b
  1..2
  # does: read -> {}
  ok 1 read
  ok 2 same
ok 2 a_b
  KTAP version 1
  # Subtest: a_b_m
  1..2
  # does: read -> EPERM
  ok 1 read
  ok 2 same
ok 3 a_b_m
"""
NAMES = ["a.read", "a.same", "own.x", "a_b.read", "a_b.same", "a_b_m.read", "a_b_m.same"]


class Differences(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        program = self.folder / "memfile-tests"
        program.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in NAMES))
        program.chmod(0o755)
        for name, path in (
            ("REASONS", "r.toml"), ("RECORD", "differences.json"), ("DOCUMENT", "differences.rst"),
        ):
            for module in (differences, documents):
                patch = unittest.mock.patch.object(module, name, self.folder / path)
                patch.start()
                self.addCleanup(patch.stop)
        patch = unittest.mock.patch.object(paths, "TESTS", program)
        patch.start()
        self.addCleanup(patch.stop)
        (self.folder / "r.toml").write_text(REASONS)

    def run_on(self, *options: str, ktap: str = "", does: str = "EINVAL") -> tuple[int, str]:
        path = self.folder / "ktap"
        path.write_text(ktap or KTAP.format(does))
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = differences.main([*options] if "--check" in options else ["--ktap", str(path), *options])
            except SystemExit as stop:
                code = stop.code
        return code, output.getvalue()

    def test_listed_difference_is_no_problem(self) -> None:
        self.assertEqual(self.run_on(), (0, "2 tests on several kinds, 1 differences; 0 problems\n"))

    def test_other_difference_is_a_problem(self) -> None:
        code, output = self.run_on(does="ENODEV")
        self.assertEqual(code, 1)
        self.assertIn("a_b.read: read: ENODEV, and on a memfile EPERM: not in the list", output)

    def test_another_kind_needs_its_own_entry(self) -> None:
        ktap = KTAP.format("EINVAL").replace("a_b_m\n  1..2\n  # does: read -> EPERM", "a_b_m\n  1..2\n  # does: read -> EINVAL")
        self.assertIn("a_b_m.read: read: EINVAL", self.run_on(ktap=ktap)[1])

    def test_what_only_one_sees_is_a_problem(self) -> None:
        ktap = KTAP.format("EPERM").replace("  # does: read -> EPERM\n", "", 1)
        ktap = ktap.replace("  # does: read -> EPERM\n", "", 1)
        self.assertIn("read: EPERM, and on a memfile -", self.run_on(ktap=ktap)[1])

    def test_difference_that_does_not_occur_is_a_problem_of_a_complete_run(self) -> None:
        self.assertEqual(self.run_on(does="EPERM")[0], 0)
        self.run_on("--write", "--complete", does="EPERM")
        code, output = self.run_on("--complete", does="EPERM")
        self.assertEqual(code, 1)
        self.assertIn('"Reading": a.read is not different on _b any more', output)

    def test_test_of_a_memfile_only_must_be_listed(self) -> None:
        reasons = self.folder / "r.toml"
        reasons.write_text(REASONS.replace("own.*", "other.*"))
        self.run_on("--write", "--complete")
        code, output = self.run_on("--complete")
        self.assertEqual(code, 1)
        self.assertIn("own.* runs on a memfile and not on _b_m: not in the list", output)
        self.assertIn("other.* runs on _b, or on no memfile", output)

    def test_skip_on_another_kind_only_is_a_difference(self) -> None:
        ktap = KTAP.format("EINVAL").replace("  ok 2 same\nok 2 a_b", "  ok 2 same # SKIP why\nok 2 a_b")
        self.assertIn("a_b.same: skipped: why", self.run_on(ktap=ktap)[1])

    def test_skip_on_a_memfile_compares_nothing(self) -> None:
        ktap = KTAP.format("ENODEV").replace("ok 1 read", "ok 1 read # SKIP why", 1)
        self.assertEqual(self.run_on(ktap=ktap)[0], 0)

    def test_documents_are_of_the_run(self) -> None:
        self.assertEqual(self.run_on("--check")[0], 2)
        self.assertEqual(self.run_on("--write", "--complete")[0], 0)
        self.assertEqual(self.run_on("--check")[0], 0)
        self.assertEqual(self.run_on("--complete")[0], 0)
        text = (self.folder / "differences.rst").read_text()
        for part in ("* - ``a.read``\n     - read\n     - EPERM\n     - EINVAL", "b has no such call.", "``own.*``"):
            self.assertIn(part, text)
        # Another run, another text, another record.
        self.assertIn("has a.read otherwise", self.run_on("--complete", does="ENODEV")[1])
        (self.folder / "differences.rst").write_text(text + "\n")
        self.assertIn("differences.rst is not what", self.run_on("--check")[1])
        record = json.loads((self.folder / "differences.json").read_text())
        record["seen"]["a.read"]["_b"]["read"] = "EPERM"
        (self.folder / "differences.json").write_text(json.dumps(record))
        self.assertEqual(self.run_on("--check")[0], 1)

    def test_page_has_differences_and_problems(self) -> None:
        page = self.folder / "page"
        self.run_on("--complete", "--write")
        record = json.loads((self.folder / "differences.json").read_text())
        record["seen"]["a.kept"] = {"": {"open": "works"}, "_b": {"open": "works"}}
        (self.folder / "differences.json").write_text(json.dumps(record))
        self.run_on("--html", str(page))
        self.assertIn("<td class=word>EINVAL</td>", page.read_text())
        # What the demo does not run is that of the record.
        self.assertIn("<td class=word>a.kept</td><td class=word>open: works</td><td class=word>b</td>", page.read_text())
        self.assertIn("<p>b has one.</p>", page.read_text())
        self.run_on("--html", str(page), does="ENO<DEV")
        self.assertIn("<strong>a_b.read: read: ENO&lt;DEV", page.read_text())

    def test_observations_do_not_hide_the_reason_of_a_failure(self) -> None:
        cases = parse(KTAP.format("EINVAL").splitlines())
        self.assertEqual(cases[0].does, {"read": ["EPERM"]})
        self.assertEqual(cases[0].output, [])


if __name__ == "__main__":
    unittest.main()
