# SPDX-License-Identifier: GPL-2.0
"""The root file system of the machine: busybox, the tests, what is added, and a command."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

from memfile import paths
from memfile.boot.kernel import Kernel, ToolError

# Runs as the guest's process 1. Tells the host by /dev/status how far it came.
INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /out /root /var
/bin/busybox --install -s /bin
export PATH=/add:/bin HOME=/root TERM=dumb LC_ALL=C
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
mkdir -p /dev/shm /dev/hugepages
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
ln -sf /proc/self/fd /dev/fd
for port in /sys/class/virtio-ports/*; do
    read -r name <"$port/name"
    ln -s "${port##*/}" "/dev/${name#memfile.}"
done
echo "init $(uname -r)" >/dev/status
if [ -e /lib/modules/load ]; then
    insmod /lib/modules/memfile.ko >/dev/out 2>&1 </dev/null
    rc=$?
    echo "module $rc" >/dev/status
    [ $rc = 0 ] || poweroff -f
fi
cd /root
# The guest's commands all see one and the same open port, and only once.
sh /cmd </dev/null >/dev/out 2>&1
rc=$?
cd /
[ -z "$(ls -A /out)" ] || tar -C /out -cf /dev/files .
echo "tainted $(cat /proc/sys/kernel/tainted 2>/dev/null)" >/dev/status
echo "exit $rc" >/dev/status
poweroff -f
"""


class Cpio:
    """Writes the "newc" archive the kernel unpacks as its first root."""

    def __init__(self, out: io.BufferedIOBase) -> None:
        self._out = out
        self._inode = 0
        self._dirs: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"") -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = [self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0]
        head = b"070701" + b"".join(b"%08X" % f for f in fields)
        self._out.write(head + raw + b"\0" * (-(len(head) + len(raw)) % 4))
        self._out.write(data + b"\0" * (-len(data) % 4))

    def _parents(self, name: str) -> None:
        for parent in reversed(Path(name).parents):
            if str(parent) not in (".", *self._dirs):
                self._dirs.add(str(parent))
                self._entry(str(parent), stat.S_IFDIR | 0o755)

    def text(self, name: str, text: str, mode: int = 0o755) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, text.encode())

    def file(self, name: str, source: Path) -> None:
        self._parents(name)
        mode = 0o755 if os.access(source, os.X_OK) else 0o644
        self._entry(name, stat.S_IFREG | mode, source.read_bytes())

    def tree(self, name: str, source: Path) -> None:
        if not source.is_dir():
            self.file(name, source)
            return
        for path in sorted(source.rglob("*")):
            if path.is_file():
                self.file(f"{name}/{path.relative_to(source)}", path)

    def close(self) -> None:
        self._entry("TRAILER!!!", 0)


def shared_libraries(program: Path) -> list[Path]:
    """What a dynamically linked program needs; nothing for a static one."""
    with program.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
    run = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
    if "not found" in run.stdout:
        raise ToolError(f"{program} needs a library this machine lacks: {run.stdout.strip()}")
    return [Path(p) for p in re.findall(r"(/\S+) \(0x", run.stdout)]


def static_busybox() -> Path:
    found = shutil.which("busybox")
    if not found:
        raise ToolError("busybox is missing; install busybox-static or run scripts/setup")
    if shared_libraries(Path(found)):
        raise ToolError(f"{found} is not static; install busybox-static or run scripts/setup")
    return Path(found)


def command_line(command: list[str]) -> str:
    if len(command) == 1 and any(c.isspace() for c in command[0]):
        return command[0] + "\n"
    return shlex.join(command) + "\n"


def write_initramfs(path: Path, args: argparse.Namespace, kernel: Kernel) -> None:
    with path.open("wb") as out:
        cpio = Cpio(out)
        cpio.text("init", INIT)
        cpio.file("bin/busybox", static_busybox())
        cpio.text("cmd", command_line(args.command))
        if paths.PROGRAMS.is_dir():
            cpio.tree("bin", paths.PROGRAMS)
        # memfile.ko, and what only tests load.
        for module in sorted(kernel.module.parent.glob("*.ko")):
            cpio.file(f"lib/modules/{module.name}", module)
        if not args.no_module:
            cpio.text("lib/modules/load", "")
        if args.add_kernel:
            cpio.file("add/bzImage", kernel.image)
        libraries: set[Path] = set()
        for source in args.add:
            if not source.exists():
                raise ToolError(f"--add: {source} does not exist")
            cpio.tree(f"add/{source.resolve().name}", source)
            if source.is_file():
                libraries.update(shared_libraries(source))
        for library in sorted(libraries):
            cpio.file(str(library).lstrip("/"), library)
        cpio.close()
