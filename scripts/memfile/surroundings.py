# SPDX-License-Identifier: GPL-2.0
"""For tests: an environment whose variables do harm, and tools that only record how they are called."""

import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from memfile import environment
from memfile.paths import ROOT

# {} is a folder with what does harm.
HOSTILE = {
    "ARCH": "arm64", "SUBARCH": "arm64", "SRCARCH": "arm64", "CROSS_COMPILE": "aarch64-linux-gnu-",
    "KBUILD_OUTPUT": "{}", "O": "{}", "M": "{}", "MO": "{}", "KBUILD_EXTMOD": "{}", "sub_make_done": "1",
    "KCONFIG_CONFIG": "{}/.config", "KCONFIG_ALLCONFIG": "{}/.config", "CONFIG_KASAN": "y", "W": "1", "C": "2",
    "KCFLAGS": "-Werror", "KRUSTFLAGS": "-Dwarnings", "HOSTCFLAGS": "-bad", "CPATH": "{}", "CC": "false", "LD": "false",
    "SOURCE_DATE_EPOCH": "0", "OMP_NUM_THREADS": "77", "BINDGEN_EXTRA_CLANG_ARGS": "--target=arm64",
    "MAKEFLAGS": "rR --no-print-directory -- ARCH=arm64 M={}", "MFLAGS": "-n", "GNUMAKEFLAGS": "--trace", "MAKELEVEL": "3",
    "GIT_DIR": "{}/other/.git", "GIT_WORK_TREE": "{}/other", "GIT_INDEX_FILE": "{}/index", "GIT_CEILING_DIRECTORIES": "/",
    "CDPATH": ".:{}:/", "BASH_ENV": "{}/bash_env", "ENV": "{}/bash_env", "GLOBIGNORE": "*", "POSIXLY_CORRECT": "1",
    "SHELLOPTS": "noglob:xtrace", "BASHOPTS": "failglob:nocasematch", "BASH_FUNC_sed%%": "() { echo evil; }",
    "BASH_FUNC_cd%%": "() { echo evil; }", "IFS": "/",
    "TAR_OPTIONS": "--exclude=*", "XZ_OPT": "-bad", "GREP_OPTIONS": "-v", "DF_BLOCK_SIZE": "1T", "QUOTING_STYLE": "c",
    "PERL5OPT": "-MNone", "LC_ALL": "POSIX", "LANG": "tr_TR.UTF-8", "LANGUAGE": "de", "TMPDIR": "{}/nowhere",
    "CARGO_TARGET_DIR": "{}", "CARGO_BUILD_TARGET_DIR": "{}", "CARGO_BUILD_TARGET": "arm", "RUSTFLAGS": "-Dwarnings",
    "CARGO_ENCODED_RUSTFLAGS": "-Dwarnings", "RUSTC_WRAPPER": "false", "CARGO_PROFILE_RELEASE_OPT_LEVEL": "0",
    "PYTHONPATH": "{}/python", "PYTHONHOME": "", "PYTHONSAFEPATH": "1", "PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii",
    "PYTHONWARNINGS": "error", "QEMU": "", "KDIR": "", "KERNEL_SRC": "",
}
TOOL = """#!{python} -ES
import json, os, pathlib, shutil, sys
with open({record!r}, "a") as record:
    record.write(json.dumps({{"argv": sys.argv, "env": dict(os.environ)}}) + "\\n")
{code}
"""
# The other effects of these tools. make configures as it is told, and makes the files that scripts look for.
TOOLS = {
    "make": """
out = next((pathlib.Path(word[2:]) for word in sys.argv if word.startswith("O=")), None)
if "allnoconfig" in sys.argv:
    shutil.copy(out / ".memfile-config", out / ".config")
elif out:
    (out / "include/config").mkdir(parents=True, exist_ok=True)
    (out / "include/config/kernel.release").write_text("7.3")
""",
    "cargo": """
for name in (
    "memfile-tests", "memfile-demo", "memfile-bench", "memfile-trace", "memfile-replay", "memfile-vm",
    "memfile-crash",
    "memfile-guest", "memfile-plot",
):
    path = pathlib.Path(os.environ["CARGO_TARGET_DIR"], "x86_64-unknown-linux-gnu/release", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
""",
    "rustc": "print('rustc 1.96.0')",
    "bindgen": "print('bindgen 0.72.1')",
    "clang-19": "print('19.1.7' if sys.argv[1:] == ['-dumpversion'] else 'Debian clang version 19.1.7 (3)')",
    "gcc-12": "print('12' if sys.argv[1:] == ['-dumpversion'] else 'gcc-12 (Debian 12.2.0-14) 12.2.0')",
    "gcc": "print('14' if sys.argv[1:] == ['-dumpversion'] else 'gcc (Debian 14.2.0-19) 14.2.0')",
    "apt-get": "", "curl": "", "qemu-system-x86_64": "",
}
CLANG = 'CONFIG_CC_VERSION_TEXT="Debian clang version 19.1.7 (3)"\nCONFIG_CC_IS_CLANG=y\nCONFIG_CLANG_VERSION=190107\n' \
    "CONFIG_LD_IS_LLD=y\nCONFIG_AS_IS_LLVM=y\n"
GCC = 'CONFIG_CC_VERSION_TEXT="gcc (Debian 12.2.0-14) 12.2.0"\nCONFIG_CC_IS_GCC=y\nCONFIG_GCC_VERSION=120200\n' \
    "CONFIG_LD_IS_BFD=y\nCONFIG_AS_IS_GNU=y\n"
NEEDED = ("X86_64", "MODULES", "RUST", "MEMFD_CREATE", "SHMEM", "TMPFS", "MEMFILE", "MIGRATION")


class Surroundings(unittest.TestCase):
    """A folder with a cache, tools that record how they are called, and what does harm."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.cache = self.folder / "cache"
        self.record = self.folder / "record"
        # Before all others also where a script goes on that should have refused.
        tools = self.folder / "tools"
        tools.mkdir()
        self.path = f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"
        for name, code in TOOLS.items():
            (tools / name).write_text(TOOL.format(python=sys.executable, record=str(self.record), code=code))
            (tools / name).chmod(0o755)
        (self.folder / "bash_env").write_text("echo evil\ncd /\n")
        (self.folder / "python").mkdir()
        (self.folder / "python/json.py").write_text("raise SystemExit('evil')\n")
        self.settings = {
            "PATH": self.path, "HOME": str(self.folder), "MEMFILE_CACHE": str(self.cache), "RUSTC": str(tools / "rustc"),
        }
        self.hostile = {
            **{name: value.replace("{}", str(self.folder)) for name, value in HOSTILE.items()}, **self.settings,
        }

    def run_it(
        self, *command: object, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in command], env=env or self.settings, cwd=cwd, check=False, text=True,
            stdin=subprocess.DEVNULL, capture_output=True,
        )

    def calls(self, tool: str) -> list[dict[str, Any]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [call for line in lines if Path((call := json.loads(line))["argv"][0]).name == tool]

    def assert_runs(self, *command: object) -> str:
        """In the hostile environment; gives what it said."""
        run = self.run_it(*command, env=self.hostile)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        return run.stdout

    def assert_clean(self, call: dict[str, Any], *more: str) -> None:
        """The tool saw what the list names, and what the script has added."""
        patterns = [*environment.passing(), "LC_ALL", *more]
        strange = {name for name in call["env"] if not any(fnmatchcase(name, pattern) for pattern in patterns)}
        # Python gives itself this one.
        self.assertEqual(strange - {"LC_CTYPE"}, set())
        self.assertEqual(call["env"]["LC_ALL"], "C.UTF-8")
        self.assertNotIn("arm64", " ".join(call["argv"]))

    def assert_refuses(self, run: subprocess.CompletedProcess[str], *words: str) -> None:
        """In one sentence, before any tool ran."""
        self.assertEqual(run.returncode, 2, run.stdout + run.stderr)
        self.assertEqual((run.stdout, run.stderr.count("\n")), ("", 1), run.stderr)
        for word in words:
            self.assertIn(word, run.stderr)
        self.assertEqual((self.calls("make"), self.calls("cargo"), self.calls("apt-get")), ([], [], []))

    def copy_of_checkout(self, name: str) -> Path:
        copy = self.folder / name
        for part in ("scripts", "configs", "patches"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Makefile", copy)
        shutil.copy(ROOT / ".gitignore", copy)
        return copy

    def kernel(self, compiler: str, symbols: Iterable[str] = NEEDED, more: str = "") -> Path:
        """A tree that looks like a built kernel."""
        tree = self.folder / "kernel"
        for file in ("include/linux/memfile.h", "rust/libkernel.rmeta", "Module.symvers"):
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).touch()
        text = compiler + "".join(f"CONFIG_{symbol}=y\n" for symbol in symbols) + more
        (tree / ".config").write_text(f'{text}CONFIG_RUSTC_VERSION_TEXT="rustc 1.96.0"\n')
        return tree
