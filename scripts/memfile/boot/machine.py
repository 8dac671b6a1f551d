# SPDX-License-Identifier: GPL-2.0
"""One QEMU: how it is called, and what came out of it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from memfile.boot.kernel import Kernel
from memfile.paths import read_text
from memfile.program import EXIT_DIED, EXIT_TIMEOUT, EXIT_TOOL


def qemu_line(
    args: argparse.Namespace, kernel: Kernel, accel: str, log: Path, terminal: int | None = None
) -> list[str]:
    # On a busy host the kernel's test of its timer fails, and the kernel gives up.
    append = ["console=ttyS0", "printk.time=1", "panic=-1", "oops=panic", "no_timer_check"]
    append.append("kunit.enable=1 kunit.autorun=1" if args.kunit else "kunit.enable=0")
    if kernel.flavour in ("debug", "fuzz"):
        # With five levels KASAN may take the direct map for wild while the boot CPU's features
        # are read again, which switches lockdep off for the rest of the run.
        append.append("no5lvl")
    append += args.append
    line = [args.emulator, "-nodefaults", "-no-user-config", "-machine", "q35"]
    if args.icount:
        line += ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]
    elif accel == "kvm":
        line += ["-accel", "kvm"]
    else:
        line += ["-accel", f"tcg,thread={args.tcg_thread}"]
    line += ["-cpu", "host" if accel == "kvm" else cpu_model(args.icount)]
    line += ["-smp", str(args.cpus), "-m", args.mem]
    line += ["-kernel", str(kernel.image), "-initrd", str(log / "initramfs.cpio")]
    line += ["-append", " ".join(append)]
    line += args.qemu_arg
    line += ["-display", "none", "-monitor", "none", "-no-reboot"]
    line += ["-serial", f"file:{log}/serial.log", "-device", "virtio-serial-pci"]
    # Appended to: the status before the boot is "lost". Not the stdio
    # backend: at the end of its input it tells the guest that the port is closed.
    ports = (("out", "/dev/stdout"), ("status", f"{log}/status"), ("files", f"{log}/out.tar"))
    for port, path in ports:
        line += ["-chardev", f"file,id={port},path={path},append=on"]
        line += ["-device", f"virtserialport,chardev={port},name=memfile.{port}"]
    if terminal is not None:
        line += ["-chardev", f"socket,id=terminal,fd={terminal}"]
        line += ["-device", "virtserialport,chardev=terminal,name=memfile.terminal"]
    return line


def cpu_model(icount: bool) -> str:
    """The emulated CPU.

    With erms the kernel clears a page by 4096 turns of "rep stosb", each of which takes as long as
    another instruction: without it a page of 1 GiB is cleared in a fifth of the time. Where
    instructions are counted the CPU stays as it is, so that saved results can be compared.
    """
    return "max,+svm,+npt" if icount else "max,+svm,+npt,-erms,-fsrm"


@dataclasses.dataclass
class Run:
    """The results of one boot."""

    code: int
    reason: str
    seconds: float
    status: dict[str, str]


class Machine:
    """One QEMU process, watched until it ends or its time is over."""

    def __init__(
        self, line: list[str], log: Path, timeout: float, quiet: bool, fds: tuple[int, ...] = ()
    ) -> None:
        self.line = line
        self.log = log
        self.timeout = timeout
        self.quiet = quiet
        # Descriptors of this process that the command line names.
        self.fds = fds

    def run(self) -> Run:
        (self.log / "status").write_text("lost\n")
        start = time.monotonic()
        timed_out = threading.Event()
        with (self.log / "qemu.log").open("wb") as errors:
            # QEMU must not outlive this process, however this process ends.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.line],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=self.fds,
            )

        def expire() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(self.timeout, expire)
        timer.start()
        try:
            self._stream(process)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        return self._judge(code, timed_out.is_set(), time.monotonic() - start)

    def _stream(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with (self.log / "out.log").open("wb") as kept:
            while chunk := os.read(process.stdout.fileno(), 65536):
                kept.write(chunk)
                kept.flush()
                if not self.quiet:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()

    def _judge(self, qemu_code: int, timed_out: bool, seconds: float) -> Run:
        words = (line.partition(" ") for line in read_text(self.log / "status").splitlines())
        status = {key: value.strip() for key, _, value in words if key != "lost"}
        console = read_text(self.log / "serial.log")
        panic = re.search(r"Kernel panic - not syncing: .*", console)

        def result(code: int, reason: str) -> Run:
            return Run(code, reason, seconds, status)

        if "exit" in status:
            code = int(status["exit"])
            return result(code, "ok" if code == 0 else f"the command ended with {code}")
        if status.get("module", "0") != "0":
            return result(EXIT_TOOL, "memfile.ko could not be loaded")
        if timed_out:
            where = "the command" if "init" in status else "the boot"
            return result(EXIT_TIMEOUT, f"timeout: {where} took longer than {self.timeout:g} s")
        if not console and qemu_code != 0:
            return result(EXIT_TOOL, f"QEMU failed: {read_text(self.log / 'qemu.log').strip()}")
        if panic:
            return result(EXIT_DIED, panic.group(0))
        if "init" in status:
            return result(EXIT_DIED, "the VM died while the command ran")
        return result(EXIT_DIED, "the guest never reached its init")


def console_tail(log: Path, lines: int = 50) -> str:
    return "\n".join(read_text(log / "serial.log").splitlines()[-lines:])
