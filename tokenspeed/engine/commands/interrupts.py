"""Ctrl-C between Steps, never within one: what a Step changes in cache, scheduler and device belongs together."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from ..core import Engine


@contextlib.contextmanager
def interruptible(engine: Engine) -> Iterator[None]:
    """Within it, a Ctrl-C during a Step raises KeyboardInterrupt when the Step is done; a second one at once.

    Replaces `engine.step` and the handler of SIGINT, and puts both back. In a thread other than the main one, where
    signals never arrive, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    step, busy, pending = engine.step, False, False

    def interrupted(number, frame) -> None:
        nonlocal pending
        if not busy or pending:
            raise KeyboardInterrupt
        pending = True

    def whole_step() -> None:
        nonlocal busy, pending
        busy = True
        try:
            step()
        finally:
            busy = False
            pending, was = False, pending
        if was:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    engine.step = whole_step
    try:
        yield
    finally:
        engine.step = step
        signal.signal(signal.SIGINT, before)
