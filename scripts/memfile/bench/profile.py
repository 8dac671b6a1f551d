# SPDX-License-Identifier: GPL-2.0
"""Where the instructions of a figure go, by function and by component."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from memfile.bench.counts import Report, common_lines
from memfile.bench.windows import OUTSIDE, Symbols, Window

# How many functions to show.
FUNCTIONS = 16
REPEATED = "(repeated string instructions)"

# The component of a function is the first of these patterns that matches it.
COMPONENTS = (
    ("Rust (memfile.ko)", r"\[memfile\]$"),
    ("shim", r"memfile"),
    ("shmem", r"^shmem_"),
    ("hugetlbfs", r"huge_?tlb|^hugetlbfs|^(alloc|dequeue|free|enqueue|prep)_huge|_hugetlb_"),
    ("guest_memfd", r"gmem"),
    ("counting of memory", r"mod_(memcg_)?(lruvec|node|zone)|^lruvec_stat|css_rstat|percpu_counter|vm_enough_memory|"
     r"^inode_(add|sub)_bytes$"),
    ("allocation and freeing", r"^(__)?(alloc_|folio_alloc|get_page_from|rmqueue|prep_new|post_alloc|free_|"
     r"get_mem_cgroup|mem_cgroup_|try_charge|charge_|uncharge_)"),
    ("page cache and LRU", r"^(__)?(filemap_|find_|delete_from_page|page_cache|truncate_|folios?_put|folio_add_lru|"
     r"lru_|lruvec_|folio_mark|folio_batch|xas_|xa_|workingset)"),
    ("KVM", r"^(__)?(kvm_|vcpu_|tdp_|svm_|npf_|x86_emul|emulator|handle_changed_spte|make_spte|mmu_|direct_page|"
     r"fault_handler|complete_|em_|segmented|walk_shadow|sev_|pf_|vmx_)"),
)


@dataclasses.dataclass
class Profile:
    """The instructions of each function, for one operation, of two kinds of memory."""

    figure: str
    subject: str
    functions: Counter[str]
    reference: str
    reference_functions: Counter[str]
    # The locked instructions among them.
    locked: Counter[str] = dataclasses.field(default_factory=Counter)
    reference_locked: Counter[str] = dataclasses.field(default_factory=Counter)
    # Those of them on lines that most operations write.
    common: Counter[str] = dataclasses.field(default_factory=Counter)
    reference_common: Counter[str] = dataclasses.field(default_factory=Counter)

    def as_json(self) -> dict[str, object]:
        # Not asdict(), which makes a Counter of the pairs of a Counter.
        return {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}


def component(function: str) -> str:
    if function in (OUTSIDE, REPEATED):
        return function
    return next((name for name, pattern in COMPONENTS if re.search(pattern, function)), "other")


def split(functions: Counter[str]) -> Counter[str]:
    """Instructions by component."""
    parts = Counter({name: 0.0 for name, _ in COMPONENTS})
    for function, count in functions.items():
        parts[component(function)] += count
    return parts


def differences(one: Counter[str], other: Counter[str]) -> list[str]:
    """The functions in which the two differ most, repeated string instructions aside."""
    names = (name for name in one | other if name != REPEATED)
    return sorted(names, key=lambda name: -abs(one[name] - other[name]))[:FUNCTIONS]


def functions_of(figure: Report, windows: dict[int, Window], symbols: Symbols) -> Counter[str]:
    """The instructions of each function, for one operation, of one run of a figure."""
    found: Counter[str] = Counter()
    times: int = figure["times"]
    for number, sign in figure["windows"]:
        window = windows.get(number, Window())
        for address, count in window.all.items():
            found[symbols.name(address)] += sign * count / times
        found[REPEATED] += sign * window.rep.total() / times
    return found


def locked_of(figure: Report, windows: dict[int, Window], symbols: Symbols) -> Counter[str]:
    """The locked instructions of each function, as functions_of()."""
    found: Counter[str] = Counter()
    for number, sign in figure["windows"]:
        for address, count in windows.get(number, Window()).locked.items():
            found[symbols.name(address)] += sign * count / figure["times"]
    return found


def common_of(figure: Report, windows: dict[int, Window], symbols: Symbols) -> Counter[str]:
    """The locked instructions on common lines, by a function that writes the line."""
    found: Counter[str] = Counter()
    if figure["times"] == 1:
        return found
    sites = {line: site for number, _ in figure["windows"] for line, site in windows.get(number, Window()).site.items()}
    for line, count in common_lines(figure, windows).items():
        found[symbols.name(sites[line])] += count / figure["times"]
    return found


# All instructions, the locked ones, those on common lines.
Functions = dict[tuple[str, str], tuple[Counter[str], Counter[str], Counter[str]]]


def profiles(report: Report, windows: dict[int, Window], symbols: Symbols) -> Functions:
    """All instructions, and the locked ones, of each figure, by name and subject; of the first run."""
    found: Functions = {}
    for figure in report["figures"]:
        key = figure["name"], figure["subject"]
        if key not in found:
            found[key] = (
                functions_of(figure, windows, symbols), locked_of(figure, windows, symbols),
                common_of(figure, windows, symbols),
            )
    return found


def disagreement(report: Report, functions: Functions) -> float:
    """By how much, at most, the plugin and the time stamp counter differ on a figure."""
    worst = 0.0
    for figure in report["figures"]:
        counted = functions[figure["name"], figure["subject"]][0].total()
        by_clock = figure["instructions"] / figure["times"]
        if figure["run"] == 0 and by_clock:
            worst = max(worst, abs(counted - by_clock) / by_clock)
    return worst
