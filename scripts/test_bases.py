#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of the parts that depend on the base, the kernel that the patches are for: python3 scripts/test_bases.py

Nothing is built: tools of the same names say what they were called with.
"""

import re
import subprocess
import sys
import unittest
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.paths import ROOT
from memfile.surroundings import Surroundings

BASES = sorted(path.parent.name for path in (ROOT / "patches").glob("[0-9]*/BASE"))
DEFAULT = re.sub(r"^#.*\n", "", (ROOT / "patches/DEFAULT").read_text(), flags=re.M).strip()

# The paths that both lib.sh and memfile/paths.py have.
IN_SHELL = """#!/bin/bash -p
. "$(dirname "$0")/lib.sh"
name=$(flavour_name plain)
printf '%s\\n' "$PATCHES" "$BUILD/$name" "$(module_folder "$name")/memfile.ko" "$PATCHED_TREE" "$MUTANTS" \\
	"$BUILD/$(flavour_name upstream)/bin" "$KERNEL"
"""
IN_PYTHON = """import sys
sys.path.insert(0, "scripts")
from memfile import paths
tree = paths.build_tree("plain")
print(*[paths.PATCHES, tree, paths.module(tree), paths.patched_tree(), paths.MUTANTS, paths.UPSTREAM,
        paths.kernel_version()], sep="\\n")
"""
PATCH = """From: x <x@example.org>
Subject: [PATCH] one

---
--- a/MAINTAINERS
+++ b/MAINTAINERS
@@ -1,2 +1,3 @@
 alpha
+memfile
 beta
--- a/mm/shmem.c
+++ b/mm/shmem.c
@@ -1,2 +1,3 @@
 int first;
+int hook;
 int second;
"""


class Bases(Surroundings):
    def setUp(self) -> None:
        super().setUp()
        self.copy = self.copy_of_checkout("checkout")
        (self.copy / "scripts/show").write_text(IN_SHELL)
        (self.copy / "scripts/show").chmod(0o755)

    def names(self, base: str, *command: str) -> list[str]:
        env = {**self.settings, **({"BASE": base} if base else {})}
        run = self.run_it(*(command or ("scripts/show",)), env=env, cwd=self.copy)
        self.assertEqual(run.returncode, 0, run.stderr)
        return run.stdout.splitlines()

    def test_shell_and_python_agree_on_the_base_and_its_paths(self) -> None:
        for base in ("", *BASES):
            with self.subTest(base):
                self.assertEqual(self.names(base), self.names(base, sys.executable, "-ESc", IN_PYTHON))

    def test_no_two_bases_share_what_is_built(self) -> None:
        all_names = [self.names(base) for base in BASES]
        for names in zip(*all_names):
            self.assertEqual(len(set(names)), len(BASES), names)

    def test_default_base_is_as_none(self) -> None:
        self.assertEqual(self.names(""), self.names(DEFAULT))

    def test_base_without_patches_is_refused(self) -> None:
        for base in ("9.9", "qemu-10.0", "../patches/7.3", "7"):
            for command in (("scripts/fetch-kernel",), ("scripts/build-kernel",), ("scripts/boot", "true")):
                with self.subTest(base=base, command=command):
                    run = self.run_it(*command, env={**self.settings, "BASE": base})
                    self.assert_refuses(run, f"no patches for BASE={base}", *BASES)

    def test_make_hands_the_base_on(self) -> None:
        for words, env in ((["BASE=9.9"], {}), ([], {"BASE": "9.9"})):
            run = self.run_it("/usr/bin/make", "module", *words, env={**self.settings, **env})
            self.assertIn("no patches for BASE=9.9", run.stderr)

    def test_each_base_has_all_patches_of_the_default(self) -> None:
        def subjects(base: str) -> list[str]:
            lines = (ROOT / f"patches/{base}/series").read_text().splitlines()
            return [line.split("#")[0].strip() for line in lines if line and not line.startswith("#")]

        for base in BASES:
            with self.subTest(base):
                self.assertEqual(subjects(base), subjects(DEFAULT))

    def test_other_message_of_a_patch_builds_nothing_anew(self) -> None:
        def series_id() -> str:
            return self.names("", "scripts/show")[0]

        (self.copy / "scripts/show").write_text('#!/bin/bash -p\n. "$(dirname "$0")/lib.sh"\nseries_id\n')
        patches = self.copy / "patches" / DEFAULT
        (patches / "series").write_text("0001-one.patch\n0002-two.patch\n")
        one, two = patches / "0001-one.patch", patches / "0002-two.patch"
        text = "From: x <x@example.org>\nSubject: [PATCH] one\n\n---\ndiff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -1 +1 @@\n-1\n+2\n"
        one.write_text(text)
        two.write_text(text.replace("/f", "/g"))
        before = series_id()
        for path in (one, two):
            path.write_text(path.read_text().replace("] one", "] other").replace("\n---\n", "\nFixes: x\n---\n", 1))
        self.assertEqual(series_id(), before)
        for path in (one, two):
            was = path.read_text()
            path.write_text(was.replace("+2\n", "+3\n"))
            self.assertNotEqual(series_id(), before)
            path.write_text(was)

    def test_kernel_is_built_from_the_source_of_its_base(self) -> None:
        for base in BASES:
            version = self.run_it("bash", "-c", f". patches/{base}/BASE; echo $KERNEL").stdout.strip()
            (self.cache / f"src/base-{version}").mkdir(parents=True)
            (self.cache / f"src/base-{version}/Makefile").touch()
            run = self.run_it("scripts/build-kernel", "base", env={**self.settings, "BASE": base})
            self.assertEqual(run.returncode, 0, run.stderr)
            argv = self.calls("make")[-1]["argv"]
            self.assertIn(f"{self.cache}/src/base-{version}", argv)
            out = Path(next(word[2:] for word in argv if word.startswith("O=")))
            self.assertEqual(out.name, "base" if base == DEFAULT else f"base-{base}")
            self.assertEqual(out.resolve().parent.name, f"base-{version}")

    def test_build_folder_of_an_older_source_is_not_used_again(self) -> None:
        version = self.run_it("bash", "-c", f". patches/{DEFAULT}/BASE; echo $KERNEL").stdout.strip()
        for name in (version, "7.0.1"):
            (self.cache / f"src/base-{name}/build-base").mkdir(parents=True)
            (self.cache / f"src/base-{name}/Makefile").touch()
        (self.cache / "build").mkdir()
        (self.cache / "build/base").symlink_to(self.cache / "src/base-7.0.1/build-base")
        run = self.run_it("scripts/build-kernel", "base")
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual((self.cache / "build/base").resolve().parent.name, f"base-{version}")


class Tree(Surroundings):
    """A tree for scripts/apply-patches, with a series of one patch."""

    def setUp(self) -> None:
        super().setUp()
        self.copy = self.copy_of_checkout("checkout")
        patches = self.copy / "patches" / DEFAULT
        (patches / "series").write_text("0001-one.patch\n")
        (patches / "0001-one.patch").write_text(PATCH)
        self.tree = self.folder / "tree"
        (self.tree / "mm").mkdir(parents=True)
        (self.tree / "Kbuild").touch()
        (self.tree / "Makefile").write_text("VERSION = 7\nPATCHLEVEL = 2\n")
        (self.tree / "mm/shmem.c").write_text("int first;\nint second;\n")
        (self.tree / "MAINTAINERS").write_text("alpha\nbeta\n")

    def apply(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run_it("scripts/apply-patches", *words, self.tree, cwd=self.copy)

    def content(self) -> tuple[str, str]:
        return (self.tree / "mm/shmem.c").read_text(), (self.tree / "MAINTAINERS").read_text()


class Apply(Tree):
    """Patches that fit, and some that do not."""

    def assert_turns(self, maintainers: str, patched: str) -> None:
        (self.tree / "MAINTAINERS").write_text(maintainers)
        before = self.content()
        for words, message, content in (
            ((), "1 patches applied", ("int first;\nint hook;\nint second;\n", patched)),
            ((), "1 patches already applied", ("int first;\nint hook;\nint second;\n", patched)),
            (("--reverse",), "1 patches taken off", before),
            (("--reverse",), "1 patches already taken off", before),
        ):
            run = self.apply(*words)
            self.assertIn(message, run.stdout, run.stderr)
            self.assertEqual(self.content(), content)

    def test_what_is_no_code_keeps_no_patch_out(self) -> None:
        self.assert_turns("alpha\nbeta\n", "alpha\nmemfile\nbeta\n")
        self.assert_turns("other\nnames\n", "other\nnames\n")

    def test_code_that_does_not_fit_leaves_the_tree_as_it_was(self) -> None:
        (self.tree / "mm/shmem.c").write_text("int other;\n")
        before = self.content()
        run = self.apply()
        self.assertEqual((run.returncode, self.content()), (2, before))
        self.assertIn("0001-one.patch does not fit mm/shmem.c", run.stderr)

    @unittest.skipUnless("7.2" in BASES and DEFAULT != "7.2", "the tree has the version of no other base")
    def test_base_of_the_trees_version_is_named(self) -> None:
        (self.tree / "mm/shmem.c").write_text("int other;\n")
        self.assertIn("try BASE=7.2", self.apply().stderr)


class Merges(Tree):
    """Patches that do not fit, and the source that they are made for is there."""

    BODY = "int f(void)\n{\n\tone();\n\ttwo();\n}\n"

    def setUp(self) -> None:
        super().setUp()
        self.base = self.cache / f"src/base-{self.version()}"
        for name, text in (("mm/shmem.c", "int first;\nint second;\n"), ("MAINTAINERS", "alpha\nbeta\n"), ("Makefile", "")):
            (self.base / name).parent.mkdir(parents=True, exist_ok=True)
            (self.base / name).write_text(text)

    def version(self) -> str:
        return self.run_it("bash", "-c", f". patches/{DEFAULT}/BASE; echo $KERNEL").stdout.strip()

    def series(self, was: str, becomes: str, now: str) -> None:
        """A patch from one text of mm/shmem.c to another, and the text that the tree has."""
        (self.base / "mm/shmem.c").write_text(was)
        lines = [f"-{line}\n" for line in was.splitlines()] + [f"+{line}\n" for line in becomes.splitlines()]
        counts = f"@@ -1,{was.count(chr(10))} +1,{becomes.count(chr(10))} @@\n"
        head = PATCH[: PATCH.index("--- a/MAINTAINERS")]
        (self.copy / "patches" / DEFAULT / "0001-one.patch").write_text(
            f"{head}--- a/mm/shmem.c\n+++ b/mm/shmem.c\n{counts}{''.join(lines)}")
        (self.tree / "mm/shmem.c").write_text(now)
        # The tree is of no other base.
        (self.tree / "Makefile").write_text("VERSION = 9\nPATCHLEVEL = 1\n")

    def assert_merges(self, patched: str) -> None:
        before = self.content()[0]
        for words, message, content in (
            (("--check",), "1 patches can be applied by merges", before),
            ((), "1 patches applied by merges", patched),
            ((), "1 patches already applied", patched),
            (("--check", "--reverse"), "1 patches can be taken off by merges", patched),
            (("--reverse",), "1 patches taken off by merges", before),
            (("--reverse",), "1 patches already taken off", before),
        ):
            run = self.apply(*words)
            self.assertIn(message, run.stdout, run.stderr)
            self.assertEqual((run.returncode, self.content()[0]), (0, content), words)

    def assert_refused(self) -> None:
        before = self.content()
        run = self.apply()
        self.assertEqual((run.returncode, self.content()), (2, before))
        self.assertRegex(run.stderr, r"0001-one\.patch: 1 conflict mm/shmem\.c:\d+: .*is left as it was")

    def test_what_others_changed_elsewhere_is_merged(self) -> None:
        far = "".join(f"int far{number};\n" for number in range(4))
        self.series(self.BODY + far, self.BODY.replace("one", "hook") + far, self.BODY + far.replace("far3", "other"))
        self.assert_merges(self.BODY.replace("one", "hook") + far.replace("far3", "other"))

    def test_declarations_go_in_beside_new_neighbours(self) -> None:
        self.series("#include <a.h>\n", "#include <a.h>\n#include <memfile.h>\n", "#include <b.h>\n#include <c.h>\n")
        self.assert_merges("#include <b.h>\n#include <c.h>\n#include <memfile.h>\n")

    def test_statements_do_not(self) -> None:
        self.series(self.BODY, self.BODY.replace("\ttwo", "\thook();\n\ttwo"), self.BODY.replace("two", "three"))
        self.assert_refused()

    def test_number_that_is_taken_keeps_the_patch_out(self) -> None:
        was, one = "#define F_A 1\n", "#define F_A 1\n#define F_HOOK 2\n"
        self.series(was, one, "#define F_B 2\n")
        self.assert_refused()
        self.series(was, one, "#define F_B 3\n")
        self.assert_merges("#define F_B 3\n#define F_HOOK 2\n")

    def test_file_that_is_no_code_is_merged_or_left(self) -> None:
        (self.tree / "Makefile").write_text("VERSION = 9\nPATCHLEVEL = 1\n")
        (self.tree / "mm/shmem.c").write_text("int other;\nint second;\n")
        for maintainers, patched in (("alpha\nother\n", "alpha\nmemfile\nother\n"), ("other\nnames\n", "other\nnames\n")):
            (self.tree / "MAINTAINERS").write_text(maintainers)
            before = self.content()
            for words, content in (((), ("int other;\nint hook;\nint second;\n", patched)), (("--reverse",), before)):
                run = self.apply(*words)
                self.assertEqual((run.returncode, self.content()), (0, content), run.stderr)

    def test_without_that_source_nothing_is_merged(self) -> None:
        self.series("#include <a.h>\n", "#include <a.h>\n#include <memfile.h>\n", "#include <b.h>\n")
        self.base.rename(self.base.with_name("base-of-another"))
        run = self.apply()
        self.assertEqual(run.returncode, 2)
        self.assertIn("is left as it was; scripts/fetch-kernel gets what it takes to merge them", run.stderr)


if __name__ == "__main__":
    unittest.main()
