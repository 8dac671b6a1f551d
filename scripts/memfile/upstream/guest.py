# SPDX-License-Identifier: GPL-2.0
"""Several programs in one machine: the shell's part of it, and what it says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from memfile.upstream.programs import Program
from memfile.upstream.results import DIED, Result

# Two nodes, because some programs migrate from one to the other, a CPU for each.
MACHINE = ["--cpus", "2", "--mem", "2G"] + [
    f"--qemu-arg={word}" for node in "01" for word in (
        "-object", f"memory-backend-ram,id=node{node},size=1G",
        "-numa", f"node,nodeid={node},cpus={node},memdev=node{node}",
    )
]

# Settings that programs change and do not always put back.
KNOBS = """/proc/sys/vm/nr_overcommit_hugepages /proc/sys/vm/overcommit_memory
/proc/sys/vm/enable_soft_offline /proc/sys/vm/memory_failure_early_kill /proc/sys/vm/compaction_proactiveness
/proc/sys/vm/swappiness /proc/sys/vm/max_map_count /proc/sys/fs/nr_open /proc/sys/kernel/randomize_va_space
/sys/kernel/mm/lru_gen/enabled /sys/kernel/mm/ksm/run /sys/kernel/mm/ksm/merge_across_nodes
/sys/kernel/mm/ksm/use_zero_pages /sys/kernel/mm/ksm/pages_to_scan /sys/kernel/mm/ksm/sleep_millisecs
/sys/kernel/mm/ksm/max_page_sharing
/sys/module/kvm/parameters/force_emulation_prefix
/sys/module/kvm/parameters/nx_huge_pages /sys/module/kvm/parameters/nx_huge_pages_recovery_ratio
/sys/module/kvm/parameters/nx_huge_pages_recovery_period_ms"""

# What the guest says instead of a program's begin.
BAD_CLOCK = "@@ bad clock"
# A machine that is short of time when it boots takes the frequency of its TSC from what is off by a
# thousandth. KVM keeps that, and then the guests' clocks are wrong: on this boot, on either kernel.
CLOCK_IS_GOOD = f"""
if dmesg | grep -q 'tsc: Unable to calibrate against PIT'; then echo '{BAD_CLOCK}'; exit; fi
"""
# Machines with such a clock, one after the other, before the programs run all the same.
BAD_CLOCKS = 3

PRELUDE = r"""
pool=64
knobs='@KNOBS@'
for knob in /sys/kernel/mm/transparent_hugepage/* /sys/kernel/mm/transparent_hugepage/khugepaged/* \
    /sys/kernel/mm/transparent_hugepage/hugepages-*/*; do
    [ ! -f "$knob" ] || knobs="$knobs $knob"
done
# The word in brackets is the one that is chosen.
value() { sed 's/.*\[\(.*\)\].*/\1/' "$1" 2>/dev/null; }
saved=''
for knob in $knobs; do
    [ ! -w "$knob" ] || saved="$saved $knob=$(value "$knob")"
done
huge() { awk '/^HugePages_/ { printf "%s %s ", tolower(substr($1, 11)), $2 }' /proc/meminfo; }
# Everything but process 1, this shell and the one that started it is the program's.
tidy() {
    for process in /proc/[0-9]*; do
        case ${process#/proc/} in 1 | $$ | $PPID) ;; *) kill -9 "${process#/proc/}" ;; esac
    done 2>/dev/null
    cd /tmp
    awk '$2 ~ "^/tmp/" || $2 ~ "^/mnt/" { print $2 }' /proc/mounts | sort -r | while read -r mount; do
        umount -l "$mount"
    done
    rm -rf /tmp/* /dev/shm/* /mnt/*
    mkdir -p /tmp/work /mnt
    ipcs -m | awk '$2 ~ /^[0-9]+$/ { print $2 }' | while read -r id; do ipcrm -m "$id"; done
    for pair in $saved; do
        [ "$(value "${pair%%=*}")" = "${pair#*=}" ] || echo "${pair#*=}" >"${pair%%=*}"
    done
    echo 3 >/proc/sys/vm/drop_caches
    if [ "$(huge)" != "total: $pool free: $pool rsvd: 0 surp: 0 " ]; then
        echo 1 >/proc/sys/vm/compact_memory
        echo 0 >/proc/sys/vm/nr_hugepages
        echo $pool >/proc/sys/vm/nr_hugepages
    fi
} 2>/dev/null
uptime() { read -r time _ </proc/uptime; echo "${time%.*}"; }
# run NAME LIMIT: the command comes on the standard input.
run() {
    tidy
    cat >/tmp/command
    for file in /add/*; do [ ! -f "$file" ] || ln -s "$file" "/tmp/work/${file##*/}"; done
    dmesg -c >/dev/null
    echo "@@ begin $1"
    echo "upstream: $1" >/dev/kmsg
    start=$(uptime)
    (cd /tmp/work && exec timeout -s KILL "$2" sh /tmp/command) </dev/null 2>&1
    code=$?
    seconds=$(($(uptime) - start))
    huge=$(huge)
    printf '\n'
    dmesg -c | sed 's/^/@@ kernel /'
    echo "@@ end $1 $code $seconds $huge"
}
if [ -e /sys/block/zram0 ]; then
    echo 512M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0
fi
[ ! -e /add/bash-static ] || ln -sf /add/bash-static /bin/bash
[ -e /usr/bin ] || { mkdir -p /usr && ln -s /bin /usr/bin; }
""".replace("@KNOBS@", " ".join(KNOBS.split()))


def files(programs: Iterable[Program], folder: Path) -> list[Path]:
    """The needs of these programs in the guest."""
    names = {program.file for program in programs}
    scripts = {name for name in names if name.endswith(".sh")}
    if scripts:
        # They start each other, and programs.
        names |= {path.name for path in (*folder.glob("*.sh"), *folder.glob("write_to_hugetlbfs"))}
    found = [folder / name for name in sorted(names)]
    return [*found, Path("/bin/bash-static")] if scripts else found


def script(programs: Iterable[Program], any_clock: bool = False) -> str:
    """The script of the guest's shell."""
    parts = ["" if any_clock else CLOCK_IS_GOOD, PRELUDE]
    for program in programs:
        parts.append(f"run {shlex.quote(program.name)} {program.limit} <<'MEMFILE_END'\n")
        parts.append(f"{program.command()}\nMEMFILE_END\n")
    return "".join(parts) + "tidy\n"


BEGIN = re.compile(r"@@ begin (\S+)$")
KERNEL = re.compile(r"@@ kernel (?:\[ *\d+\.\d+\] ?)?(?:\[ *[TC]\d+\] ?)?(.*)")
END = re.compile(r"@@ end (\S+) (\d+) (\d+) (.*)$")
KEPT_LINES = 20000


class Reader:
    """Feed it what the guest says, line by line; it tells what came of each program."""

    def __init__(self, programs: Iterable[Program], splat: re.Pattern[str]) -> None:
        self._programs = {program.name: program for program in programs}
        self._splat = splat
        self._lines: list[str] = []
        # The program that runs.
        self.begun = ""
        # The machine has ended for it.
        self.bad_clock = False

    def feed(self, line: str) -> tuple[Program, Result] | None:
        line = line.rstrip("\r\n")
        if begin := BEGIN.match(line):
            self.begun, self._lines = begin[1], []
        elif not self.begun:
            self.bad_clock |= line == BAD_CLOCK
        elif kernel := KERNEL.match(line):
            # The kernel's messages count only if something is wrong with it.
            if self._splat.search(kernel[1]):
                self._lines.append("kernel: " + re.sub(r"\+0x\S+| (CPU|PID|Comm): \S+|#\d+", "", kernel[1]))
        elif (end := END.match(line)) and end[1] == self.begun:
            return self._end(int(end[2]), int(end[3]), f"huge pages: {end[4].strip()}")
        elif len(self._lines) < KEPT_LINES:
            self._lines.append(line)
        return None

    def finish(self) -> tuple[Program, Result] | None:
        """The machine has ended: with a program, or by itself."""
        return self._end(DIED, 0) if self.begun else None

    def _end(self, code: int, seconds: int, *more: str) -> tuple[Program, Result] | None:
        program = self._programs.get(self.begun)
        self.begun = ""
        while self._lines and not self._lines[-1].strip():
            self._lines.pop()
        return (program, Result(code, seconds, [*self._lines, *more], program.limit)) if program else None


# Boots a machine: its name, the programs in it, the script of its shell, and the receiver of each line.
Boot = Callable[[str, list[Program], str, Callable[[str], None]], None]


def run_all(name: str, programs: list[Program], boot: Boot, splat: re.Pattern[str],
            each: Callable[[Program, Result], None]) -> None:
    """Runs the programs, after one with which the machine ended in a new machine."""
    left, machines, bad_clocks = list(programs), 0, 0
    while left:
        reader = Reader(left, splat)

        def note(found: tuple[Program, Result] | None) -> None:
            if found:
                left.remove(found[0])
                each(*found)

        def on_line(line: str, reader: Reader = reader) -> None:
            note(reader.feed(line))

        before = len(left)
        lines = script(left, any_clock=bad_clocks == BAD_CLOCKS)
        boot(name if not machines else f"{name}-{machines}", list(left), lines, on_line)
        note(reader.finish())
        bad_clocks += reader.bad_clock
        # A machine in which nothing began would not do better the next time.
        if len(left) == before and not reader.bad_clock:
            return
        machines += 1
