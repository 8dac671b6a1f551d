# SPDX-License-Identifier: GPL-2.0
"""The output of scripts/profile.c, and the names of functions and locks."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

# The functions that acquire a lock, as System.map has them: the plugin looks for them.
LOCK_FUNCTIONS = re.compile(
    r"_raw_(spin|read|write)_(try)?lock(_irq|_irqsave|_bh)?|__cond_resched_rwlock_(read|write)|"
    r"mutex_(try)?lock(_killable|_interruptible)?|down_(read|write)(_killable|_trylock)?|__srcu_read_lock"
)
# Lock: the function that acquires it, and the callers of that. The first that matches counts. The only
# reader-writer lock that KVM takes here is mmu_lock; the only Rust with spin locks is memfile's.
LOCKS = (
    ("mmu_lock, read", r"_read_", r"kvm|tdp_|^(__)?(mmu_|direct_page|kvm_)"),
    ("mmu_lock, write", r"_write_", r"kvm|tdp_|^(__)?(mmu_|direct_page|kvm_)"),
    ("node's lock", r"_raw_spin_", r"^rust_helper_|\[memfile\]$"),
    ("other spin locks", r"_raw_|rwlock", r""),
    ("mutexes, semaphores", r"mutex_|down_", r""),
    ("SRCU", r"srcu", r""),
)
LOCK_NAMES = tuple(name for name, _, _ in LOCKS)

# In the profiles: code that is not the kernel's.
OUTSIDE = "(user space and the guest)"


@dataclasses.dataclass
class Window:
    """The counts of the plugin in one window; addresses have no names yet."""

    rep: Counter[int] = dataclasses.field(default_factory=Counter)
    locked: Counter[int] = dataclasses.field(default_factory=Counter)
    # Locked instructions by the cache line that they write, and one of those for each line.
    line: Counter[int] = dataclasses.field(default_factory=Counter)
    site: dict[int, int] = dataclasses.field(default_factory=dict)
    call: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    all: Counter[int] = dataclasses.field(default_factory=Counter)


def windows_of(lines: Iterable[str]) -> dict[int, Window]:
    windows: dict[int, Window] = {}
    for line in lines:
        number, what, address, count, *target = line.split()
        window = windows.setdefault(int(number), Window())
        if what == "call":
            window.call[int(address, 16), int(target[0], 16)] += int(count)
        elif what == "line":
            window.line[int(address, 16)] += int(count)
            window.site[int(address, 16)] = int(target[0], 16)
        else:
            kind: Counter[int] = getattr(window, what)
            kind[int(address, 16)] += int(count)
    return windows


def readable(symbol: str) -> str:
    """The path in a mangled name of Rust's: _RNvNtCs7rOU_7memfile3abi3get is memfile::abi::get."""
    if not symbol.startswith("_R"):
        return symbol
    rest, path = symbol[2:], []
    while rest:
        if found := re.match(r"(Cs|s|B)[0-9A-Za-z]*_", rest):
            rest = rest[found.end():]
        elif found := re.match(r"[1-9]\d*", rest):
            rest = rest[found.end():]
            path.append(rest[: int(found[0])])
            rest = rest[int(found[0]):]
        else:
            rest = rest[1:]
    return "::".join(path)


class Symbols:
    """The functions of a kernel that runs, from /proc/kallsyms."""

    def __init__(self, lines: Iterable[str]) -> None:
        found: list[tuple[int, str]] = []
        for line in lines:
            address, kind, name, *module = line.split()
            if kind in "tTwW":
                found.append((int(address, 16), readable(name) + "".join(module)))
        found.sort()
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    def __bool__(self) -> bool:
        return any(self._addresses)

    def name(self, address: int) -> str:
        nearest = bisect.bisect(self._addresses, address) - 1
        return self._names[nearest] if nearest >= 0 else OUTSIDE


def lock_of(function: str, caller: str) -> str:
    return next(
        (name for name, called, by in LOCKS if re.search(called, function) and re.search(by, caller)), LOCK_NAMES[3]
    )
