# SPDX-License-Identifier: GPL-2.0
"""The same programs on two kernels: what runs, what came of it, and what differs.

scripts/check compares the kernel's own selftests with this, scripts/regress a user's
programs. `python3 scripts/upstream.py FOLDER` says how to build the selftests of
tools/testing/selftests there, for scripts/build-selftests.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths
from memfile.ktap import FAIL, PASS, SKIP, Case

LIST = Path(__file__).parent / "upstream.toml"

KSFT_SKIP = 4
KILLED = 128 + 9
# Stands for the exit code of a program with which the machine ended.
DIED = -1
# How often the unpatched kernel may show that a program has more than one result.
REPEATS = 3
KEPT_LINES = 20000

# Two nodes, because some programs migrate from one to the other, a CPU for each.
MACHINE = ["--cpus", "2", "--mem", "2G"] + [
    f"--qemu-arg={word}" for node in "01" for word in (
        "-object", f"memory-backend-ram,id=node{node},size=1G",
        "-numa", f"node,nodeid={node},cpus={node},memdev=node{node}",
    )
]


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a program."""

    name: str
    # The name of its file in the guest.
    file: str
    args: str = ""
    # Lines for the guest's shell.
    before: str = ""
    quick: bool = False
    limit: int = 60
    # Why only the lines count that say how a test ended; empty if all do.
    results: str = ""
    # Lines that mean nothing.
    ignore: tuple[str, ...] = ()

    def command(self) -> str:
        shell = "bash " if self.file.endswith(".sh") else ""
        return f"{self.before.strip()}\ncd /tmp/work\n{shell}./{self.file} {self.args}".strip()


@dataclasses.dataclass(frozen=True)
class Expected:
    """A difference that is meant."""

    program: str
    # Every line that one of the kernels has and the other has not must match one of these.
    lines: tuple[str, ...]
    cause: str


@dataclasses.dataclass
class Result:
    """What came of a program on one kernel."""

    # DIED if the machine ended with it.
    code: int
    seconds: int
    lines: list[str]
    limit: int = 60

    @property
    def ended(self) -> str:
        if self.code == 0:
            return "pass"
        if self.code == KSFT_SKIP:
            return "skip"
        if self.code == DIED:
            return "ends the machine"
        # By no other: the guest's clock, in whole seconds.
        if self.code == KILLED and self.seconds + 1 >= self.limit:
            return "timeout"
        return f"exit code {self.code}"


# --- the list -----------------------------------------------------------------


class BadList(Exception):
    """The list of programs is not right; says how in one sentence."""


def run_name(program: str) -> str:
    """"x86/a-b" and "a-b.sh" are "a_b"."""
    return program.rpartition("/")[2].removesuffix(".sh").replace("-", "_")


@dataclasses.dataclass
class Programs:
    """The list of selftests."""

    # folder/program, without an ending unless it is a script.
    built: list[str]
    # Likewise; only the patched source has them.
    added: list[str]
    sources: dict[str, str]
    scripts: dict[str, str]
    absent: dict[str, str]
    runs: dict[str, Program]
    expected: list[Expected]


def read_list(path: Path = LIST, base: str = paths.BASE) -> Programs:
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    own = data.get("bases", {}).get(base, {})
    without = set(own.get("without", "").split())
    listed, added = ([f"{folder}/{name}" for folder, names in data.get(key, {}).items() for name in names.split()]
                     for key in ("folders", "added"))
    if unknown := without - set(listed):
        raise BadList(f"base {base} is without {min(unknown)}, which no folder has")
    built = [name for name in [*listed, *own.get("also", "").split()] if name not in without]
    gone = {run_name(name) for name in without}
    scripts: dict[str, str] = data.get("scripts", {})
    programs = [*built, *added, *scripts]
    files = {run_name(name): run_name(name) + (".sh" if name.endswith(".sh") else "") for name in programs}
    if len(files) != len(programs):
        names = [run_name(name) for name in programs]
        raise BadList("two programs have the name " + next(name for name in names if names.count(name) > 1))
    runs = {name: Program(name, file, limit=data["limit"]) for name, file in files.items()}
    known = {field.name for field in dataclasses.fields(Program)} - {"name", "file"} | {"program"}
    for name, table in data.get("run", {}).items():
        if unknown := set(table) - known:
            raise BadList(f"[run.{name}] has a key {min(unknown)!r}")
        settings = dict(table)
        program = settings.pop("program", name)
        if program in gone:
            continue
        if program not in files or (name in files and program != name):
            raise BadList(f"[run.{name}] is of no program")
        settings["ignore"] = tuple(settings.get("ignore", ()))
        runs[name] = Program(name, files[program], **{"limit": data["limit"], **settings})
    expected = [Expected(one["program"], tuple(one["lines"]), one["cause"]) for one in data.get("difference", [])
                if one["program"] not in gone]
    for one in expected:
        if one.program not in runs:
            raise BadList(f"a difference of {one.program}, which does not run")
    return Programs(built, added, data.get("sources", {}), scripts, data.get("absent", {}), runs, expected)


def unnamed(listed: Programs, folder: Path) -> list[str]:
    """Programs of the folders that the list does not name, and those that it names and that are not there."""
    problems = []
    named = {*listed.built, *listed.absent}
    for top in sorted({name.partition("/")[0] for name in listed.built} - {"kvm"}):
        for source in sorted((folder / top).glob("*.c")):
            text = source.read_text(errors="replace")
            if re.search(r"^(int )?main\(|TEST_HARNESS_MAIN", text, re.M) and f"{top}/{source.stem}" not in named:
                problems.append(f"{top}/{source.name} is not in {LIST.name}")
    # KVM's Makefile names those of all architectures.
    makefile = (folder / "kvm/Makefile.kvm").read_text()
    kvm = re.findall(r"^TEST_GEN_PROGS(?:_EXTENDED)?_(?:COMMON|x86) \+?= (?!\$)(\S+)", makefile, re.M)
    problems += [f"kvm/{name} is not in {LIST.name}" for name in kvm if f"kvm/{name}" not in named]
    problems += [
        f"{name} of {LIST.name} does not exist" for name in [*listed.built, *listed.scripts]
        if not (folder / name).with_suffix(".sh" if name.endswith(".sh") else ".c").exists()
    ]
    return problems


def build_lines(listed: Programs) -> Iterator[str]:
    """For scripts/build-selftests: "kvm PROGRAM", "script FILE NAME" and "cc NAME SOURCE...".

    The first word ends in "+" if it is of the patched source.
    """
    for name in [*listed.built, *listed.added]:
        folder, _, program = name.partition("/")
        mark = "+" if name in listed.added else ""
        if folder == "kvm":
            yield f"kvm{mark} {program}"
            continue
        extra = [part for pattern, parts in listed.sources.items() if fnmatch.fnmatchcase(name, pattern)
                 for part in parts.split()]
        yield " ".join([f"cc{mark}", run_name(name), f"{name}.c", *extra])
    for name, beside in listed.scripts.items():
        yield f"script {name} {run_name(name)}.sh"
        for other in beside.split():
            yield f"script {other} {Path(other).name}"


# --- in the guest -------------------------------------------------------------

# What programs change and do not always put back.
KNOBS = """/proc/sys/vm/nr_overcommit_hugepages /proc/sys/vm/overcommit_memory
/proc/sys/vm/enable_soft_offline /proc/sys/vm/memory_failure_early_kill /proc/sys/vm/compaction_proactiveness
/proc/sys/vm/swappiness /proc/sys/vm/max_map_count /proc/sys/fs/nr_open /proc/sys/kernel/randomize_va_space
/sys/kernel/mm/lru_gen/enabled /sys/kernel/mm/ksm/run /sys/kernel/mm/ksm/merge_across_nodes
/sys/kernel/mm/ksm/use_zero_pages /sys/kernel/mm/ksm/pages_to_scan /sys/kernel/mm/ksm/sleep_millisecs
/sys/kernel/mm/ksm/max_page_sharing
/sys/module/kvm/parameters/nx_huge_pages /sys/module/kvm/parameters/nx_huge_pages_recovery_ratio
/sys/module/kvm/parameters/nx_huge_pages_recovery_period_ms"""

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
    """What these programs need in the guest."""
    names = {program.file for program in programs}
    scripts = {name for name in names if name.endswith(".sh")}
    if scripts:
        # They start each other, and programs.
        names |= {path.name for path in folder.glob("*.sh")} | {"write_to_hugetlbfs"}
    found = [folder / name for name in sorted(names)]
    return [*found, Path("/bin/bash-static")] if scripts else found


def script(programs: Iterable[Program]) -> str:
    """What the guest's shell does."""
    parts = [PRELUDE]
    for program in programs:
        parts.append(f"run {shlex.quote(program.name)} {program.limit} <<'MEMFILE_END'\n")
        parts.append(f"{program.command()}\nMEMFILE_END\n")
    return "".join(parts) + "tidy\n"


# --- what came of it ----------------------------------------------------------

BEGIN = re.compile(r"@@ begin (\S+)$")
KERNEL = re.compile(r"@@ kernel (?:\[ *\d+\.\d+\] ?)?(?:\[ *[TC]\d+\] ?)?(.*)")
END = re.compile(r"@@ end (\S+) (\d+) (\d+) (.*)$")

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
# What tells how a test, or a part of it, ended.
TELLS = re.compile(
    r"^\s*(# *)*(not )?ok\b|^\s*1\.\.\d|\[ *(PASS|FAIL|SKIP|OK|XFAIL|XPASS) *\]|\b(PASS|FAIL)(ED)?\b"
    r"|skip|fail|assert|panic|error|unexpected|\bdone\b|^kernel: |^huge pages: ", re.I)
# Addresses, times, and dots as long as something takes; also what names a process.
VARIES = (
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{12,16}\b", re.I), "ADDRESS"),
    (re.compile(r"\b(pid|tid|seed)( ?[=:] ?)-?\d+", re.I), r"\1\2NUMBER"),
    (re.compile(r"\b\d+(\.\d+)? ?([munµ]?s|secs?|seconds?|usecs?|msecs?|ns|MB/s|GB/s|MiB/s|cycles)\b"), "TIME"),
    (re.compile(r"\b\d+\.\d+s?\b"), "FRACTION"),
    (re.compile(r"\.{3,}"), "..."),
)
NUMBER = re.compile(r"\d+")


def normal(line: str) -> str:
    """A line without what is never twice the same."""
    line = ESCAPES.sub("", line).rstrip()
    for pattern, word in VARIES:
        line = pattern.sub(word, line)
    # Numbers are a part of the result only in a line that tells one.
    return line if TELLS.search(line) else NUMBER.sub("N", line)


class Reader:
    """Feed it what the guest says, line by line; it tells what came of each program."""

    def __init__(self, programs: Iterable[Program], splat: re.Pattern[str]) -> None:
        self._programs = {program.name: program for program in programs}
        self._splat = splat
        self._lines: list[str] = []
        # The program that runs.
        self.begun = ""

    def feed(self, line: str) -> tuple[Program, Result] | None:
        line = line.rstrip("\r\n")
        if begin := BEGIN.match(line):
            self.begun, self._lines = begin[1], []
        elif not self.begun:
            pass
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


def compared(program: Program, result: Result) -> list[str]:
    """What two results must have in common."""
    lines: list[str] = []
    for text in result.lines:
        line = normal(text)
        if not line or any(re.search(pattern, line) for pattern in program.ignore):
            continue
        if program.results and not TELLS.search(line):
            continue
        # A line that is said again and again is said once.
        if not lines or lines[-1] != line:
            lines.append(line)
    return [*lines, f"ended: {result.ended}"]


def differences(program: Program, base: Result, patched: Result) -> list[str]:
    """Lines of one only: "-" of the unpatched, "+" of the patched kernel."""
    one, other = compared(program, base), compared(program, patched)
    if base.ended == patched.ended and base.ended in ("timeout", "ends the machine"):
        # Both were stopped, but not at the same line.
        said = [[line for line in lines if not line.startswith("huge pages: ")][:-1] for lines in (one, other)]
        common = min(map(len, said))
        one, other = said[0][:common], said[1][:common]
    diff = difflib.unified_diff(one, other, lineterm="", n=0)
    return [line for line in diff if not re.match(r"(---|\+\+\+|@@) ?", line)]


def why_skipped(result: Result) -> str:
    for line in reversed(result.lines):
        if re.search(r"skip", line, re.I):
            return re.sub(r"^1\.\.0 +# ?SKIP:?( -)? *", "", line.strip(), flags=re.I)
    said = [line for line in result.lines if line.strip() and not line.startswith("huge pages: ")]
    return said[-1].strip() if said else "it skipped itself"


def where_failed(result: Result) -> str:
    """The first line that says what went wrong."""
    for pattern in (r"^\s*\S+\.[ch]:\d+: ", r"^\s*(# *)?not ok\b", r"fail|error|assert"):
        for line in result.lines:
            if re.search(pattern, line, re.I) and not line.startswith("==== Test Assertion"):
                return line.strip()[:160]
    return ""


@dataclasses.dataclass
class Verdict:
    """One program on both kernels."""

    program: Program
    # same, expected, wavers or differs
    kind: str
    # As Result.ended, of the patched kernel.
    ended: str
    reason: str
    lines: list[str] = dataclasses.field(default_factory=list)

    def case(self, prefix: str) -> Case:
        if self.kind == "differs":
            return Case(f"{prefix}{self.program.name}", FAIL, self.reason, self.lines)
        status = SKIP if self.ended == "skip" else PASS
        return Case(f"{prefix}{self.program.name}", status, self.reason)


def among(program: Program, patched: Result, runs: list[Result]) -> bool:
    """Is this one of the results that these runs show, which differ in order and numbers?

    It has what all of them have, and nothing that none of them has.
    """
    texts = [compared(program, run) for run in runs]
    if any(one == other for number, one in enumerate(texts) for other in texts[:number]):
        return False
    if patched.ended not in {run.ended for run in runs}:
        return False
    sets = [{NUMBER.sub("N", line) for line in text[:-1]} for text in texts]
    own = {NUMBER.sub("N", line) for line in compared(program, patched)[:-1]}
    return len(runs) > 1 and set.intersection(*sets) <= own <= set.union(*sets)


def judge(
    program: Program, patched: Result | None, base: Result | None, repeats: Iterable[Result] = (),
    expected: Iterable[Expected] = (),
) -> Verdict:
    """Are the kernels the same? `repeats` are more runs on the unpatched kernel."""
    if patched is None or base is None:
        which = "patched" if patched is None else "unpatched"
        return Verdict(program, "differs", "", f"it did not run on the {which} kernel")
    meant = [one for one in expected if one.program == program.name]
    lines = differences(program, base, patched)
    if not lines and meant:
        reason = f"a difference is expected and there is none: {meant[0].cause}"
        return Verdict(program, "differs", patched.ended, reason)
    if not lines:
        if patched.ended == "pass":
            # Without the two that each has.
            number = len(compared(program, patched)) - 2
            reason = f"{number} {'line' if number == 1 else 'lines'}, same as unpatched"
        elif patched.ended == "skip":
            reason = f"on both kernels: {why_skipped(patched)}"
        else:
            where = where_failed(patched)
            reason = f"{patched.ended} on both kernels" + (f": {where}" if where else "")
        return Verdict(program, "same", patched.ended, reason)
    for one in meant:
        if all(any(re.search(pattern, line) for pattern in one.lines) for line in lines):
            return Verdict(program, "expected", patched.ended, f"differs as it should: {one.cause}")
    # A program that has several results has them without our patches, too.
    seen = list(repeats)
    for number, other in enumerate(seen, 2):
        if not differences(program, other, patched):
            return Verdict(
                program, "wavers", patched.ended,
                f"{patched.ended}, not the same each time: run {number} on the unpatched kernel is the same")
    if among(program, patched, [base, *seen]):
        return Verdict(
            program, "wavers", patched.ended,
            f"{patched.ended}, not the same each time: no two runs on the unpatched kernel are, either")
    again = f", also in {len(seen)} more runs of the unpatched one" if seen else ""
    return Verdict(
        program, "differs", patched.ended,
        f"the kernels differ{again}: unpatched {base.ended}, patched {patched.ended}",
        ["- unpatched, + patched:", *lines[:40]])


def alone(program: Program, result: Result, prefix: str) -> Case:
    """One program on one kernel, if there is no other to compare it with."""
    name = f"{prefix}{program.name}"
    if result.ended == "skip":
        return Case(name, SKIP, why_skipped(result), result.lines[-30:])
    if result.ended != "pass":
        return Case(name, FAIL, f"{result.ended}: {where_failed(result)}", result.lines[-30:])
    return Case(name, PASS, "not compared: KERNEL_SRC")


def summary(verdicts: Iterable[Verdict]) -> str:
    """The one line at the end."""
    verdicts = list(verdicts)

    def count(choose: Callable[[Verdict], bool]) -> int:
        return sum(map(choose, verdicts))

    same = [v for v in verdicts if v.kind in ("same", "wavers")]
    ended = {
        "pass": sum(v.ended == "pass" for v in same), "skip": sum(v.ended == "skip" for v in same),
        "take too long": sum(v.ended == "timeout" for v in same),
    }
    ended["fail"] = len(same) - sum(ended.values())
    words = ", ".join(f"{number} {word}" for word, number in ended.items() if number)
    others = [
        f"{number} {text}" for number, text in (
            (count(lambda v: v.kind == "wavers"), "of them not the same each time"),
            (count(lambda v: v.kind == "expected"), "different as expected"),
            (count(lambda v: v.kind == "differs"), "different"),
        ) if number
    ]
    text = f"{len(same)} of {len(verdicts)} programs give the same as without us"
    return text + (f" ({words})" if words else "") + "".join(f", {other}" for other in others)


# --- several programs on one kernel -------------------------------------------

# Boots a machine: its name, the programs in it, what its shell does, and who hears each line.
Boot = Callable[[str, list[Program], str, Callable[[str], None]], None]


def run_all(name: str, programs: list[Program], boot: Boot, splat: re.Pattern[str],
            each: Callable[[Program, Result], None]) -> None:
    """Runs the programs, after one with which the machine ended in a new machine."""
    left, machines = list(programs), 0
    while left:
        reader = Reader(left, splat)

        def note(found: tuple[Program, Result] | None) -> None:
            if found:
                left.remove(found[0])
                each(*found)

        def on_line(line: str, reader: Reader = reader) -> None:
            note(reader.feed(line))

        before = len(left)
        boot(name if not machines else f"{name}-{machines}", list(left), script(left), on_line)
        note(reader.finish())
        # A machine in which nothing began would not do better the next time.
        if len(left) == before:
            return
        machines += 1


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        listed = read_list()
    except BadList as error:
        print(f"upstream: {error}", file=sys.stderr)
        return 2
    if problems := unnamed(listed, Path(argv[0])):
        print("\n".join(f"upstream: {problem}" for problem in problems), file=sys.stderr)
        return 2
    print("\n".join(build_lines(listed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
