"""A key's share of some work: so much of it side by side, and the rest waits behind its own key's alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Shares:
    """At most so many pieces of work a key at a time. One event loop uses it."""

    def __init__(self, limit: int):
        self._limit = limit
        self._running: dict[str | None, tuple[asyncio.Semaphore, int]] = {}  # with how many hold or want it

    @asynccontextmanager
    async def one(self, key: str | None) -> AsyncIterator[None]:
        """Holds one piece of the key's share; waits for it, first come first served."""
        semaphore, users = self._running.get(key, (None, 0))
        semaphore = semaphore or asyncio.Semaphore(self._limit)
        self._running[key] = semaphore, users + 1
        try:
            async with semaphore:
                yield
        finally:
            _, users = self._running.pop(key)
            if users > 1:
                self._running[key] = semaphore, users - 1
