"""What clients call their requests. A name means something inside its key only, and the engine never sees it: there a
request has a number that no other ever has, so nothing on its way to one can reach another."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import RequestError


class Names:
    """The requests that run, by key and name. One event loop uses it."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._running: dict[tuple[str | None, str], dict[int, str]] = {}

    @contextmanager
    def used(self, key: str | None, name: str, part: int = 0) -> Iterator[str]:
        """The engine's id for a request of that name. part: which one of several under the name.

        Raises RequestError where one runs under it already.
        """
        parts = self._running.setdefault((key, name), {})
        if part in parts:
            raise RequestError(f"request id {name!r} is in use; ids must be unique among running requests.")
        id = parts[part] = str(next(self._numbers))
        try:
            yield id
        finally:
            del parts[part]
            if not parts:
                self._running.pop((key, name), None)

    def ids(self, key: str | None, name: str) -> list[str]:
        """The engine's ids of what runs under the key's name."""
        return list(self._running.get((key, name), {}).values())
