# SPDX-License-Identifier: GPL-2.0
"""The user's terminal and the guest's, joined."""

from __future__ import annotations

import os
import socket
import termios
import threading
import tty
from typing import Any


class Terminal:
    """The user's terminal and the guest's /dev/terminal, joined until the machine ends.

    What is typed goes to the guest as it is, Ctrl-C too.
    """

    def __init__(self) -> None:
        self._ours, self._machine = socket.socketpair()
        self._machine.set_inheritable(True)
        self._settings: list[Any] | None = None

    @property
    def fd(self) -> int:
        return self._machine.fileno()

    def __enter__(self) -> Terminal:
        if os.isatty(0):
            self._settings = termios.tcgetattr(0)
            tty.setraw(0)
        for copy in (self._type, self._show):
            threading.Thread(target=copy, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._settings is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._settings)

    def _type(self) -> None:
        while chunk := os.read(0, 1024):
            self._ours.sendall(chunk)

    def _show(self) -> None:
        while chunk := self._ours.recv(65536):
            os.write(1, chunk)
