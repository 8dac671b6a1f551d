# SPDX-License-Identifier: GPL-2.0
"""The root file system of the machine: busybox, the tests, files that are added, and a command."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from memfile import paths
from memfile.boot.kernel import Kernel
from memfile.program import ToolError

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
# A port is there before its name; with its name it can be opened.
until [ -e /dev/out ] && [ -e /dev/status ] && [ -e /dev/files ]; do
    for port in $(ls -d /sys/class/virtio-ports/* 2>/dev/null); do
        until read -r name <"$port/name" && [ "${name#memfile.}" != "$name" ]; do usleep 10000; done
        ln -sf "${port##*/}" "/dev/${name#memfile.}"
    done
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


class Root:
    """The machine's first root, as a folder of links; cpio makes of it the archive that the kernel unpacks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _place(self, name: str) -> Path:
        place = self._folder / name
        for parent in reversed(Path(name).parents):
            folder = self._folder / parent
            folder.mkdir(exist_ok=True)
            # An ordinary user of the guest must get through, with any umask of the host's user.
            folder.chmod(0o755)
        place.unlink(missing_ok=True)
        return place

    def text(self, name: str, text: str) -> None:
        place = self._place(name)
        place.write_text(text)
        place.chmod(0o755)

    def file(self, name: str, source: Path) -> None:
        place = self._place(name)
        mode = 0o755 if os.access(source, os.X_OK) else 0o644
        if stat.S_IMODE(source.stat().st_mode) & mode == mode:
            place.symlink_to(source.absolute())
        else:
            shutil.copyfile(source, place)
            place.chmod(mode)

    def tree(self, name: str, source: Path) -> None:
        if not source.is_dir():
            self.file(name, source)
            return
        for path in sorted(source.rglob("*")):
            if path.is_file():
                self.file(f"{name}/{path.relative_to(source)}", path)

    def pack(self, archive: Path) -> None:
        # A folder comes before its files.
        entries = sorted(self._folder.rglob("*"), key=str)
        for path in entries:
            # The same root is the same archive.
            if not path.is_symlink():
                os.utime(path, (0, 0))
        names = [str(path.relative_to(self._folder)) for path in entries]
        command = ["cpio", "--create", "--format=newc", "--null", "--dereference", "--owner=+0:+0"]
        command += ["--reproducible", "--quiet"]
        with archive.open("wb") as out:
            run = subprocess.run(
                command, cwd=self._folder, input="\0".join([*names, ""]).encode(), stdout=out, stderr=subprocess.PIPE,
                check=False)
        if run.returncode:
            raise ToolError(f"cpio: {run.stderr.decode(errors='replace').strip()}")


def shared_libraries(program: Path) -> list[Path]:
    """The libraries of a dynamically linked program; nothing for a static one."""
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
    if not shutil.which("cpio"):
        raise ToolError("cpio is missing; install cpio or run scripts/setup")
    with tempfile.TemporaryDirectory() as folder:
        root = Root(Path(folder))
        root.text("init", INIT)
        root.file("bin/busybox", static_busybox())
        root.text("cmd", command_line(args.command))
        if paths.PROGRAMS.is_dir():
            root.tree("bin", paths.PROGRAMS)
        # memfile.ko, and what only tests load.
        for module in sorted(kernel.module.parent.glob("*.ko")):
            root.file(f"lib/modules/{module.name}", module)
        if not args.no_module:
            root.text("lib/modules/load", "")
        if args.add_kernel:
            root.file("add/bzImage", kernel.image)
        libraries: set[Path] = set()
        for source in args.add:
            if not source.exists():
                raise ToolError(f"--add: {source} does not exist")
            root.tree(f"add/{source.resolve().name}", source)
            if source.is_file():
                libraries.update(shared_libraries(source))
        for library in sorted(libraries):
            root.file(str(library).lstrip("/"), library)
        root.pack(path)
