"""What was computed lately, bounded by its size."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SizedCache(Generic[Value]):
    """Values by key, the least recently used forgotten first. Any thread may call."""

    def __init__(self, max_size: int):
        """max_size: the sizes of what is kept add up to this much at most."""
        self._max_size, self._size = max_size, 0
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """size: in the unit of `max_size`; a value larger than all of it is not kept."""
        with self._lock:
            self._size -= self._kept.pop(key, (None, 0))[1]
            if size <= self._max_size:
                self._kept[key] = value, size
                self._size += size
            while self._size > self._max_size:
                self._size -= self._kept.popitem(last=False)[1][1]

    def drop(self, key: Hashable) -> None:
        """Forget a value; harmless where there is none."""
        with self._lock:
            self._size -= self._kept.pop(key, (None, 0))[1]
