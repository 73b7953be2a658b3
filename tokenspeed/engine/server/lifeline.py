"""What the kernel sees to: a process that ends with the one that started it, a thread that gives way to others."""

import contextlib
import ctypes
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1
_NICE = 5


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it is gone. Ends at once where it is gone already.

    parent: the process that started this one. Does nothing beyond that check where the system is not Linux.
    """
    with contextlib.suppress(OSError, AttributeError):  # no prctl: another system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def give_way() -> None:
    """Lets the engine and the event loop go before this thread, and before those that it starts."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux knows it of threads
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
