"""Responses that a later one may go on with: the latest, bounded by their size."""

from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import RequestError
from ..text.sized_cache import SizedCache

_MAX_BYTES = 64 << 20


class UnknownResponse(RequestError):
    """A response that is not, or no longer, remembered."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """messages: the conversation with the answer, without instructions; frame: the response object."""

    messages: list[dict[str, Any]]
    frame: dict[str, Any]


class ResponseStore:
    """Responses by name space and id. Any thread may call."""

    def __init__(self, max_bytes: int = _MAX_BYTES):
        """max_bytes: of the responses' JSON and their items'; what was used least lately is forgotten first."""
        self._kept: SizedCache[StoredResponse] = SizedCache(max_bytes)
        self._items: SizedCache[dict[str, Any]] = SizedCache(max_bytes)

    def get(self, name_space: str, id: str) -> StoredResponse:
        """Raises UnknownResponse."""
        found = self._kept.get((name_space, id))
        if found is None:
            raise UnknownResponse(f"Previous response with id {id!r:.80} not found: send the whole conversation.")
        return found

    def item(self, name_space: str, id: str) -> dict[str, Any]:
        """An output item of a response. Raises UnknownResponse."""
        found = self._items.get((name_space, id))
        if found is None:
            raise UnknownResponse(f"Item with id {id!r:.80} not found: send the item itself.")
        return found

    def put(self, name_space: str, id: str, response: StoredResponse) -> None:
        size = _size(response.messages) + _size(response.frame)
        self._kept.put((name_space, id), response, size)
        for item in response.frame["output"]:
            self._items.put((name_space, item["id"]), item, _size(item))

    def forget(self, name_space: str, id: str) -> None:
        """Raises UnknownResponse."""
        for item in self.get(name_space, id).frame["output"]:
            self._items.drop((name_space, item["id"]))
        self._kept.drop((name_space, id))


def _size(value: Any) -> int:
    """Bytes of a value's JSON."""
    return len(msgspec.json.encode(value))
