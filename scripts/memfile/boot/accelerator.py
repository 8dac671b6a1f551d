# SPDX-License-Identifier: GPL-2.0
"""KVM if a boot with it succeeds here, else TCG."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from pathlib import Path

from memfile import paths
from memfile.boot.initramfs import write_initramfs
from memfile.boot.kernel import Kernel
from memfile.boot.machine import Machine, qemu_line
from memfile.paths import read_text

KVM_GET_API_VERSION = 0xAE00


def kvm_answers() -> str | None:
    """None if /dev/kvm answers at all, else why it does not."""
    try:
        with open("/dev/kvm", "rb+", buffering=0) as kvm:
            fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm: {os.strerror(error.errno or 0)}"
    return None


def choose_accelerator(args: argparse.Namespace, kernel: Kernel) -> tuple[str, str]:
    """kvm only if a boot with it gives a guest that can run guests."""
    if args.icount:
        return "tcg", "instructions are counted"
    if args.accel != "auto":
        return args.accel, "asked for"
    why = kvm_answers()
    if why:
        return "tcg", why
    boot_id = read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
    paths.KVM_PROBE.parent.mkdir(parents=True, exist_ok=True)
    # The first process probes; those that come meanwhile wait for its answer.
    with paths.KVM_PROBE.open("a+") as stamp:
        fcntl.flock(stamp, fcntl.LOCK_EX)
        stamp.seek(0)
        key, _, answer = stamp.read().strip().partition(" ")
        if key != boot_id:
            answer = "yes" if probe_kvm(args, kernel) else "no"
            stamp.truncate(0)
            stamp.write(f"{boot_id} {answer}\n")
    if answer == "yes":
        return "kvm", "a probe boot with it succeeded"
    return "tcg", "/dev/kvm cannot boot a guest with KVM in it here"


def probe_kvm(args: argparse.Namespace, kernel: Kernel) -> bool:
    log = paths.LOGS / "kvm-probe"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir(parents=True)
    probe = argparse.Namespace(**vars(args))
    probe.command, probe.no_module, probe.add = ["test", "-c", "/dev/kvm"], True, []
    probe.kunit, probe.qemu_arg, probe.add_kernel = False, [], False
    write_initramfs(log / "initramfs.cpio", probe, kernel)
    line = qemu_line(probe, kernel, "kvm", log)
    return Machine(line, log, 30, quiet=True).run().code == 0
