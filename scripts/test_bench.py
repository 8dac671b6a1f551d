#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of bench: python3 scripts/test_bench.py"""

import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.bench import counts, profile, windows
from memfile.bench.counts import Counts, Figure, Row
from memfile.load import script

bench = script("bench")

SYMBOLS = windows.Symbols([
    "ffffffff81000000 T _raw_write_lock",
    "ffffffff81000100 T _raw_spin_lock",
    "ffffffff81000200 T mutex_lock",
    "ffffffff81001000 t kvm_mmu_unmap_gfn_range",
    "ffffffff81002000 T rust_helper_spin_lock",
    "ffffffff81003000 d no_function",
    "ffffffffc0000000 t _RNvNtCs7rOU_7memfile6engine4bind\t[memfile]",
])
WRITTEN = """\
0 rep ffffffff81001010 4097
0 rep 0 3
0 locked ffffffff81000004 5
0 call ffffffff81001020 2 ffffffff81000000
0 call ffffffff81002004 4 ffffffff81000100
1 rep ffffffff81001010 97
1 call ffffffff81001020 1 ffffffff81000000
1 all ffffffff81001014 40
1 all 0 2
""".splitlines()


def made(instructions: float, rep: float = 0.0, flushes: float | None = None) -> Counts:
    return Counts(instructions, rep, 0.0, 0.0, dict.fromkeys(windows.LOCK_NAMES, 0.0), flushes)


def figure(name: str, subject: str, *works: float, page: int = 4096) -> Figure:
    return Figure(name, subject, page, [made(work) for work in works])


def table_of(*figures: Figure) -> list[Row]:
    return counts.by_pain(counts.private_rows({(f.name, f.subject): f for f in figures}, "private"))


class Names(unittest.TestCase):
    def test_mangled_names_become_paths(self) -> None:
        for mangled, path in (
            ("_RNvNtNtCs7rOU1fwmrvn_12memfile_main3abi3ops16get_pfn_of_shmem", "memfile_main::abi::ops::get_pfn_of_shmem"),
            ("_RNvMNtNtCs7rOU1fwmrvn_12memfile_main6engine4nodeNtB2_5State8listener",
             "memfile_main::engine::node::State::listener"),
            ("shmem_fallocate", "shmem_fallocate"),
        ):
            self.assertEqual(windows.readable(mangled), path)

    def test_address_belongs_to_the_function_before_it(self) -> None:
        self.assertEqual(SYMBOLS.name(0xffffffff81003010), "rust_helper_spin_lock")
        self.assertEqual(SYMBOLS.name(0xffffffffc0000040), "memfile::engine::bind[memfile]")
        self.assertEqual(SYMBOLS.name(0), windows.OUTSIDE)

    def test_lock_is_known_by_function_and_caller(self) -> None:
        for function, caller, lock in (
            ("_raw_read_lock", "kvm_tdp_page_fault", "mmu_lock, read"),
            ("_raw_read_lock", "do_wait", "other spin locks"),
            ("_raw_spin_lock", "rust_helper_spin_lock", "node's lock"),
            ("_raw_spin_lock_irqsave", "rmqueue_bulk", "other spin locks"),
            ("mutex_lock", "kvm_set_memory_region", "mutexes, semaphores"),
            ("down_write_killable", "do_mmap", "mutexes, semaphores"),
            ("__srcu_read_lock", "vcpu_run", "SRCU"),
        ):
            self.assertTrue(windows.LOCK_FUNCTIONS.fullmatch(function), function)
            self.assertEqual(windows.lock_of(function, caller), lock)
        for function in ("_raw_spin_unlock", "_raw_spin_lock_init", "mutex_lock_slowpath", "down_read_interruptible_x"):
            self.assertFalse(windows.LOCK_FUNCTIONS.fullmatch(function), function)


BEGIN, END = "0f1f80014d454d", "0f1f80004d454d"
CODE = 0xffffffff81001000
LOCK = 0xffffffff81000000


@unittest.skipUnless(shutil.which("gcc"), "gcc is missing")
class Plugin(unittest.TestCase):
    """scripts/profile.c with a stand-in for QEMU, in each form of the plugin interface."""

    folder: Path
    FORMS = (1, 2, 3)

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        source = str(bench.SCRIPTS / "test_profile.c")
        for form in cls.FORMS:
            program = str(cls.folder / f"test{form}")
            subprocess.run(["gcc", f"-DQEMU_PLUGIN_API={form}", "-o", program, source], check=True)

    def windows(self, *code: tuple[int, str] | tuple[int, str, int], functions: bool = False) -> list[dict[int, windows.Window]]:
        """The counts of each form in this code."""
        found = []
        for form in self.FORMS:
            out = self.folder / "out"
            arguments = [f"out={out}", f"calls={LOCK + 16:x}:{LOCK:x}", *(["functions=on"] if functions else [])]
            lines = "".join(" ".join(w if isinstance(w, str) else f"{w:x}" for w in one) + "\n" for one in code)
            subprocess.run([str(self.folder / f"test{form}"), *arguments], input=lines, text=True, check=True)
            found.append(windows.windows_of(out.read_text().splitlines()))
        return found

    def test_each_turn_of_a_string_instruction_counts_and_nothing_outside_of_windows(self) -> None:
        stosb, movsq, ret, pause = (CODE, "f3aa"), (CODE + 2, "f348a5"), (CODE + 5, "f3c3"), (CODE + 7, "f390")
        once = (CODE + 9, "aa")
        for seen in self.windows(stosb, (0, BEGIN), stosb, stosb, movsq, ret, pause, once, (0x1000, "f3aa"), (0, END), stosb):
            self.assertEqual(seen[0].rep, Counter({CODE: 2, CODE + 2: 1, 0: 1}))
            self.assertEqual((seen[0].locked, seen[0].all), (Counter(), Counter()))

    def test_lock_prefix_and_exchange_with_memory_lock_in_the_kernel(self) -> None:
        code = ((CODE, "f0480fb117"), (CODE + 5, "488707"), (CODE + 8, "4887c7"),
                (CODE + 11, "65f0ff07"), (CODE + 15, "90"), (0x1000, "f0ff07"))
        for seen in self.windows((0, BEGIN), *code, (0, END)):
            self.assertEqual(seen[0].locked, Counter({CODE: 1, CODE + 5: 1, CODE + 11: 1}))

    def test_locked_instructions_count_by_the_line_that_they_write(self) -> None:
        def lock(address: int, written: int) -> tuple[int, str, int]:
            return address, "f0ff07", written

        code = (lock(CODE, 0x1000), lock(CODE + 3, 0x103f), lock(CODE, 0x1040), (CODE + 6, "65f0ff07", 0x2000),
                (CODE + 10, "ff07", 0x3000), (0x1000, "f0ff07", 0x4000))
        for seen in self.windows(lock(CODE, 0x1000), (0, BEGIN), *code, (0, END), (0, BEGIN), lock(CODE, 0x1080), (0, END)):
            self.assertEqual(seen[0].line, Counter({0x1000: 2, 0x1040: 1}))
            self.assertEqual(seen[0].site[0x1000], CODE)
            self.assertEqual(seen[1].line, Counter({0x1080: 1}))
            self.assertEqual(seen[0].locked.total(), 4)

    def test_where_lines_are_many_those_written_once_are_one(self) -> None:
        code = [(CODE, "f0ff07", 64 * n) for n in range(1, 5001)] + [(CODE, "f0ff07", 64)] * 7
        for seen in self.windows((0, BEGIN), *code, (0, END)):
            self.assertEqual(seen[0].line, Counter({64: 8, 0: 4999}))

    def test_calls_and_jumps_to_the_functions_count_by_caller(self) -> None:
        def to(opcode: str, site: int, target: int) -> tuple[int, str]:
            return site, opcode + ((target - site - 5) & 0xffffffff).to_bytes(4, "little").hex()

        call, jump, other = to("e8", CODE, LOCK), to("e9", CODE + 5, LOCK + 16), to("e8", CODE + 10, LOCK + 32)
        for seen in self.windows((0, BEGIN), call, jump, other, call, (0, END), (0, BEGIN), jump, (0, END)):
            self.assertEqual(seen[0].call, Counter({(CODE, LOCK): 2, (CODE + 5, LOCK + 16): 1}))
            self.assertEqual(seen[1].call, Counter({(CODE + 5, LOCK + 16): 1}))

    def test_functions_have_every_other_instruction(self) -> None:
        code = ((CODE, "90"), (CODE, "90"), (CODE + 1, "f0ff07"), (CODE + 4, "f3aa"), (0x1000, "90"), (0x1001, "90"))
        for seen in self.windows((0, BEGIN), *code, (0, END), functions=True):
            self.assertEqual(seen[0].all, Counter({CODE: 2, CODE + 1: 1, 0: 2}))
            self.assertEqual(seen[0].rep, Counter({CODE + 4: 1}))


class Joining(unittest.TestCase):
    def test_windows_are_added_and_subtracted(self) -> None:
        line = {"name": "n", "subject": "s", "page": 4096, "times": 2, "instructions": 10000, "flushes": 4,
                "windows": [[0, 1], [1, -1]]}
        counted = counts.counts_of(line, windows.windows_of(WRITTEN), SYMBOLS)
        self.assertEqual(counted.rep, (4097 + 3 - 97) / 2)
        self.assertEqual(counted.work, (10000 - 4003) / 2)
        self.assertEqual(counted.locked, 2.5)
        self.assertEqual(counted.locks["mmu_lock, write"], 0.5)
        self.assertEqual(counted.locks["node's lock"], 2)
        self.assertEqual(counted.flushes, 2)

    def test_line_is_common_if_most_operations_write_it(self) -> None:
        written = ["0 line 1000 8 ffffffff81000004", "0 line 2000 3 ffffffff81000104", "0 line 0 90 0",
                   "1 line 1000 2 ffffffff81000004", "2 line 2000 1 ffffffff81000104"]
        seen = windows.windows_of(written)
        line = {"times": 8, "instructions": 0, "flushes": None, "windows": [[0, 1], [1, -1], [2, 1]]}
        self.assertEqual(counts.common_lines(line, seen), Counter({0x1000: 6, 0x2000: 4}))
        self.assertEqual(counts.counts_of(line, seen, SYMBOLS).common, 10 / 8)
        self.assertEqual(profile.common_of(line, seen, SYMBOLS), Counter({"_raw_write_lock": 0.75, "_raw_spin_lock": 0.5}))
        # One operation shows nothing.
        self.assertIsNone(counts.counts_of({**line, "times": 1}, seen, SYMBOLS).common)

    def test_window_without_counts_counts_nothing(self) -> None:
        line = {"times": 1, "instructions": 7, "flushes": None, "windows": [[9, 1]]}
        counted = counts.counts_of(line, windows.windows_of(WRITTEN), SYMBOLS)
        self.assertEqual((counted.work, counted.locked, counted.flushes), (7, 0, None))

    def test_runs_make_mean_and_noise(self) -> None:
        one = figure("f", "memfile", 100, 104)
        self.assertEqual((one.counts.work, one.noise), (102, 4))


class Judging(unittest.TestCase):
    def test_judged_is_what_does_not_repeat(self) -> None:
        ours, theirs = figure("f", "memfile"), figure("f", "guest_memfd")
        ours.runs, theirs.runs = [made(9000, 4000)], [made(9000, 5000)]
        row, = table_of(ours, theirs)
        self.assertEqual((row.ratio, row.total_ratio, row.met), (1.25, 1.0, False))

    def test_what_both_have_is_to_be_below_one(self) -> None:
        for ours, met in ((99, True), (100, False)):
            row, = table_of(figure("f", "memfile", ours), figure("f", "guest_memfd", 100))
            self.assertEqual((row.met, row.aim), (met, "< 1.00"))

    def test_large_pages_may_take_a_tenth(self) -> None:
        for ours, met in ((10, True), (11, False)):
            row, = table_of(figure("f", "memfile, 2M", ours, page=1 << 21), figure("f", "guest_memfd", 100))
            self.assertEqual((row.met, row.aim), (met, "<= 0.10"))
        row, = table_of(figure(counts.SMALL, "memfile, 2M", 300, page=1 << 21), figure(counts.SMALL, "guest_memfd", 100))
        self.assertIsNone(row.met)

    def test_what_hurts_most_comes_first(self) -> None:
        table = table_of(*(figure(n, "memfile", w) for n, w in (("a", 90), ("b", 120), ("c", 100))),
                         *(figure(n, "guest_memfd", 100) for n in "abc"))
        self.assertEqual([row.figure for row in table], ["b", "c", "a"])

    def test_many_bindings_are_compared_with_one(self) -> None:
        table = table_of(figure(counts.ONE, "memfile", 100), figure(counts.MANY, "memfile", 151))
        self.assertEqual([(row.reference, row.met) for row in table], [("1 binding", False)])

    def relatives(self, name: str, subjects: dict[str, int]) -> list[tuple[str, str, float, bool | None]]:
        found = {(name, s): figure(name, s, work) for s, work in subjects.items()}
        table = counts.relative_rows(found, "boot")
        return [(row.subject, row.reference, row.ratio, row.met) for row in table]

    def test_hidden_memory_is_compared_with_that_which_is_not_and_with_the_kernels_own(self) -> None:
        subjects = {"memfile": 100, "memfile, hidden": 150, "memfd_secret": 300, "memfile on hugetlbfs, 2M, hidden": 30}
        self.assertEqual(self.relatives("f", subjects), [
            ("memfile, hidden", "memfile", 1.5, None),
            ("memfile, hidden", "memfd_secret", 0.5, None),
            ("memfile on hugetlbfs, 2M, hidden", "memfd_secret", 0.1, None),
        ])

    def test_what_guest_memfd_cannot_do_is_compared_with_ordinary_memory_of_a_vm(self) -> None:
        subjects = {"memfile": 100, "memfd of a VM": 80, "anonymous memory of a VM": 50, "memfile, 2M (THP)": 9,
                    "memfd of a VM, 2M (THP)": 10}
        self.assertEqual(self.relatives("swap-out, per page", subjects), [
            ("memfile", "memfd of a VM", 1.25, None),
            ("memfile", "anonymous memory of a VM", 2.0, None),
            ("memfile, 2M (THP)", "memfd of a VM, 2M (THP)", 0.9, None),
        ])

    def test_ordinary_memory_is_not_compared_with_guest_memfd(self) -> None:
        self.assertEqual(table_of(figure("f", "memfd of a VM", 80), figure("f", "guest_memfd", 100)), [])

    def test_figure_that_stands_beside_nothing_is_named(self) -> None:
        every = [figure("f", "memfile", 1), figure("f", "guest_memfd", 1), figure("g", "memfile", 1), figure("h", "guest_memfd", 1)]
        found = {(f.name, f.subject): f for f in every}
        self.assertEqual([f.name for f in counts.alone(found, table_of(*every))], ["g"])

    def test_ordinary_files_may_cost_one_percent(self) -> None:
        patched, unpatched = figure("f", "shmem", 102), figure("f", "shmem", 100)
        row, = counts.ordinary_rows({("f", "shmem"): patched, ("g", "shmem"): patched}, {("f", "shmem"): unpatched}, "b")
        self.assertEqual((row.subject, row.reference, row.met), ("patched", "unpatched", False))


class Baseline(unittest.TestCase):
    def saved(self, *figures: Figure) -> counts.Report:
        every = [*figures, *(figure(f.name, "guest_memfd", 100) for f in figures)]
        return {"rows": [row.as_json() for row in table_of(*every)]}

    def verdicts(self, before: list[Figure], after: list[Figure]) -> list[tuple[str, str]]:
        rows = table_of(*after, *(figure(f.name, "guest_memfd", 100) for f in after))
        return [(change.figure, change.verdict) for change in counts.changes(self.saved(*before), rows)]

    def test_same_result_has_no_changes(self) -> None:
        one = [figure("a", "memfile", 1000, 1010)]
        self.assertEqual(self.verdicts(one, one), [])

    def test_worse_is_what_grew_by_more_than_the_noise_of_both(self) -> None:
        # The mean grows by 11, then by 13; the noise is 10, and 2 of two boots.
        before = [figure("a", "memfile", 1000, 1004)]
        self.assertEqual(self.verdicts(before, [figure("a", "memfile", 1010, 1016)]), [])
        self.assertEqual(self.verdicts(before, [figure("a", "memfile", 1012, 1018)]), [("a", "WORSE")])

    def test_better_gone_and_new_are_named(self) -> None:
        before = [figure("a", "memfile", 1000), figure("b", "memfile", 1000)]
        after = [figure("a", "memfile", 900), figure("c", "memfile", 1000)]
        self.assertEqual(self.verdicts(before, after), [("b", "gone"), ("c", "new"), ("a", "better")])


class Profiles(unittest.TestCase):
    def test_every_instruction_is_charged_once(self) -> None:
        functions = Counter({"xas_load": 7, "memfile_main::abi::ops::get_pfn[memfile]": 5, "unheard_of": 3})
        functions[windows.OUTSIDE] = 2
        functions[profile.REPEATED] = 4096
        parts = profile.split(functions)
        self.assertEqual(parts.total(), functions.total())
        self.assertEqual(parts["Rust (memfile.ko)"], 5)
        self.assertEqual(parts["page cache and LRU"], 7)
        self.assertEqual(parts[profile.REPEATED], 4096)

    def test_what_differs_most_comes_first_and_is_no_repetition(self) -> None:
        one, other = Counter(a=1, b=9, c=4), Counter(a=1, d=2, c=1)
        one[profile.REPEATED] = 4096
        self.assertEqual(profile.differences(one, other)[:3], ["b", "c", "d"])

    def test_plugin_and_clock_are_compared(self) -> None:
        seen = windows.windows_of(WRITTEN)
        line = {"name": "n", "subject": "s", "run": 0, "times": 1, "instructions": 140, "windows": [[1, 1]]}
        functions = profile.profiles({"figures": [line]}, seen, SYMBOLS)
        self.assertEqual(functions["n", "s"][0].total(), 97 + 40 + 2)
        locked = profile.locked_of({"times": 2, "windows": [[0, 1]]}, seen, SYMBOLS)
        self.assertEqual(locked, Counter({"_raw_write_lock": 2.5}))
        self.assertAlmostEqual(profile.disagreement({"figures": [line]}, functions), 1 / 140)


if __name__ == "__main__":
    unittest.main()
