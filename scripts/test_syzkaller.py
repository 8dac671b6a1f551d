#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of the descriptions for syzkaller: python3 scripts/test_syzkaller.py

syzkaller itself is not at hand: these read as much of its language as the file uses. Names
must be known, constants what the kernel's headers say, structures as long as the kernel's.
"""

import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths

FOLDER = paths.ROOT / "fuzz/syzkaller"
# Of syzkaller's own files.
ELSEWHERE = {"fd", "fd_kvm", "fd_kvmvm", "fd_kvmcpu", "fd_memfd", "mmap_prot", "mmap_flags"}
BUILTIN = {
    "ptr", "in", "out", "inout", "string", "flags", "const", "len", "vma", "vma64", "buffer", "array", "int32",
    "int64", "bool64",
}
# The kernel's names of the structures.
STRUCTURES = {
    "memfile_region": "kvm_userspace_memory_region2", "memfile_attributes": "kvm_memory_attributes",
    "memfile_enc_region": "kvm_enc_region", "kvm_memfile_populate": "kvm_memfile_populate",
    "memfile_pre_fault": "kvm_pre_fault_memory", "memfile_enable_cap": "kvm_enable_cap",
}
SIZES = {"int32": 4, "int64": 8, "vma64": 8, "ARG": 8, "fd_memfile": 4}
CONSTANT = re.compile(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b")


class File:
    """The descriptions, by kind."""

    def __init__(self, text: str) -> None:
        self.calls: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {}
        self.resources: dict[str, str] = {}
        self.structures: dict[str, list[str]] = {}
        self.includes: list[str] = []
        self.strange: list[str] = []
        fields: list[str] | None = None
        self.parameters: set[str] = set()
        for line in text.splitlines():
            line = line.rstrip()
            if not line or line.startswith("#"):
                continue
            if line == "}":
                fields = None
            elif fields is not None and line.startswith("\t"):
                fields.append(line.strip())
            elif found := re.fullmatch(r"(\w+) \{|type (\w+)\[([\w, ]+)\] \{", line):
                fields = self.structures.setdefault(found[1] or found[2], [])
                self.parameters |= set(re.findall(r"\w+", found[3] or ""))
            elif found := re.fullmatch(r"(\w+\$\w+)(\(.*\))( \w+)?", line):
                self.calls[found[1]] = found[2] + (found[3] or "")
            elif found := re.fullmatch(r"resource (\w+)\[(\w+)\]", line):
                self.resources[found[1]] = found[2]
            elif found := re.fullmatch(r"(\w+) = (.+)", line):
                self.lists[found[1]] = found[2].split(", ")
            elif found := re.fullmatch(r"include <(.+)>", line):
                self.includes.append(found[1])
            elif line != 'meta arches["amd64"]':
                self.strange.append(line)

    def types(self) -> list[str]:
        """The types of arguments and of fields, without their names."""
        arguments = [
            re.sub(r"^\w+ ", "", argument) for call in self.calls.values()
            for argument in re.split(r", (?=\w+ [a-z])", call[1:].rpartition(")")[0])
        ]
        results = [call.rpartition(")")[2].strip() for call in self.calls.values()]
        fields = [field.split(None, 1)[1] for of in self.structures.values() for field in of]
        return [text for text in arguments + results + fields + list(self.resources.values()) if text]

    def size(self, structure: str) -> int:
        size = 0
        for field in self.structures[structure]:
            text = field.split(None, 1)[1]
            count = 1
            if found := re.fullmatch(r"array\[(.+), (\d+)\]", text):
                text, count = found[1], int(found[2])
            base = re.findall(r"\b(?:int32|int64|vma64|ARG|fd_memfile)\b", text)
            one = SIZES[base[-1]]
            size = (size + one - 1) // one * one + one * count
        return size


def constants() -> dict[str, int]:
    """The file of constants that syz-extract would write."""
    values = {}
    for line in (FOLDER / "memfile.txt.const").read_text().splitlines():
        if found := re.fullmatch(r"(\w+) = (\d+)", line):
            values[found[1]] = int(found[2])
    return values


class Descriptions(unittest.TestCase):
    def setUp(self) -> None:
        self.text = (FOLDER / "memfile.txt").read_text()
        self.file = File(self.text)
        code = [line for line in self.text.splitlines() if not line.startswith("#")]
        named = set(CONSTANT.findall("\n".join(code)))
        # A call's own name may be that of a constant.
        self.named = named - self.file.parameters

    def test_every_line_is_of_the_language(self) -> None:
        self.assertEqual(self.file.strange, [])
        for call, text in self.file.calls.items():
            for pair in ("()", "[]"):
                self.assertEqual(text.count(pair[0]), text.count(pair[1]), call)

    def test_every_name_is_known(self) -> None:
        known = BUILTIN | ELSEWHERE | set(self.file.lists) | set(self.file.resources) | set(self.file.structures)
        for text in self.file.types():
            words = re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", text))
            # Names of arguments, of which the length is meant.
            words = [word for word in words if word not in ("addr", "buf")]
            self.assertEqual([word for word in words if word not in known | self.named | self.file.parameters], [], text)

    def test_everything_is_used(self) -> None:
        for name in [*self.file.lists, *self.file.structures]:
            self.assertGreater(len(re.findall(rf"\b{name}\b", self.text)), 1, name)

    def test_constants_are_all_there(self) -> None:
        numbers = {name for name in constants() if name.startswith("__NR_")}
        self.assertEqual(numbers, {f"__NR_{call.split('$')[0]}" for call in self.file.calls})
        self.assertEqual(set(constants()) - numbers, self.named & set(constants()))
        calls = {call.split("$")[1] for call in self.file.calls}
        self.assertEqual({name for name in self.named - set(constants()) if name not in calls}, set())

    def test_kernel_says_the_same(self) -> None:
        tree = paths.patched_tree()
        generated = paths.build_tree("plain") / "arch/x86/include/generated/uapi"
        if not (tree / "include/uapi/linux/memfile.h").exists() or not generated.exists():
            self.skipTest("the patched kernel is not built yet")
        values = constants()
        lines = [f'printf("{name} %llu\\n", (unsigned long long)({name}));' for name in values]
        lines += [f'printf("{ours} %zu\\n", sizeof(struct {theirs}));' for ours, theirs in STRUCTURES.items()]
        headers = ["stdio.h", "asm/unistd.h", "linux/memfd.h", "linux/fcntl.h", "linux/falloc.h", "linux/memfile.h", "linux/kvm.h"]
        source = "".join(f"#include <{header}>\n" for header in headers)
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "constants"
            # `make headers` takes the include of it out.
            (Path(folder) / "linux").mkdir()
            (Path(folder) / "linux/compiler.h").touch()
            folders = (folder, tree / "arch/x86/include/uapi", generated, tree / "include/uapi")
            include = [f"-I{path}" for path in folders]
            # And these.
            without = ["-D__user=", "-D__force=", "-D__EXPORTED_HEADERS__", "-w"]
            subprocess.run(
                ["cc", *include, *without, "-x", "c", "-", "-o", str(program)], check=True, text=True,
                input=f"{source}int main(void) {{ {' '.join(lines)} return 0; }}\n")
            said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        got = {name: int(value) for name, value in (line.split() for line in said.splitlines())}
        for name, value in values.items():
            self.assertEqual(got[name], value, name)
        for structure in STRUCTURES:
            self.assertEqual(got[structure], self.file.size(structure), structure)


if __name__ == "__main__":
    unittest.main()
