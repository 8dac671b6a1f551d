# SPDX-License-Identifier: GPL-2.0
"""Failures in the console of a machine, which count even if all tests pass."""

from __future__ import annotations

import re

from memfile.ktap import FAIL, PASS, Case

# Messages of the kernel that are a failure even if all tests pass.
SPLAT = re.compile(
    r"WARNING: |BUG: |CFI failure|kernel BUG at|Oops|general protection fault|KASAN:|KCSAN:|UBSAN:"
    r"|Kernel panic|rust_kernel: panicked|refcount_t: |unreferenced object"
    r"|INFO: possible|possible (circular|recursive|irq lock)|inconsistent lock state"
    r"|suspicious RCU usage|bad unlock balance|held lock freed|DEBUG_LOCKS_WARN"
    r"|lock held when returning to user|sleeping function called from invalid context"
    r"|scheduling while atomic|blocked for more than|soft lockup|hard LOCKUP"
    r"|self-detected stall|rcu_\w+ detected|list_(add|del) corruption|Bad page state"
    r"|kmemleak: [1-9]\d* new suspected|corrupted stack end|double fault|nobody cared"
)
# KCSAN finds data races all over the kernel. Those with a symbol of memfile in a backtrace are memfile's,
# but for one that is meant: a fault of KVM's looks at the count of invalidations and at their range
# without mmu_lock, and looks again under it.
RACE = re.compile(r"BUG: KCSAN: .*")
MEANT = re.compile(r"data-race in kvm_mmu_faultin_pfn(\.\w+)* / kvm_mmu_\w*invalidate")
# Machines whose kernel is made to crash, and its message about that.
CRASH = {"crash_dump": re.compile(r"Kernel panic - not syncing: sysrq triggered crash$")}
RACE_END = re.compile(r"={60,}$")
OUR_SYMBOL = re.compile(r"\w*memfile\w*(\.\w+)*\+0x")
# memfile-tests says in the kernel log which case it starts.
CASE_MARK = re.compile(r"memfile-tests: (\S+)$")


def without_races_of_others(lines: list[str]) -> tuple[list[str], list[str]]:
    """The console without KCSAN's reports that have no symbol of memfile, and their titles."""
    kept: list[str] = []
    others: list[str] = []
    report: list[str] = []
    for line in lines:
        if report or RACE.search(line):
            report.append(line)
            if not RACE_END.search(line):
                continue
            meant = any(MEANT.search(text) for text in report)
            if not meant and any(OUR_SYMBOL.search(text) for text in report):
                kept += report
            else:
                kept += [text for text in report if CASE_MARK.search(text)]
                others += [found[0] for text in report if (found := RACE.search(text))]
            report = []
        else:
            kept.append(line)
    return kept + report, others


def watched_case(name: str, counters: str) -> Case:
    """A kernel that looks for data races counts its looks: a detector that is off finds none."""
    found = re.search(r"^setup_watchpoints: (\d+)$", counters, re.M)
    watchpoints = int(found[1]) if found else 0
    status = PASS if watchpoints > 1000 else FAIL
    return Case(f"kcsan.{name}", status, f"{watchpoints} accesses were watched")
