#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of scripts/follow, on small trees with git: python3 scripts/test_follow.py"""

import re
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

import test_port
from memfile.load import script

follow = script("follow")


class Follow(test_port.Trees):
    """The new tree of the base class is another base; its series was moved there with one conflict."""

    def setUp(self) -> None:
        super().setUp()
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        # As solved when it was moved.
        self.own = self.edited("own", {
            "-\treturn 1;\n+\treturn hook(1);": "-\treturn 11;\n+\treturn hook(11);",
            "Subject: [PATCH 1/2] one": "Subject: [PATCH 1/2] one\n\nFor another base.",
        })

    def edited(self, name: str, texts: dict[str, str]) -> list[Path]:
        """The series, with other texts in it."""
        folder = self.folder / name
        folder.mkdir()
        for patch in self.patches:
            text = patch.read_text()
            for was, becomes in texts.items():
                text = text.replace(was, becomes)
            (folder / patch.name).write_text(text)
        return sorted(folder.glob("*.patch"))

    def follow(self, now: list[Path]) -> list[Any]:
        self.repo = self.folder / f"repo-{now[0].parent.name}"
        return list(follow.Follower(self.repo, self.base, self.new, self.patches, now, self.own).follow())

    def messages(self) -> str:
        return self.git(self.repo, "log", "--format=%s: %b", "base..followed")

    def at(self, revision: str) -> str:
        return self.git(self.repo, "show", f"{revision}:mm/shmem.c")

    def test_series_that_has_not_changed_stays(self) -> None:
        self.assertEqual(self.follow(self.patches), [])
        self.assertEqual(self.git(self.repo, "diff", "of-base", "followed"), "")
        self.assertIn("one: For another base.", self.messages())

    def test_change_goes_into_its_patch_and_what_was_solved_stays_solved(self) -> None:
        now = self.edited("now", {"+int memfile;": "+int memfile, more;", "hook(a);": "hook(a + 1);"})
        self.assertEqual(self.follow(now), [])
        self.assertIn("return hook(11);", self.at("followed~"))
        self.assertNotIn("hook(a", self.at("followed~"))
        self.assertIn("hook(a + 1);", self.at("followed"))
        self.assertEqual(self.git(self.repo, "show", "followed~:mm/memfile.c"), "int memfile, more;\n")

    def test_message_that_has_changed_is_the_new_one(self) -> None:
        self.follow(self.edited("now", {"] one": "] one\n\nOtherwise."}))
        self.assertIn("one: Otherwise.", self.messages())

    def test_new_patch_goes_in_between(self) -> None:
        now = self.edited("now", {})
        text = now[1].read_text().replace("] two", "] between")
        text = re.sub(r"(?ms)^diff --git.*", "", text)
        text += "diff --git a/mm/new.c b/mm/new.c\nnew file mode 100644\n--- /dev/null\n+++ b/mm/new.c\n@@ -0,0 +1 @@\n+int x;\n"
        between = now[0].with_name("0002-between.patch")
        between.write_text(text)
        self.assertEqual(self.follow([now[0], between, now[1]]), [])
        self.assertEqual(
            self.git(self.repo, "log", "--format=%s", "base..followed").split(), ["two", "between", "one"])
        self.assertEqual(self.git(self.repo, "diff", "--name-only", "followed~2", "followed~"), "mm/new.c\n")
        self.assertIn("return hook(11);", self.at("followed"))

    def test_new_patch_may_touch_a_file_that_no_patch_has_touched(self) -> None:
        for tree, first in ((self.base, "int base;"), (self.new, "int other;")):
            (tree / "mm/third.c").write_text(f"{first}\n\n\n\n\n\nint last;\n")
        now = self.edited("now", {})
        text = re.sub(r"(?ms)^diff --git.*", "", now[1].read_text().replace("] two", "] three"))
        text += ("diff --git a/mm/third.c b/mm/third.c\n--- a/mm/third.c\n+++ b/mm/third.c\n"
                 "@@ -5,3 +5,3 @@\n \n \n-int last;\n+int least;\n")
        third = now[0].with_name("0003-three.patch")
        third.write_text(text)
        self.assertEqual(self.follow([*now, third]), [])
        third_c = self.git(self.repo, "show", "followed:mm/third.c")
        self.assertIn("int other;", third_c)
        self.assertIn("int least;", third_c)

    def test_patch_that_is_gone_is_left_out(self) -> None:
        self.assertEqual(self.follow(self.edited("now", {})[:1]), [])
        self.assertNotIn("hook(a)", self.at("followed"))

    def test_conflict_is_named_once(self) -> None:
        results = self.follow(self.edited("now", {"+\treturn hook(1);": "+\treturn hook(1, 2);"}))
        self.assertEqual([result.name for result in results], [self.patches[0].name])
        self.assertEqual([conflict.file for conflict in results[0].conflicts], ["mm/shmem.c"])

    def test_default_base_follows_nobody(self) -> None:
        with mock.patch.object(follow.paths, "OF_BASE", ""), mock.patch.object(sys, "argv", ["follow"]), \
                mock.patch("sys.stderr"), self.assertRaises(SystemExit) as end:
            follow.main([])
        self.assertEqual(end.exception.code, 2)


if __name__ == "__main__":
    unittest.main()
