# SPDX-License-Identifier: GPL-2.0
"""The machines that run memfile-tests: the module's KUnit suites, the suites, the variants."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import time

from memfile import program
from memfile.check.kernel_log import watched_case
from memfile.check.outcome import exit_code_case
from memfile.check.session import Check, Job
from memfile.check.suites import (
    OF_KERNEL,
    OWN_MACHINE,
    PREPARE,
    SECONDS,
    VARIANT,
    VARIANTS,
    WITH_QEMU,
    WITHOUT_PORTS,
    guest_cases,
    own_machine,
    seconds,
    share_out,
    variant_tests,
)
from memfile.ktap import FAIL, Case, Parser, parse
from memfile.paths import read_text
from memfile.program import EXIT_DIED, EXIT_TIMEOUT

# A machine that has stopped: the end of the name of the second one, and how many seconds it says
# nothing before it counts as such.
AGAIN, SILENCE = "-again", 600
# Two machines, and what else runs, share the host's processors: the limits of cases are those of one
# that has them alone, times this.
SHARED = 2
# The end of the kernel's boot on its console, and the plan of a kernel without suites of KUnit.
INIT, NO_SUITES = "Run /init as init process", re.compile(r"\] 1\.\.0$")
# Variables that the tests take: it hands them on.
TAKEN = ("MEMFILE_BOOTS", "MEMFILE_PRESSURE", "MEMFILE_SEED")

# Without the ports to the host, and with them again and with what was said meanwhile. A port's device
# is there before the driver finds the port: until then it cannot be opened. And without the device
# the name would be that of a new file.
UNPLUG = """
ports=/sys/bus/virtio/drivers/virtio_console
for port in $ports/virtio*; do port=${port##*/}; done
echo $port >$ports/unbind
exec >/tmp/said 2>&1
"""
PLUG = """
echo $port >$ports/bind
until [ -c /dev/out ] && { command exec >/dev/out; } 2>/dev/null; do sleep 1; done
exec 2>&1
cat /tmp/said
"""
LEAK_SCAN = """
rmmod memfile 2>/dev/null
if [ -e /sys/kernel/debug/kmemleak ]; then
    # Objects younger than five seconds are not reported.
    sleep 6; echo scan >/sys/kernel/debug/kmemleak
    sleep 1; echo scan >/sys/kernel/debug/kmemleak
    cat /sys/kernel/debug/kmemleak >/out/kmemleak
fi
[ ! -e /sys/kernel/debug/kcsan ] || cat /sys/kernel/debug/kcsan >/out/kcsan
"""


def guest_tests(check: Check) -> list[Job]:
    """The machines: two that share the suites, and those that some suites want for themselves."""
    tests = check.args.tests
    kunit = not tests or any(test.startswith("kunit") for test in tests)
    suites = chosen_suites(check)
    jobs: list[Job] = []
    long: list[Job] = []
    for machine, options in OWN_MACHINE.items():
        inside = [suite for suite in suites if own_machine(suite) == machine]
        if inside:
            names = [name for suite in inside for name in suites.pop(suite)]
            prepare = PREPARE.get(machine, "true")
            job = functools.partial(guest_boot, check, machine, names, options, False, "", prepare)
            (long if machine in SECONDS else jobs).append(job)
    shards = [shard for shard in share_out(suites) if shard] or [[]] * kunit
    for number, shard in enumerate(shards):
        names = [name for suite in shard for name in suites[suite]]
        first = kunit and number == 0
        jobs.insert(number, functools.partial(guest_boot, check, f"main-{number}", names, [], first))
    return long + jobs


def chosen_suites(check: Check) -> dict[str, list[str]]:
    """The suites that run, and what the patterns name of each."""
    tests = check.args.tests
    suites: dict[str, list[str]] = {}
    for case in guest_cases(tests):
        suites.setdefault(case.split(".")[0], []).append(case if tests else case.split(".")[0])
    if not tests:
        here = check.flavour
        suites = {suite: names for suite, names in suites.items() if OF_KERNEL.get(suite, here) == here}
    # A guest within a guest is slow enough, and its QEMU knows memfiles only.
    if not tests and check.flavour in ("base", "debug", "kcsan"):
        suites = {suite: names for suite, names in suites.items() if OWN_MACHINE.get(suite) is not WITH_QEMU}
    return {suite: list(dict.fromkeys(names)) for suite, names in suites.items()}


def variants(check: Check) -> list[Job]:
    """A machine for each variant that the patterns name, what takes long first."""
    jobs: list[tuple[int, Job]] = []
    for name, variant in VARIANTS.items():
        if variant.kernel not in ("", check.flavour):
            continue
        tests = variant_tests(f"{VARIANT}{name}", variant, check.args.tests)
        if tests:
            options = ["--append", variant.append] if variant.append else []
            options += ["--mem", variant.memory] if variant.memory else []
            job = functools.partial(
                guest_boot, check, f"{VARIANT}{name}", tests, options, False, f"{VARIANT}{name}.", variant.prepare)
            jobs.append((seconds({test.split(".")[0] for test in tests}), job))
    return [job for _, job in sorted(jobs, key=lambda job: -job[0])]


def kunit_cases(console: list[str]) -> list[Case]:
    """The suites of the kernel, which run when it boots, and those of the module.

    A kernel need have none built in; 7.3 has some for Rust, 7.2 says "1..0".
    """
    init = next((number for number, line in enumerate(console) if INIT in line), 0)
    boot = console[:init]
    built_in = [] if any(NO_SUITES.search(line) for line in boot) else parse(boot, "kunit")
    of_module = parse(console[init:], "kunit")
    return built_in + (of_module or [Case("kunit", FAIL, "no case ran when the module was loaded")])


def guest_boot(
    check: Check, name: str, tests: list[str], options: list[str], kunit: bool, prefix: str = "", prepare: str = "true",
) -> None:
    """One machine: the module's KUnit suites if asked for, and these tests.

    `prefix` comes before the names of the tests, `prepare` is done before they run.
    """
    command = LEAK_SCAN
    if tests:
        patterns = " ".join(f"'{test}'" for test in tests)
        require = "" if check.flavour == "base" else "--require-memfile"
        variables = "".join(f"{name}={shlex.quote(os.environ[name])} " for name in TAKEN if name in os.environ)
        command = (
            f"({prepare}) || {{ echo 'the settings are not in force'; exit 1; }}\n"
            f"{UNPLUG if name in WITHOUT_PORTS else ''}"
            f"{variables}memfile-tests --kmsg --time-factor {SHARED * check.slow} {require} {patterns}\n"
            f"rc=$?\n{PLUG if name in WITHOUT_PORTS else ''}{LEAK_SCAN}exit $rc"
        )
    parser = Parser()
    seen: list[Case] = []
    since: float | None = None

    def note(cases: list[Case], seconds: float | None = None) -> None:
        cases = [dataclasses.replace(case, name=f"{prefix}{case.name}", seconds=seconds) for case in cases]
        seen.extend(cases)
        check.report(cases)

    def on_line(text: str) -> None:
        nonlocal since
        cases = parser.feed(text)
        now = time.monotonic()
        note(cases, None if since is None else round(now - since, 2))
        # From the first line on: what comes before it is the boot.
        if cases or since is None:
            since = now

    # With its CPUs emulated in parallel (QEMU 7.2) the machine has been seen to hang and to
    # die in stress tests, cause unknown; in turn it has not. And two machines fill two cores.
    thread = os.environ.get("TCG_THREAD", "single")
    machine = ["--kernel", check.flavour, "--tcg-thread", thread, *options] + ["--kunit"] * kunit
    timeout = max(1500, 4 * seconds({test.split(".")[0] for test in tests}))
    # An emulated machine with real guests has been seen to stop, with nothing in its log: see
    # testing.rst. The remaining cases then run in another one, once, and the output says so.
    stops = "--emulator" in options and not name.endswith(AGAIN)
    result = check.boot(name, command, machine, timeout, on_line, SILENCE if stops else 0)
    stopped = result["code"] in (EXIT_TIMEOUT, EXIT_DIED, *program.EXIT_STOPPED)
    if stops and stopped and not result.get("finished") and not check.splats(name):
        done = {case.name for case in seen}
        left = [test for test in guest_cases(tests) if f"{prefix}{test}" not in done]
        print(f"--- {name}: the machine has stopped; {len(left)} cases run in a second one")
        guest_boot(check, name + AGAIN, left, options, kunit, prefix, prepare)
        return
    note(parser.finish())
    check.judge_boot(name, result)
    if result.get("finished") and check.flavour == "kcsan":
        check.report([watched_case(name, read_text(check.log / name / "out/kcsan"))])
    if tests and result.get("finished"):
        check.report(exit_code_case(f"{prefix}memfile-tests", seen, int(str(result["code"]))))
        names = {case.name for case in seen}
        missing = [case for test in guest_cases(tests) if (case := f"{prefix}{test}") not in names]
        check.report([Case(case, FAIL, "listed, but it did not run") for case in missing])
    if kunit and check.flavour != "base":
        cases = kunit_cases(read_text(check.log / name / "serial.log").splitlines())
        check.report([case for case in cases if check.wanted(case.name) or case.name == "kunit"])
