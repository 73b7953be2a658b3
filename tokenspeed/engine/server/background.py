"""Work on long texts beside the event loop: in threads, a share of them a key, given up with its client."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..text.interrupt import interrupt
from .lifeline import give_way
from .shares import Shares

T = TypeVar("T")
SHARE = 2  # of one key at a time
_THREADS = 16


class Background:
    """One event loop uses it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="text", initializer=give_way)
        self._shares = Shares(SHARE)

    async def run(self, key: str | None, work: Callable[[], T]) -> T:
        """What `work` returns. Cancelled, it has the work end at its next step and waits for that: what a key has given
        up still counts to its share until it is over."""
        async with self._shares.one(key):
            context, stop = contextvars.copy_context(), threading.Event()
            context.run(interrupt.set, stop)
            done = asyncio.get_running_loop().run_in_executor(self._threads, context.run, work)
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([done])
                if not done.cancelled():
                    done.exception()  # nobody waits for what it says
                raise
