#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of scripts/port, on small trees with git: python3 scripts/test_port.py"""

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.load import script

port = script("port")

SHMEM = """int first(void)
{
\treturn 1;
}

int second(void)
{
\tint a = 2;

\treturn a;
}

int third(void)
{
\treturn 3;
}
"""
MAINTAINERS = "".join(f"{name}\nM:\t{name} <x@example.org>\n\n" for name in ("ALPHA", "BETA", "GAMMA"))
MAKEFILE = "VERSION = 7\nPATCHLEVEL = {}\nSUBLEVEL = 1\nEXTRAVERSION =\n"
MEMFILE = "MEMFILE\nM:\tmemfile <x@example.org>\n\n"


class Trees(unittest.TestCase):
    """A base with a series of two patches, and a new tree that each test changes."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.base = self.tree("base", 3)
        self.new = self.tree("new", 4)
        git = self.tree("git", 3)
        for words in ("init", "add -A", "commit -m base", "tag base"):
            self.git(git, *words.split())
        self.change(git, "mm/shmem.c", "return 1;", "return hook(1);")
        self.change(git, "MAINTAINERS", "GAMMA\nM", MEMFILE + "GAMMA\nM")
        (git / "mm/memfile.c").write_text("int memfile;\n")
        self.git(git, "add", "-A")
        self.git(git, "commit", "-m", "one")
        self.change(git, "mm/shmem.c", "\tint a = 2;\n", "\tint a = 2;\n\tint more = hook(a);\n")
        self.git(git, "commit", "-a", "-m", "two")
        self.git(git, "format-patch", "-q", "-o", str(self.folder / "patches"), "base")
        self.patches = sorted((self.folder / "patches").glob("*.patch"))

    def tree(self, name: str, minor: int) -> Path:
        tree = self.folder / name
        (tree / "mm").mkdir(parents=True)
        (tree / "Kbuild").touch()
        (tree / "Makefile").write_text(MAKEFILE.format(minor))
        (tree / "MAINTAINERS").write_text(MAINTAINERS)
        (tree / "mm/shmem.c").write_text(SHMEM)
        return tree

    @staticmethod
    def git(folder: Path, *words: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgSign=false", *words]
        return subprocess.run(command, cwd=folder, check=True, text=True, capture_output=True).stdout

    @staticmethod
    def change(tree: Path, name: str, was: str, becomes: str) -> None:
        text = (tree / name).read_text()
        assert text.count(was) == 1
        (tree / name).write_text(text.replace(was, becomes))

    def main(self, *words: str, code: int, build: bool = False) -> str:
        """The output of scripts/port, for this base and this series."""
        words = words if build else (*words, "--no-build")
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.object(port, "base_source", return_value=self.base), \
                mock.patch.object(port.paths, "series", return_value=self.patches), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                got = port.main([str(self.new), *words])
            except SystemExit as end:
                got = int(str(end.code))
        self.assertEqual(got, code, out.getvalue() + err.getvalue())
        return out.getvalue() + err.getvalue()

    def results(self) -> list[str]:
        self.merge = self.folder / "merge"
        return [str(result) for result in port.try_series(self.merge, self.base, self.patches, self.new)]


class Merges(Trees):
    def test_series_goes_in_where_nothing_it_touches_has_changed(self) -> None:
        self.change(self.new, "mm/shmem.c", "int third(void)", "int moved(void)\n{\n}\n\nint third(void)")
        out = self.main(code=0)
        self.assertIn("2 patches of 7.3.1 on 7.4.1: 2 go in, 0 have 0 conflicts", out)

    def test_new_tree_is_only_read(self) -> None:
        before = {path: path.read_bytes() for path in self.new.rglob("*") if path.is_file()}
        self.main(code=0)
        self.assertEqual(before, {path: path.read_bytes() for path in self.new.rglob("*") if path.is_file()})

    def test_conflict_has_its_patch_file_line_and_function(self) -> None:
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        first, second = self.results()
        self.assertEqual(first, f'{self.patches[0].name}: 1 conflict\n  mm/shmem.c:3: {port.BOTH}, after "int first(void)"')
        self.assertEqual(second, f"{self.patches[1].name}: goes in")
        self.assertIn("return hook(1);", self.main("--verbose", code=port.CONFLICTS))

    def test_lines_beside_a_change_are_told_from_lines_that_both_change(self) -> None:
        self.change(self.new, "mm/shmem.c", "\tint a = 2;\n", "\tlong a = 2;\n")
        self.change(self.new, "mm/shmem.c", "return 3;", "return 33;")
        first, second = self.results()
        self.assertEqual(first, f"{self.patches[0].name}: goes in")
        self.assertNotIn(port.BOTH, second)
        # The patches after it are tried with both changes.
        text = (self.merge / "mm/shmem.c").read_text()
        self.assertIn("\tlong a = 2;\n\tint more = hook(a);\n", text)
        self.assertIn("1 only add lines", self.main(code=port.CONFLICTS))

    def test_maintainers_keep_no_patch_out(self) -> None:
        self.change(self.new, "MAINTAINERS", "GAMMA\nM", "BETWEEN\nM:\tother <x@example.org>\n\nGAMMA\nM")
        first, _ = self.results()
        self.assertEqual(first, f"{self.patches[0].name}: goes in; placed anew in MAINTAINERS")
        text = (self.merge / "MAINTAINERS").read_text()
        self.assertIn(MEMFILE, text)
        self.assertIn("BETWEEN\nM:\tother", text)
        self.main(code=0)

    def test_text_that_both_change_stays_as_the_new_tree_has_it(self) -> None:
        for tree in (self.new, self.base):
            (tree / "Documentation").mkdir()
            (tree / "Documentation/api.rst").write_text("alpha\nbeta\ngamma\n")
        self.change(self.new, "Documentation/api.rst", "beta", "other")
        patch = self.folder / "patches/0003-three.patch"
        patch.write_text("From: x <x@example.org>\nSubject: [PATCH] three\n\n---\n--- a/Documentation/api.rst\n"
                         "+++ b/Documentation/api.rst\n@@ -1,3 +1,3 @@\n alpha\n-beta\n+memfile\n gamma\n")
        self.patches.append(patch)
        self.assertEqual(self.results()[2], "0003-three.patch: goes in; left out of Documentation/api.rst")
        self.assertEqual((self.merge / "Documentation/api.rst").read_text(), "alpha\nother\ngamma\n")

    def test_lines_that_can_be_anywhere_are_placed(self) -> None:
        function = "static inline int f(int a,\n\t\t    int b)\n{\n\treturn a;\n}\n"
        entry = "config MEMFILE\n\tbool\n\n"
        for file, added in (
            ("mm/shmem.c", '#include "memfile.h"\n'), ("a.h", "struct node;\n\n"), ("a.h", f"/* One. */\n{function}"),
            ("a.h", "#ifdef CONFIG_X\nint f(void);\n#else\n#define f() 0\n#endif\n"), ("a.h", "#define A 1\n"),
            ("Kconfig", entry), ("mm/Makefile", "obj-$(CONFIG_MEMFILE) += memfile.o\n"),
        ):
            self.assertTrue(port.movable(file, added, "x;\n", "x;\n"), added)
        for file, added in (
            ("mm/shmem.c", "\tcall();\n"), ("mm/shmem.c", "out:\n"), ("mm/shmem.c", "int f(void)\n{\n"), ("a.h", "}\n"),
            ("a.h", "#endif\n"), ("a.h", "#else\nint x;\n"), ("a.h", "#ifdef CONFIG_X\n\tcall();\n#endif\n"),
            ("Kconfig", "\tselect MEMFILE\n"), ("mm/Makefile", "\tcc memfile.o\n"), ("a.rs", "use x;\n"),
        ):
            self.assertFalse(port.movable(file, added, "x;\n", "x;\n"), added)
        self.assertFalse(port.movable("a.h", "#define A 1\n", "#define X \\\n", ""))
        for taken in ("#define F_B 0x1\n", "#define F_B\t0x1 /* b */\n"):
            self.assertFalse(port.movable("a.h", "#define F_A 0x1\n", "", taken))
        for other in ("#define G_B 0x1\n", "#define F_B 0x2\n"):
            self.assertTrue(port.movable("a.h", "#define F_A 0x1\n", "", other))

    def test_file_that_is_gone_is_named(self) -> None:
        (self.new / "mm/other.c").write_text((self.new / "mm/shmem.c").read_text())
        (self.new / "mm/shmem.c").unlink()
        first, second = self.results()
        self.assertEqual(first, f"{self.patches[0].name}: 1 conflict\n  mm/shmem.c: {port.GONE}")
        self.assertIn(port.GONE, second)

    def test_file_that_both_add_conflicts(self) -> None:
        (self.new / "mm/memfile.c").write_text("int another;\n")
        self.assertIn("mm/memfile.c:1: ", self.results()[0])

    def test_patch_that_is_there_already_is_told(self) -> None:
        self.change(self.new, "mm/shmem.c", "\tint a = 2;\n", "\tint a = 2;\n\tint more = hook(a);\n")
        self.assertEqual(self.results()[1], f"{self.patches[1].name}: is in the new tree already")

    def test_settings_of_git_change_nothing(self) -> None:
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        config = self.folder / "config"
        config.write_text("[merge]\n\tconflictStyle = merge\n[core]\n\tautocrlf = true\n[rerere]\n\tenabled = true\n")
        with mock.patch.dict("os.environ", {"GIT_CONFIG_GLOBAL": str(config)}):
            self.assertIn("mm/shmem.c:3: ", self.results()[0])

    def test_folder_that_is_no_kernel_is_refused(self) -> None:
        (self.new / "Kbuild").unlink()
        self.assertIn("is not a source tree of the kernel", self.main(code=port.TOOL))


class Work(Trees):
    """--work, with a real scripts/work-tree."""

    def work(self, code: int) -> str:
        return self.main("--work", str(self.folder / "work"), code=code)

    def test_work_tree_has_a_commit_for_each_patch(self) -> None:
        self.assertIn("all patches are in", self.work(0))
        work = self.folder / "work"
        self.assertEqual(self.git(work, "log", "--format=%s", "base..HEAD").split(), ["two", "one"])
        self.assertEqual(self.git(work, "status", "--porcelain"), "")

    def test_work_tree_has_what_can_be_anywhere_in_its_place(self) -> None:
        git = self.folder / "git"
        self.git(git, "checkout", "-q", "base")
        for tree in (self.base, self.new, git):
            self.change(tree, "mm/shmem.c", "int first(void)", "#include <a.h>\n\nint first(void)")
        self.git(git, "commit", "-a", "-m", "base with an include")
        self.change(git, "mm/shmem.c", "#include <a.h>\n", "#include <a.h>\n#include <memfile.h>\n")
        self.change(git, "mm/shmem.c", "return 1;", "return hook(1);")
        self.git(git, "commit", "-a", "-m", "one")
        self.git(git, "format-patch", "-q", "-1", "-o", str(self.folder / "include"))
        self.patches = list((self.folder / "include").glob("*.patch"))
        self.change(self.new, "mm/shmem.c", "#include <a.h>", "#include <b.h>")
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        out = self.work(port.CONFLICTS)
        self.assertIn("1 conflict; placed anew in mm/shmem.c", out)
        now = (self.folder / "work/mm/shmem.c").read_text()
        self.assertIn("#include <b.h>\n#include <memfile.h>\n", now)
        self.assertEqual(len(port.CONFLICT.findall(now)), 1)

    def test_work_tree_stops_at_a_conflict_and_goes_on_behind_it(self) -> None:
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        self.assertIn("mm/shmem.c:3: ", self.work(port.CONFLICTS))
        self.assertIn("a patch that is not solved", self.work(port.TOOL))
        work = self.folder / "work"
        text = (work / "mm/shmem.c").read_text()
        (work / "mm/shmem.c").write_text(port.CONFLICT.sub("\treturn hook(11);\n", text))
        self.git(work, "add", "-f", "mm/shmem.c")
        self.git(work, "-c", "core.editor=true", "cherry-pick", "--continue")
        self.assertNotIn(self.patches[0].name, self.work(0))
        self.assertEqual(self.git(work, "log", "--format=%s", "base..HEAD").split(), ["two", "one"])
        self.assertIn("return hook(11);", (work / "mm/shmem.c").read_text())


class Turns(Trees):
    """The tree of scripts/apply-patches."""

    def turn(self, how: str, code: int) -> str:
        return self.main("--turn", how, "--into", str(self.folder / f"{how}-{code}"), code=code)

    def test_what_does_not_come_off_is_named_and_not_what_does_not_go_on(self) -> None:
        self.turn("on", 0)
        shutil.copytree(self.folder / "on-0", self.new, dirs_exist_ok=True)
        self.assertIn("hook(a)", (self.new / "mm/shmem.c").read_text())
        self.assertEqual(self.turn("off", 0), "")
        self.change(self.new, "mm/shmem.c", "hook(a);", "hook(a + 1);")
        self.assertEqual(
            self.turn("off", port.CONFLICTS),
            f'{self.patches[1].name}, to be taken off: 1 conflict\n'
            f'  mm/shmem.c:9: {port.BOTH}, after "int second(void)"\n')
        self.assertIn(f"{self.patches[1].name}: 1 conflict\n  mm/shmem.c:9: {port.BESIDE}", self.turn("on", port.CONFLICTS))


class Builds(Trees):
    """What goes in is handed over to be built; nothing is built here."""

    def build(self, failed: int, code: int) -> tuple[list[str], list[str]]:
        seen: list[list[str]] = []
        run = subprocess.run

        def instead(command: list[str], **options: object) -> object:
            if not command[0].endswith("build-series"):
                return run(command, **options)  # type: ignore[call-overload]
            seen.append(command)
            seen.append((Path(command[-1]) / "series").read_text().split())
            return subprocess.CompletedProcess(command, failed)

        with mock.patch.object(port.subprocess, "run", instead):
            self.main(code=code, build=True)
        return (seen[0], seen[1]) if seen else ([], [])

    def test_each_patch_is_built_on_the_new_tree(self) -> None:
        command, series = self.build(0, 0)
        self.assertEqual(command[1:4], ["--source", str(self.new.resolve()), "--series"])
        self.assertEqual(series, [path.name for path in self.patches])

    def test_patch_that_does_not_build_has_an_exit_code(self) -> None:
        self.build(2, port.DOES_NOT_BUILD)

    def test_patches_are_built_up_to_the_first_that_conflicts(self) -> None:
        self.change(self.new, "mm/shmem.c", "\tint a = 2;\n", "\tlong a = 2;\n")
        self.assertEqual(self.build(0, port.CONFLICTS)[1], [self.patches[0].name])

    def test_nothing_is_built_if_the_first_conflicts(self) -> None:
        self.change(self.new, "mm/shmem.c", "return 1;", "return 11;")
        self.assertEqual(self.build(0, port.CONFLICTS), ([], []))


if __name__ == "__main__":
    unittest.main()
