# SPDX-License-Identifier: GPL-2.0
"""The suites of memfile-tests: which machines they want, how long they take, and the variants."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping

from memfile import paths
from memfile.program import fail

# A machine whose guests are a real QEMU's, emulated by a QEMU of the same source: Debian 12's loses
# the timers of such guests now and then, and so does any that emulates several CPUs in turn.
WITH_QEMU = [
    "--emulator", str(paths.QEMU_LAB), "--cpus", "1",
    "--add", str(paths.QEMU), "--add", str(paths.GUEST), "--add-kernel",
]
# Suites that need a machine of their own: options of scripts/boot.
OWN_MACHINE = {
    "qemu": WITH_QEMU,
    "qemu_long": WITH_QEMU,
    # An area of contiguous memory that is most of what is free in its zone, and not all.
    "contiguous": ["--mem", "3840M", "--append", "hugetlb_cma=1G"],
    # A page of 1 GiB is there from the beginning: later there is hardly room for one.
    "hugetlb_1g": ["--mem", "4G", "--append", "hugepagesz=1G hugepages=1"],
    # And one that it can move to, and room to make one again of the memory that it leaves.
    "hugetlb_pair_1g": ["--mem", "6G", "--append", "hugepagesz=1G hugepages=2"],
    "directmap_1g": ["--mem", "4G", "--append", "hugepagesz=1G hugepages=1"],
    # Two nodes, each with a socket and half of the memory: CPUs of one socket are in one node.
    "hugetlb_numa": [
        "--mem", "2G", "--qemu-arg=-smp", "--qemu-arg=2,sockets=2",
        "--qemu-arg=-object", "--qemu-arg=memory-backend-ram,id=m0,size=1G",
        "--qemu-arg=-object", "--qemu-arg=memory-backend-ram,id=m1,size=1G",
        "--qemu-arg=-numa", "--qemu-arg=node,memdev=m0,cpus=0",
        "--qemu-arg=-numa", "--qemu-arg=node,memdev=m1,cpus=1",
    ],
    # Programs of Debian that press on a guest's memory, if they are installed.
    "pressure_host": ["--mem", "3G", *(
        word for name in ("stress-ng", "trinity") if (found := shutil.which(name)) for word in ("--add", found))],
    # The memory of the kernel that runs after the crash, and that kernel.
    "crash_dump": ["--mem", "2G", "--append", "crashkernel=320M", "--add-kernel"],
    "hibernation": [],
    # A direct map that no suite has split before.
    "directmap": [],
    # Once hardware has reported an error, the kernel takes no injected one back, and a broken page of
    # hugetlbfs stays in the pool, in use.
    "hardware_error": ["--mem", "1G", "--append", "hugepages=6"],
    # No VM can have private memory there.
    "cap_without_npt": ["--append", "kvm_amd.npt=0"],
    "cap_without_tdp_mmu": ["--append", "kvm.tdp_mmu=0"],
}

# Suites for one kernel only. On others they run if they are named, and skip.
OF_KERNEL = {"cap_without_protected": "unprotected"}

# Suites that run in the machine of another one: they need the same machine.
MACHINE_OF = {"directmap_huge": "directmap"} | {
    f"{name}_1g": "hugetlb_1g" for name in (
        "accounting", "convert", "exits", "guest", "model", "motion", "prefault", "punch", "scenarios", "sharing",
        "stress", "zero",
    )
}
# The first command of such a machine; it fails if the settings are not in force.
PREPARE = {
    "crash_dump": "[ -e /proc/vmcore ] || exec memfile-crash",
}
# Machines without the ports to the host while the suite runs: hibernation stops all devices, and an
# open port of virtio_console is dead after that. The output of the suite comes afterwards.
WITHOUT_PORTS = ("hibernation",)


def own_machine(suite: str) -> str:
    """The suite that the machine of this one is named after; none if it shares that of all others."""
    name = MACHINE_OF.get(suite, suite)
    return name if name in OWN_MACHINE else ""


# Ends of the names of suites that run on a guest_memfd, for which the variants change nothing.
OTHER_KINDS = ("_gmem", "_gmem_mmap")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The same kernel with other settings."""

    what: str
    # Of the kernel's command line.
    append: str = ""
    # Of its machine, if not as much as others have.
    memory: str = ""
    # A command that runs in the guest first; it fails if the settings are not in force.
    prepare: str = "true"
    # The only kernel that has these settings, if not all have.
    kernel: str = ""
    # The suites that do not run in it, by the reason. All others do, also one that is new.
    left_out: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def concerns(self, suite: str) -> bool:
        # Nor for huge pages of hugetlbfs. Pages out of the direct map have a suite of their own.
        if suite in OF_KERNEL or own_machine(suite) or suite.endswith((*OTHER_KINDS, "_huge", "_hidden")):
            return False
        return all(suite not in suites for suites in self.left_out.values())


# Reasons to leave suites out of a variant.
SET_BY_THEMSELVES = "they set all of it themselves, in every way"
SLOW = "they take long, and others free and allocate in the same ways"
NO_RECLAIM = "nothing is reclaimed in them by way of the LRU"
ON_DEBUG = "everything takes long on that kernel, and those that remain free pages in each way"
# Short suites without reclaim.
SHORT = (
    "access", "accounting", "binding", "consumer", "creation", "debugfs", "exits", "fdinfo", "infra", "lockdep",
    "model", "module", "nested", "ondemand", "prefault", "property", "seal", "sharing", "signals", "size", "store",
    "trace", "zero",
)
VARIANTS = {
    "thp": Variant(
        "huge pages wherever they can be, but none that a guest executes",
        append="transparent_hugepage=always transparent_hugepage_shmem=always kvm.nx_huge_pages=force",
        # Huge pages fill the blocks that others leave, and what cannot move goes everywhere.
        memory="3G",
        prepare="cd /sys/kernel/mm/transparent_hugepage && grep -qF '[always]' enabled "
        "&& grep -qF '[always]' shmem_enabled && grep -q Y /sys/module/kvm/parameters/nx_huge_pages",
        left_out={SET_BY_THEMSELVES: ("motion", "overcommit", "pinned", "reclaim")},
    ),
    "init": Variant(
        "every page is cleared when it is allocated and when it is freed",
        append="init_on_alloc=1 init_on_free=1",
        prepare="dmesg | grep -q 'heap alloc:on, heap free:on'",
        left_out={SLOW: (
            "border", "hugetlb", "idle", "kvmaccess", "motion", "overcommit", "pinned", "reclaim", "stress",
            "swapwait", "zswap",
        )},
    ),
    "pagealloc": Variant(
        "free pages are not in the direct map either",
        append="debug_pagealloc=on page_poison=1",
        prepare="! grep -q 'DirectMap2M: *[1-9]' /proc/meminfo",
        kernel="debug",
        # Not: border, guest and punch; and the parts _hidden of the last two, if they are named.
        left_out={ON_DEBUG: (
            *SHORT, "aging", "cap", "convert", "fault", "fuzz_corpus", "huge", "hugetlb", "idle", "kvmaccess",
            "migrate", "motion", "overcommit", "pinned", "poison", "populate", "reclaim", "scenarios", "security",
            "starvation", "stress", "swapwait", "zswap",
        )},
    ),
    "lru": Variant(
        "the multi-generational LRU decides what is reclaimed",
        prepare="cd /sys/kernel/mm/lru_gen && echo y >enabled && [ $(cat enabled) != 0x0000 ]",
        left_out={NO_RECLAIM: (*SHORT, "guest", "hugetlb", "punch"), SLOW: ("kvmaccess",)},
    ),
}
VARIANT = "variant_"

# Seconds that suites took, as the longer ones say themselves; the others take one or two. Only to
# share them out.
SECONDS = {
    "qemu": 450, "qemu_long": 9000, "directmap": 195, "directmap_huge": 175, "directmap_1g": 120, "hugetlb_1g": 220,
    "hugetlb_pair_1g": 61,
    "kvmaccess": 58, "reclaim": 50, "pinned": 46, "sharing_huge": 45, "swapwait": 38, "poison": 36, "overcommit": 38,
    "motion": 33, "idle": 28, "hugetlb": 23, "stress": 23, "stress_huge": 22, "stress_hidden": 25, "contiguous": 20,
    "scenarios": 18, "huge": 15, "migrate": 15, "scenarios_huge": 13, "zswap": 12, "stress_gmem": 11, "zero": 8,
    "accounting": 7, "ondemand": 9, "model_huge": 9, "fault": 8, "border": 12, "nested": 7, "motion_huge": 14,
    "fault_huge": 11, "punch": 7, "sharing": 7, "model": 5,
}


def guest_cases(tests: list[str]) -> list[str]:
    """The cases that memfile-tests runs for these patterns; it can list them on the host, too."""
    if not paths.TESTS.exists():
        fail(f"no test program at {paths.TESTS}; scripts/build-selftests builds it")
    run = subprocess.run([paths.TESTS, "--list", *tests], capture_output=True, text=True, check=False)
    return run.stdout.split()


def variant_tests(name: str, variant: Variant, tests: list[str]) -> list[str]:
    """The suites and cases of a variant that these patterns choose.

    A suite that the variant does not concern is chosen only if it is named in full.
    """
    chosen: list[str] = []
    for test in tests:
        head, _, pattern = test.partition(".")
        if not (head.startswith(VARIANT) and fnmatch.fnmatchcase(name, head)):
            continue
        cases = guest_cases([pattern] if pattern else [])
        named = re.fullmatch(r"\w+", pattern.split(".")[0])
        if not named:
            cases = [case for case in cases if variant.concerns(case.split(".")[0])]
        chosen += cases if "." in pattern else [case.split(".")[0] for case in cases]
    return list(dict.fromkeys(chosen))


def seconds(suites: Iterable[str]) -> int:
    return sum(SECONDS.get(suite, 2) for suite in suites)


def share_out(suites: Iterable[str]) -> list[list[str]]:
    """Two lists that take about as long: the longest suites first, each where there is less so far."""
    lists: list[list[str]] = [[], []]
    for suite in sorted(suites, key=lambda suite: -SECONDS.get(suite, 2)):
        min(lists, key=seconds).append(suite)
    return lists
