#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of what scripts take from their surroundings: python3 scripts/test_environment.py

Scripts run with variables that change bash, make, kbuild, git, cargo, tar, python or the locale,
in folders and for kernels where nothing can be built. Nothing is built: tools of the same names say
what they were called with.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from fnmatch import fnmatchcase
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import environment
from memfile.mirror import Mirror
from memfile.paths import ROOT
from memfile.surroundings import CLANG, GCC, NEEDED, TOOL, Surroundings

SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file() and os.access(path, os.X_OK))


class Variables(Surroundings):
    def test_help_is_the_same_whatever_is_exported(self) -> None:
        for path in SCRIPTS:
            if path.name.startswith("test_"):
                continue
            with self.subTest(path.name):
                wanted = self.run_it(path, "--help")
                self.assertEqual(wanted.returncode, 0, wanted.stderr)
                self.assertEqual(self.assert_runs(path.relative_to(ROOT), "--help"), wanted.stdout)

    def test_kernel_is_built_as_if_nothing_was_exported(self) -> None:
        base = self.run_it("bash", "-c", ". patches/7.3/BASE; echo $KERNEL").stdout.strip()
        source = self.cache / f"src/base-{base}"
        source.mkdir(parents=True)
        (source / "Makefile").touch()
        self.assertEqual(self.assert_runs("scripts/fetch-kernel"), f"{source}\n")
        self.assert_runs("scripts/build-kernel", "base")
        calls = self.calls("make")
        self.assertEqual(len(calls), 2)
        for call in calls:
            self.assert_clean(call)
            self.assertNotIn("-j77", call["argv"])

    def test_module_is_built_as_if_nothing_was_exported(self) -> None:
        self.hostile["KDIR"] = str(self.kernel(CLANG))
        self.assert_runs("scripts/build-module")
        (call,) = self.calls("make")
        self.assert_clean(call)
        self.assertIn(f"M={ROOT}", call["argv"])

    def test_programs_are_built_as_if_nothing_was_exported(self) -> None:
        self.assert_runs("scripts/build-selftests")
        (call,) = self.calls("cargo")
        self.assert_clean(call, "CARGO_TARGET_DIR", "RUSTFLAGS")
        self.assertEqual(call["env"]["CARGO_TARGET_DIR"], str(self.cache / "build/cargo"))
        self.assertEqual(call["env"]["RUSTFLAGS"], "-C target-feature=+crt-static")

    def test_make_itself_hands_nothing_on(self) -> None:
        # Not the tool that records: the program.
        self.assert_runs("/usr/bin/make", "selftests")
        self.assert_clean(self.calls("cargo")[0], "CARGO_TARGET_DIR", "RUSTFLAGS")

    def test_patch_that_does_not_fit_is_named(self) -> None:
        tree = self.folder / "tree"
        (tree / "mm").mkdir(parents=True)
        (tree / "Kbuild").touch()
        (tree / "mm/shmem.c").touch()
        runs = [self.run_it("scripts/apply-patches", "--check", tree, env=env) for env in (self.settings, self.hostile)]
        self.assertEqual([run.returncode for run in runs], [2, 2])
        self.assertRegex(runs[0].stderr, r"^apply-patches: 0001-\S+\.patch does not fit \S+ \(error: .*\); \S+ is left")
        self.assertEqual(runs[1].stderr.splitlines()[-1], runs[0].stderr.splitlines()[-1])

    def test_clean_is_about_this_checkout(self) -> None:
        copy, other = self.copy_of_checkout("copy"), self.folder / "other"
        other.mkdir()
        (other / ".gitignore").write_text("*.o\n")
        for place in (copy, other):
            self.run_it("git", "init", "-q", place)
            (place / "x.o").touch()
        run = self.run_it("/usr/bin/make", "clean", env=self.hostile, cwd=copy)
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertEqual([(place / "x.o").exists() for place in (copy, other)], [False, True])

    def test_python_hands_on_what_the_list_names(self) -> None:
        variables = {**self.hostile, "TCG_THREAD": "multi", "https_proxy": "x", "MEMFILE_CACHE": "relative"}
        self.assertEqual(environment.clean(variables), Path.cwd() / "relative")
        self.assertEqual(variables, {
            "PATH": self.path, "HOME": str(self.folder), "RUSTC": self.settings["RUSTC"], "LC_ALL": "C.UTF-8",
            "TCG_THREAD": "multi", "https_proxy": "x", "MEMFILE_CACHE": str(Path.cwd() / "relative"),
        })

    def test_what_scripts_take_is_on_the_list(self) -> None:
        taken: set[str] = set()
        own = {"VERSION_CODENAME"}
        for path in [*SCRIPTS, *(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts/memfile").rglob("*.py")]:
            if path.name.startswith("test_"):
                continue
            code = re.sub(r"^\s*#.*", "", path.read_text(), flags=re.M)
            taken.update(re.findall(r"\$\{([A-Z][A-Z_]*):?-", code), re.findall(r"environ\.get\(\"(\w+)\"", code))
            # Variables that a script sets by itself; a default for one from outside does not count.
            own.update(re.findall(r"(?:^|[\s'])([A-Z][A-Z_]*)=(?!\$\{\1[:-])", code))
        self.assertIn("SANITIZER", taken)
        lost = {name for name in taken - own if not any(fnmatchcase(name, known) for known in environment.passing())}
        self.assertEqual(lost, set())

    def test_empty_variable_is_as_none(self) -> None:
        # An empty one used to make the current folder the cache.
        variables = {"MEMFILE_CACHE": "", "QEMU": "", "HOME": str(self.folder)}
        self.assertIn(environment.clean(variables), (Path("/var/cache/memfile"), self.folder / ".cache/memfile"))
        self.assertNotIn("QEMU", variables)


class WithoutRoot(Surroundings):
    """An ordinary user has a cache of their own, and learns what only root can install."""

    def test_cache_falls_back_to_one_that_can_be_written(self) -> None:
        script = self.folder / "script"
        script.write_text(f'#!/bin/bash -p\n. "{ROOT}/scripts/lib.sh"\ndefault_cache "$1"\n')
        home, xdg = f"{self.folder}/.cache", f"{self.folder}/xdg"
        there, absent = self.folder / "there", self.folder / "absent"
        there.mkdir()
        for shared, variables, wanted in (
            (there, {}, str(there)),
            (absent, {}, str(absent)),
            ("/nonexistent/memfile", {}, f"{home}/memfile"),
            ("/nonexistent/memfile", {"XDG_CACHE_HOME": xdg}, f"{xdg}/memfile"),
            # Not absolute: to be ignored, says its specification.
            ("/nonexistent/memfile", {"XDG_CACHE_HOME": "xdg"}, f"{home}/memfile"),
            (there, {"XDG_CACHE_HOME": xdg}, str(there)),
        ):
            with self.subTest(f"{shared} {variables}"):
                env = {"PATH": self.path, "HOME": str(self.folder), **variables}
                self.assertEqual(self.run_it("bash", script, shared, env=env).stdout, wanted)
                self.assertEqual(environment.default_cache(env, Path(shared)), wanted)

    def test_setup_names_what_is_missing_and_has_an_exit_code_for_it(self) -> None:
        # The rustc of these surroundings has no library's source.
        run = self.run_it("scripts/setup", "--check")
        self.assertEqual(run.returncode, 4, run.stderr)
        self.assertRegex(run.stderr, r"(?m)^setup: missing: .*rust\S*-src")
        self.assertRegex(run.stderr, r"(?m)^setup: as root: apt-get install .*rust\S*-src")
        self.assertEqual((self.calls("apt-get"), run.stdout), ([], ""))
        self.assertEqual(self.run_it("scripts/setup", "--chekc").returncode, 2)


class Paths(Surroundings):
    BUILDERS = ("setup", "build-kernel", "build-module", "build-selftests", "build-series", "check", "boot")

    def test_checkout_that_make_cannot_take_is_refused(self) -> None:
        for name in ("a checkout", "a:checkout", "a#checkout", "a,checkout", "a$checkout"):
            copy = self.copy_of_checkout(name)
            for script in self.BUILDERS:
                with self.subTest(f"{script} in {name}"):
                    run = self.run_it(copy / "scripts" / script, *["--", "true"] * (script == "boot"))
                    self.assert_refuses(run, f'"{copy}"', f'"{name[1]}"', "move it")
            self.assert_refused_by_make(copy)

    def assert_refused_by_make(self, copy: Path) -> None:
        run = self.run_it("/usr/bin/make", "check", cwd=copy)
        self.assertEqual(run.returncode, 2)
        self.assertIn("move it", run.stderr)
        self.assertEqual(self.calls("apt-get"), [])

    def test_cache_that_make_cannot_take_is_refused(self) -> None:
        self.settings["MEMFILE_CACHE"] = str(self.folder / "a cache")
        for script in self.BUILDERS:
            with self.subTest(script):
                run = self.run_it(ROOT / "scripts" / script, *["--", "true"] * (script == "boot"))
                self.assert_refuses(run, "a cache", "MEMFILE_CACHE")
        self.assertFalse((self.folder / "a cache").exists())

    def test_kernel_that_make_cannot_take_is_refused(self) -> None:
        tree = self.kernel(CLANG).rename(self.folder / "a kernel")
        run = self.run_it("scripts/build-module", env={**self.settings, "KDIR": str(tree)})
        self.assert_refuses(run, "KDIR", "move it")
        run = self.run_it("scripts/build-kernel", env={**self.settings, "KERNEL_SRC": str(tree)})
        self.assert_refuses(run, "KERNEL_SRC", "move it")


class WithTree(Surroundings):
    """A tree of the user's, and a series of one patch."""

    LINES, PATCHED = "a\nb\nc\nd\ne\nf\ng\n", "a\nb\nc\nd\nnew\ne\nf\ng\n"
    PATCH = "diff --git a/mm/shmem.c b/mm/shmem.c\n--- a/mm/shmem.c\n+++ b/mm/shmem.c\n@@ -2,6 +2,7 @@\n b\n c\n d\n+new\n" \
        " e\n f\n g\n"

    def setUp(self) -> None:
        super().setUp()
        self.copy = self.copy_of_checkout("copy")
        for path in (self.copy / "patches/7.3").glob("*.patch"):
            path.unlink()
        (self.copy / "patches/7.3/series").write_text("0001-x.patch\n")
        (self.copy / "patches/7.3/0001-x.patch").write_text(self.PATCH)
        self.tree = self.folder / "tree"
        for name, text in (
            ("mm/shmem.c", self.LINES), ("Kbuild", ""), ("Makefile", ""), ("mm/other.c", "of the user\n"), (".git/x", ""),
        ):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / name).write_text(text)
        self.settings["KERNEL_SRC"] = str(self.tree)


class TreeOfTheUser(WithTree):
    """KERNEL_SRC gets the patches; its base is the same tree without them."""

    def build(self, flavour: str) -> Path:
        """The source that it was built of."""
        run = self.run_it(self.copy / "scripts/build-kernel", flavour)
        self.assertEqual(run.returncode, 0, run.stderr)
        return Path(self.calls("make")[-1]["argv"][2])

    def test_base_has_all_but_the_patches(self) -> None:
        self.assertEqual(self.build("plain"), self.tree)
        base = self.build("base")
        self.assertNotEqual(base, self.tree)
        self.assertEqual((self.tree / "mm/shmem.c").read_text(), self.PATCHED)
        self.assertEqual((base / "mm/shmem.c").read_text(), self.LINES)
        self.assertEqual((base / "mm/other.c").read_text(), "of the user\n")
        self.assertFalse((base / ".git").exists())

    def test_base_of_a_tree_that_has_no_patches_yet(self) -> None:
        self.assertEqual((self.build("base") / "mm/shmem.c").read_text(), self.LINES)
        self.assertEqual((self.tree / "mm/shmem.c").read_text(), self.LINES)

    def test_base_follows_the_tree_and_builds_nothing_anew_that_is_the_same(self) -> None:
        self.build("plain")
        base = self.build("base")
        stamp = (base / "mm/shmem.c").stat().st_mtime_ns
        (self.tree / "mm/new.c").touch()
        (self.tree / "mm/other.c").unlink()
        self.assertEqual(self.build("base"), base)
        self.assertEqual((base / "mm/shmem.c").stat().st_mtime_ns, stamp)
        self.assertTrue((base / "mm/new.c").exists())
        self.assertFalse((base / "mm/other.c").is_symlink())
        (self.tree / "mm/shmem.c").write_text("zero\n" + self.PATCHED)
        self.assertEqual((self.build("base") / "mm/shmem.c").read_text(), "zero\n" + self.LINES)
        self.assertNotEqual((base / "mm/shmem.c").stat().st_mtime_ns, stamp)

    def test_base_after_another_series(self) -> None:
        """What it has touched is a link again."""
        base = self.build("base")
        path = self.copy / "patches/7.3/0001-x.patch"
        path.write_text(self.PATCH.replace("mm/shmem.c", "mm/other.c"))
        (self.tree / "mm/other.c").write_text(self.PATCHED)
        self.assertEqual(self.build("base"), base)
        self.assertEqual((base / "mm/shmem.c").readlink(), self.tree / "mm/shmem.c")
        self.assertEqual((base / "mm/other.c").read_text(), self.LINES)
        self.assertEqual((self.tree / "mm/other.c").read_text(), self.PATCHED)

    def test_tree_that_has_another_series_is_refused_until_that_is_off(self) -> None:
        self.build("plain")
        patch = self.copy / "patches/7.3/0001-x.patch"
        patch.write_text(self.PATCH.replace("+new", "+newer"))
        for flavour in ("plain", "base"):
            run = self.run_it(self.copy / "scripts/build-kernel", flavour)
            self.assertEqual((run.returncode, run.stderr.count("\n")), (2, 1), run.stderr)
            self.assertIn("has the patches of another series: take them off with", run.stderr)
        self.assertEqual((self.tree / "mm/shmem.c").read_text(), self.PATCHED)
        (self.tree / "mm/shmem.c").write_text(self.LINES)
        self.build("plain")
        self.assertIn("newer", (self.tree / "mm/shmem.c").read_text())
        # A series that is on the tree is no other one, though its file is as it was.
        patch.write_text(self.PATCH.replace("+new", "+newer") + "diff --git a/x b/x\n")
        self.build("plain")

    def test_tree_where_the_patches_neither_go_on_nor_come_off_is_not_built(self) -> None:
        (self.tree / "mm/shmem.c").write_text(self.LINES.replace("c\nd", "other"))
        for flavour in ("plain", "base"):
            run = self.run_it(self.copy / "scripts/build-kernel", flavour)
            self.assert_refuses(run, "0001-x.patch does not fit mm/shmem.c", str(self.tree))
            self.assertNotIn(tempfile.gettempdir() + "/tmp.", run.stderr)
        self.assertIn("cannot be taken off KERNEL_SRC=", run.stderr)
        self.assertEqual(self.calls("make"), [])

    def test_folder_that_is_no_kernel_is_refused(self) -> None:
        for name in ("Kbuild", "Makefile", "mm/shmem.c"):
            (self.tree / name).rename(self.folder / "aside")
            for command in (("build-kernel",), ("build-kernel", "base"), ("build-selftests", "--upstream")):
                run = self.run_it(self.copy / "scripts" / command[0], *command[1:])
                self.assert_refuses(run, f"KERNEL_SRC={self.tree} is not a source tree", f"no {name}")
            (self.folder / "aside").rename(self.tree / name)
        self.settings["KERNEL_SRC"] = str(self.folder / "nothing")
        self.assert_refuses(self.run_it(self.copy / "scripts/build-kernel", "base"), "does not exist")
        self.assertEqual(list(self.cache.glob("src/unpatched-*")), [])


class SelftestsOfTheUser(WithTree):
    """The selftests of KERNEL_SRC: one that does not build there is left out, and tried again."""

    LIST = """limit = 60
[folders]
kvm = "x86/a_test x86/b_test"
mm = "cow"
[added]
kvm = "x86/memfile_test"
memfd = "inaccessible_test"
[scripts]
"mm/s.sh" = "mm/beside.sh"
"""
    # A source with "broken" in it does not build; a program is a copy of its source.
    GCC = """
if "--version" in sys.argv:
    sys.exit("gcc" if print("gcc 14") else 0)
source = next(pathlib.Path(word) for word in sys.argv if word.endswith(".c"))
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
if not source.exists() or "broken" in source.read_text():
    sys.exit(1)
out.write_text(source.read_text())
out.chmod(0o755)
"""
    STRIP = """
if sys.argv[1] == "-o":
    shutil.copy(sys.argv[3], sys.argv[2])
"""
    MAKE = """
folder = pathlib.Path(sys.argv[sys.argv.index("-C") + 1])
top = next((word[7:] for word in sys.argv if word.startswith("OUTPUT=")), None)
code = 0
for word in sys.argv:
    if top and word.startswith(top):
        source = folder / (word[len(top) + 1:] + ".c")
        if "broken" in source.read_text():
            code = 2
            continue
        pathlib.Path(word).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(word).write_text(source.read_text())
        pathlib.Path(word).chmod(0o755)
sys.exit(code)
"""
    SELFTESTS = "tools/testing/selftests"

    def setUp(self) -> None:
        super().setUp()
        for name, code in (("gcc", self.GCC), ("strip", self.STRIP), ("make", self.MAKE)):
            path = self.folder / "tools" / name
            path.write_text(TOOL.format(python=sys.executable, record=str(self.record), code=code))
            path.chmod(0o755)
        (self.copy / "scripts/upstream.toml").write_text(self.LIST)
        for name in ("kvm/x86/a_test.c", "kvm/x86/b_test.c", "kvm/x86/memfile_test.c", "memfd/inaccessible_test.c",
                     "mm/cow.c", "mm/s.sh", "mm/beside.sh"):
            self.write(f"{self.SELFTESTS}/{name}")
        self.write(f"{self.SELFTESTS}/kvm/Makefile.kvm", "TEST_GEN_PROGS_x86 = x86/a_test x86/b_test\n")

    def write(self, name: str, text: str = "fine") -> None:
        (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
        (self.tree / name).write_text(text)

    def programs(self, code: int = 0) -> tuple[set[str], str]:
        """What there is after a build, and what it said."""
        self.record.unlink(missing_ok=True)
        run = self.run_it(self.copy / "scripts/build-selftests", "--upstream")
        self.assertEqual(run.returncode, code, run.stderr)
        return {path.name for path in self.cache.glob("build/upstream-*/bin/*")}, run.stderr

    def compiled(self) -> list[str]:
        return [Path(call["argv"][call["argv"].index("-o") + 1]).name for call in self.calls("gcc") if "-o" in call["argv"]]

    ALL = {"a_test", "b_test", "memfile_test", "inaccessible_test", "cow", "s.sh", "beside.sh"}

    def test_second_build_does_nothing(self) -> None:
        self.assertEqual(self.programs()[0], self.ALL)
        self.assertEqual(self.programs()[0], self.ALL)
        self.assertEqual((self.calls("make"), self.compiled()), ([], []))

    def test_program_that_does_not_build_is_left_out_and_tried_again(self) -> None:
        self.programs()
        for name in ("mm/cow", "kvm/x86/a_test"):
            self.write(f"{self.SELFTESTS}/{name}.c", "broken")
            left = self.ALL - {Path(name).name}
            for _ in range(2):
                programs, said = self.programs()
                self.assertEqual(programs, left)
                self.assertRegex(said, r"\w+_test does not build" if "kvm" in name else "cow.* does not build")
                self.assertTrue(self.calls("make"))
            # Only what is broken.
            self.assertLessEqual(set(self.compiled()), {"cow"})
            self.write(f"{self.SELFTESTS}/{name}.c")
            self.assertEqual(self.programs()[0], self.ALL)

    def test_program_that_the_patches_add_must_build(self) -> None:
        for name in ("memfd/inaccessible_test", "kvm/x86/memfile_test"):
            self.write(f"{self.SELFTESTS}/{name}.c", "broken")
            programs, said = self.programs(2)
            self.assertNotIn(Path(name).name, programs)
            self.assertEqual(list(self.cache.glob("build/upstream-*/.memfile-[kb]*[yt]")), [], said)
            self.write(f"{self.SELFTESTS}/{name}.c")

    def test_script_without_what_it_wants_is_left_out(self) -> None:
        (self.tree / self.SELFTESTS / "mm/beside.sh").unlink()
        self.assertEqual(self.programs()[0], self.ALL - {"s.sh", "beside.sh"})

    def test_all_that_programs_are_made_of_builds_them_anew(self) -> None:
        self.programs()
        for name in ("include/linux/bits.h", "arch/x86/include/asm/x.h", "tools/arch/x86/lib/x86-opcode-map.txt",
                     "arch/x86/entry/syscalls/syscall_64.tbl", "tools/scripts/Makefile.include", "mm/gup_test.h",
                     "lib/rbtree.c", "tools/include/x.rs", f"{self.SELFTESTS}/kvm/settings"):
            self.write(name)
            with self.subTest(name):
                self.programs()
                self.assertEqual(self.compiled().count("cow"), 1)
        self.write("mm/other.c", "another")
        self.programs()
        self.assertEqual(self.compiled(), [])


class Series(Surroundings):
    """scripts/build-series builds after each patch, with the option and without it."""

    # Compiles mm/a.c, if it is newer than the object, as an object that knows its source; "warn" and "fail" in the
    # source do that. "hang" waits for a signal, and says who it is.
    MAKE = """
import signal, time
out = pathlib.Path(next(word[2:] for word in sys.argv if word.startswith("O=")))
tree = pathlib.Path(sys.argv[sys.argv.index("-C") + 1])
if "vmlinux" in sys.argv:
    text = (tree / "mm/a.c").read_text()
    if (tree / "mm/other.c").exists():
        text += (tree / "mm/other.c").read_text()
    if not (out / "a.o").exists() or (out / "a.o").read_text() != text:
        if "hang" in text:
            pathlib.Path(f"{out}-hangs").write_text(str(os.getpid()))
            time.sleep(600)
        if "fail" in text and out.name[-1] == ("n" if "fail n" in text else "y"):
            sys.exit(2)
        if "warn" in text:
            print("a.c:1: warning: x")
        (out / "a.o").write_text(text)
"""

    def setUp(self) -> None:
        super().setUp()
        make = self.folder / "tools/make"
        make.write_text(TOOL.format(python=sys.executable, record=str(self.record), code=self.MAKE))
        self.copy = self.copy_of_checkout("copy")
        self.patches = self.copy / "patches/7.3"
        for path in self.patches.glob("*.patch"):
            path.unlink()
        version = self.run_it("bash", "-c", ". patches/7.3/BASE; echo $KERNEL").stdout.strip()
        base = self.cache / f"src/base-{version}"
        (base / "mm").mkdir(parents=True)
        (base / "Makefile").touch()
        for name in ("a", "b"):
            (base / f"mm/{name}.c").write_text("0\n")
        self.tree = self.cache / f"src/series-{version}"
        self.series("1", "2")

    def series(self, *texts: str, git: bool = True) -> None:
        """Each patch makes mm/a.c the next text."""
        names, was = [], "0"
        for number, text in enumerate(texts):
            names.append(f"000{number}-x.patch")
            (self.patches / names[-1]).write_text(
                "diff --git a/mm/a.c b/mm/a.c\n" * git + f"--- a/mm/a.c\n+++ b/mm/a.c\n@@ -1 +1 @@\n-{was}\n+{text}\n")
            was = text
        (self.patches / "series").write_text("".join(f"{name}\n" for name in names))

    def build(self, code: int = 0) -> int:
        """How many builds there were of both configurations together."""
        before = len(self.built())
        run = self.run_it(self.copy / "scripts/build-series")
        self.assertEqual(run.returncode, code, run.stdout + run.stderr)
        return len(self.built()) - before

    def built(self) -> list[object]:
        return [call for call in self.calls("make") if "vmlinux" in call["argv"]]

    def test_what_was_built_is_known(self) -> None:
        self.assertEqual(self.build(), 4)
        self.assertEqual(self.build(), 0)
        self.series("1", "3")
        self.assertEqual(self.build(), 2)
        self.series("1", "3", git=False)
        self.assertEqual(self.build(), 4)
        self.series("1", "4", git=False)
        self.assertEqual(self.build(), 2)

    def test_other_flags_and_another_source_build_all_anew(self) -> None:
        self.build()
        for path, line in (("scripts/build-series", "#"), ("patches/7.3/BASE", "SHA256=0"), ("configs/plain.config", "#"),
                           ("scripts/lib.sh", "kernel_make_vars() { COMPILER=(x) KMAKE=(W=1); }")):
            with (self.copy / path).open("a") as file:
                file.write(f"\n{line}\n")
            with self.subTest(path):
                self.assertEqual((self.build(), self.build()), (4, 0))

    def test_failure_of_either_build_is_one(self) -> None:
        for text in ("fail n", "fail y"):
            self.series("1", text, "3")
            self.build(2)
            self.assertEqual(self.build(2), 2)
            self.assertEqual((self.tree / "mm/a.c").read_text(), f"{text}\n")

    def test_warning_is_one_in_the_next_run_too(self) -> None:
        for text in ("warn", "fail y and warn"):
            self.series("1", text)
            self.assertEqual((self.build(2), self.build(2)), (4 if text == "warn" else 2, 2))

    def test_files_of_an_earlier_series_do_not_stay(self) -> None:
        (self.patches / "series").write_text("0000-x.patch\n")
        (self.patches / "0000-x.patch").write_text(
            "diff --git a/mm/other.c b/mm/other.c\nnew file mode 100644\n--- /dev/null\n+++ b/mm/other.c\n@@ -0,0 +1 @@\n+1\n"
            "diff --git a/mm/b.c b/mm/b.c\n--- a/mm/b.c\n+++ b/mm/b.c\n@@ -1 +1 @@\n-0\n+1\n")
        self.build()
        self.assertEqual((self.tree / "mm/b.c").read_text(), "1\n")
        self.series("1")
        self.build()
        self.assertEqual((self.tree / "mm/b.c").read_text(), "0\n")
        self.assertFalse((self.tree / "mm/other.c").exists())

    def test_tree_of_the_time_without_a_list_is_made_anew(self) -> None:
        self.build()
        (self.tree / ".memfile-files").unlink()
        (self.tree / "mm/other.c").write_text("1\n")
        self.assertEqual(self.build(), 4)
        self.assertFalse((self.tree / "mm/other.c").exists())

    def test_interrupt_ends_both_builds(self) -> None:
        self.series("hang")
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            # A shell does not trap what is ignored from the start, as in the background of another shell.
            command = ["env", "--default-signal=INT,TERM", str(self.copy / "scripts/build-series")]
            process = subprocess.Popen(
                command, env=self.settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.addCleanup(process.kill)
            hang = [self.tree / f"build-series-{name}-hangs" for name in "ny"]
            while process.poll() is None and not all(path.exists() and path.read_text() for path in hang):
                time.sleep(0.01)
            makes = [int(path.read_text()) for path in hang]
            process.send_signal(number)
            self.assertEqual(process.wait(20), code)
            for path, make in zip(hang, makes):
                self.assertRaises(ProcessLookupError, os.kill, make, 0)
                path.unlink()


class Mirrors(unittest.TestCase):
    """A tree of links is what the other tree is, and nothing is written through it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.own, self.to = Path(folder.name).resolve() / "own", Path(folder.name).resolve() / "to"
        self.touched = ["mm/a.c", "mm/added.c"]
        for name in ("mm/a.c", "mm/b.c", "include/config/x.h", "lib/deep/x.c", "Makefile"):
            self.write(name)

    def write(self, name: str, text: str = "own") -> None:
        (self.own / name).parent.mkdir(parents=True, exist_ok=True)
        (self.own / name).write_text(text)

    def renew(self) -> None:
        before = self.state(self.own)
        Mirror(str(self.own), str(self.to), self.touched, str(self.own / "some/cache")).renew()
        (self.to / "mm").mkdir(exist_ok=True)
        for name in self.touched:
            path = self.to / name
            self.assertFalse(path.is_symlink())
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("copy")
        self.assertEqual(self.state(self.own), before)

    @staticmethod
    def state(top: Path) -> dict[str, tuple[int, str]]:
        return {str(path.relative_to(top)): (
            path.lstat().st_mtime_ns, os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else ""
        ) for path in [top, *top.rglob("*")]}

    def files(self) -> set[str]:
        """What the mirror has beside the copies, each of which is a link to the same name."""
        links = {path for path in self.to.rglob("*") if path.is_symlink()}
        for path in links:
            self.assertEqual(path.readlink(), self.own / path.relative_to(self.to))
        found = {str(path.relative_to(self.to)) for path in self.to.rglob("*") if path in links or path.is_file()}
        return found - set(self.touched)

    def test_second_run_changes_nothing(self) -> None:
        self.renew()
        before = self.state(self.to)
        self.assertEqual(self.files(), {"mm/b.c", "include/config/x.h", "lib/deep/x.c", "Makefile"})
        self.renew()
        self.assertEqual(self.state(self.to), before)

    def test_folders_and_files_that_are_gone_do_not_stay(self) -> None:
        self.renew()
        shutil.rmtree(self.own / "include")
        shutil.rmtree(self.own / "lib")
        (self.own / "mm/b.c").unlink()
        self.renew()
        self.assertEqual({str(path.relative_to(self.to)) for path in self.to.rglob("*")},
                         {"mm", "Makefile", *self.touched})

    def test_file_becomes_a_folder_and_the_reverse(self) -> None:
        self.renew()
        shutil.rmtree(self.own / "lib")
        self.write("lib")
        (self.own / "Makefile").unlink()
        self.write("Makefile/x")
        self.renew()
        self.assertEqual(self.files(), {"mm/b.c", "include/config/x.h", "lib", "Makefile/x"})

    def test_link_to_a_folder_is_one_unless_a_touched_file_is_below_it(self) -> None:
        (self.own / "mm").rename(self.own.parent / "elsewhere")
        (self.own / "mm").symlink_to("../elsewhere")
        (self.own / "arch").symlink_to("lib")
        self.renew()
        self.assertEqual(self.files(), {"mm/b.c", "include/config/x.h", "lib/deep/x.c", "arch", "Makefile"})
        self.assertFalse((self.to / "mm").is_symlink())
        self.assertEqual((self.own.parent / "elsewhere/a.c").read_text(), "own")
        # Another series touches what was a link.
        self.touched = ["lib/deep/x.c", "arch/deep/x.c"]
        self.renew()
        self.assertEqual(self.files(), {"mm", "include/config/x.h", "Makefile"})
        self.assertEqual((self.own / "lib/deep/x.c").read_text(), "own")

    def test_hard_links_and_what_an_interrupted_run_has_left(self) -> None:
        (self.own / "mm/twin.c").hardlink_to(self.own / "mm/a.c")
        self.write("mm/a.c.memfile-new")
        self.renew()
        self.assertEqual((self.own / "mm/twin.c").read_text(), "own")
        self.assertEqual(self.files(), {"mm/b.c", "mm/twin.c", "include/config/x.h", "lib/deep/x.c", "Makefile"})
        (self.to / "mm/b.c.memfile-new").symlink_to(self.own / "mm/b.c")
        (self.to / "mm/b.c").unlink()
        self.renew()
        self.assertTrue((self.to / "mm/b.c").is_symlink())

    def test_folder_that_cannot_be_written(self) -> None:
        (self.own / "lib/deep").chmod(0o555)
        self.addCleanup((self.own / "lib/deep").chmod, 0o755)
        self.touched.append("lib/deep/new.c")
        self.renew()
        self.assertTrue((self.to / "lib/deep").stat().st_mode & 0o200)

    def test_what_is_no_source_is_left_out(self) -> None:
        for name in (".git/x", "build-x/y", ".memfile-files", "some/cache/z", "lib/build-x/y"):
            self.write(name)
        self.renew()
        self.assertEqual(self.files(), {"mm/b.c", "include/config/x.h", "lib/deep/x.c", "lib/build-x/y", "Makefile"})


class Configuration(Surroundings):
    def build(self, tree: Path) -> subprocess.CompletedProcess[str]:
        return self.run_it("scripts/build-module", env={**self.settings, "KDIR": str(tree)})

    def test_all_that_the_kernel_lacks_is_named_at_once(self) -> None:
        tree = self.kernel(CLANG, set(NEEDED) - {"MIGRATION", "MEMFILE"}, "CONFIG_TRIM_UNUSED_KSYMS=y\n")
        self.assert_refuses(
            self.build(tree), "CONFIG_MEMFILE=y CONFIG_MIGRATION=y CONFIG_TRIM_UNUSED_KSYMS=n", str(tree))

    def test_each_symbol_is_needed(self) -> None:
        for symbol in NEEDED:
            with self.subTest(symbol):
                self.assert_refuses(self.build(self.kernel(CLANG, set(NEEDED) - {symbol})), f"set CONFIG_{symbol}=y and")

    def assert_built_with(self, *words: str) -> None:
        (call,) = self.calls("make")
        found = [word for word in call["argv"] if word.partition("=")[0] in ("LLVM", "CC", "LD", "LLVM_IAS")]
        self.assertEqual(found, list(words))

    def test_compiler_is_the_kernels(self) -> None:
        for compiler, words in (
            (CLANG, ["LLVM=-19"]),
            (GCC, ["LLVM=", "CC=gcc-12"]),
            (CLANG.replace("LD_IS_LLD", "LD_IS_BFD"), ["LLVM=", "CC=clang-19"]),
            (GCC.replace("LD_IS_BFD", "LD_IS_LLD"), ["LLVM=", "CC=gcc-12", "LD=ld.lld-19"]),
        ):
            with self.subTest(compiler):
                self.record.unlink(missing_ok=True)
                run = self.build(self.kernel(compiler))
                self.assertEqual(run.returncode, 0, run.stderr)
                self.assert_built_with(*words)

    def test_compiler_that_is_not_here_is_named(self) -> None:
        for compiler, text, package in (
            (CLANG.replace("19", "9"), "Debian clang version 9.1.7 (3)", "clang-9"),
            (GCC.replace("12", "4"), "gcc (Debian 4.2.0-14) 4.2.0", "gcc-4"),
        ):
            with self.subTest(package):
                self.assert_refuses(self.build(self.kernel(compiler)), f'"{text}"', f"install {package}")

    def test_rustc_must_be_the_kernels(self) -> None:
        tree = self.kernel(CLANG)
        (tree / ".config").write_text((tree / ".config").read_text().replace("1.96.0", "1.95.0"))
        self.assert_refuses(self.build(tree), "rustc 1.95.0", "RUSTC=")


if __name__ == "__main__":
    unittest.main()
