"""A process that ends with the one that started it, whatever it is doing: the kernel sees to it."""

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it is gone. Ends at once where it is gone already.

    parent: the process that started this one. Does nothing beyond that check where the system is not Linux.
    """
    with contextlib.suppress(OSError, AttributeError):  # no prctl: another system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
