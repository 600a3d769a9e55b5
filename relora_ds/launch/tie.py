"""Runs a command that dies with the process that asked for it, however that one dies: ``python tie.py PID COMMAND…``.

A program of its own: between fork and exec no Python may run in a child whose parent has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def tie(parent: int) -> bool:
    """Has the kernel kill this process, and what it becomes, when the thread that started it ends; only Linux can.

    SIGKILL, because a rank that hangs in a collective hears nothing else, and whoever starts the run again must not wait for it.

    Returns:
        Whether process ``parent`` was still there afterwards.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)
    return os.getppid() == parent


if __name__ == "__main__":
    if not tie(int(sys.argv[1])):
        sys.exit(1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and so would the command
    os.execvp(sys.argv[2], sys.argv[2:])
