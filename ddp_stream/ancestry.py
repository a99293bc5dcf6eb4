"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

# Noted before torch is imported, which takes seconds in which a launcher may die.
_PARENT = os.getppid()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, or do so if it is dead by now (Linux only)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    gone = os.getppid() != _PARENT if parent is None else not parent.is_alive()
    if gone:
        os.kill(os.getpid(), signal.SIGKILL)
