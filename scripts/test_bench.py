#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of bench: python3 scripts/test_bench.py"""

import sys
import unittest
from collections import Counter

# The checkout stays clean.
sys.dont_write_bytecode = True

from load import script

bench = script("bench")


class Names(unittest.TestCase):
    def test_mangled_names_become_paths(self) -> None:
        for mangled, path in (
            ("_RNvNtNtCs7rOU1fwmrvn_12memfile_main3abi3ops16get_pfn_of_shmem", "memfile_main::abi::ops::get_pfn_of_shmem"),
            ("_RNvMNtNtCs7rOU1fwmrvn_12memfile_main6engine4nodeNtB2_5State8listener",
             "memfile_main::engine::node::State::listener"),
            ("shmem_fallocate", "shmem_fallocate"),
        ):
            self.assertEqual(bench.readable(mangled), path)


class Profiles(unittest.TestCase):
    def test_every_instruction_is_charged_once(self) -> None:
        functions = Counter({"xas_load": 7, "memfile_main::abi::ops::get_pfn[memfile]": 5, "unheard_of": 3})
        functions[bench.OUTSIDE] = 2
        parts = bench.split(functions)
        self.assertEqual(parts.total(), functions.total())
        self.assertEqual(parts["Rust (memfile.ko)"], 5)
        self.assertEqual(parts["page cache and LRU"], 7)

    def test_what_differs_most_comes_first(self) -> None:
        subjects = {"memfile": Counter(a=1, b=9, c=4), "guest_memfd": Counter(a=1, d=2, c=1)}
        self.assertEqual(bench.differences(subjects)[:3], ["b", "c", "d"])


if __name__ == "__main__":
    unittest.main()
