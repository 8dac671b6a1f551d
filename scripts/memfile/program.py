# SPDX-License-Identifier: GPL-2.0
"""How the programs in Python begin and end: as lib.sh says it for the others.

A program ends with 2 and one sentence if the user has to mend something, with 130 after Ctrl-C, with
143 after a plain kill, and with 129 if its terminal is closed. Its children end before it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EXIT_FAILED, EXIT_TOOL, EXIT_SPLAT, EXIT_TIMEOUT, EXIT_DIED = 1, 2, 3, 124, 255
# A closed terminal, Ctrl-C and a plain kill, and the codes after them.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
EXIT_STOPPED = tuple(128 + number for number in SIGNALS)
PR_SET_PDEATHSIG = 1


class ToolError(Exception):
    """Something is missing or wrong on the host; says what in one sentence."""


class Stopped(Exception):
    """A signal ends this program, or has ended one that it runs: nothing more is to begin."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with {code}")
        self.code = code


def say(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Ends this program with what the user has to mend."""
    say(message)
    sys.exit(EXIT_TOOL)


def die_with_parent() -> None:
    """A plain kill for this program as soon as the thread ends that has started it."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a program, and ends."""
    for number in SIGNALS:
        # Not where a parent has it ignored: that is a job in the background, or one of nohup.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        code = main(sys.argv[1:])
    except ToolError as error:
        fail(str(error))
    except Stopped as stopped:
        code = stopped.code
    except BrokenPipeError:
        # Nobody reads any more; the rest of the output must not fail at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    sys.exit(code)


# The code with which this program ends, once a signal has come.
_ending: list[int] = []


def refuse_if_ending() -> None:
    """Called before something long begins: the threads of a program do not see its signal."""
    if _ending:
        raise Stopped(_ending[0])


def refuse_if_stopped(code: int) -> None:
    """Called with the code of a child: what ended because of a signal has failed at nothing."""
    refuse_if_ending()
    if code in EXIT_STOPPED or -code in SIGNALS:
        raise Stopped(code if code > 0 else 128 - code)


def _end(number: int, _frame: object) -> NoReturn:
    # A second Ctrl-C ends this program at once. A plain kill is what the children of one that is ended
    # by another signal get as well. It is not ignored, which a child that begins now would inherit.
    for other in SIGNALS:
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else lambda *_: None)
    _ending.append(128 + number)
    ended: set[int] = set()
    # Again, because a thread may have been about to begin one.
    while children := _children() - ended:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        # Each ends its own. subprocess.run(), in which this may be, would kill it before it has.
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        ended |= children
    sys.exit(128 + number)


def _children() -> set[int]:
    """Those of all threads."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(map(int, path.read_text().split()))
    return found
