"""What the prefix cache holds, told to routers: vLLM's KV events over a ZeroMQ PUB socket.

Each message has three parts: an empty topic, a sequence number (8 bytes, big-endian) and a MessagePack batch. A router
that misses a number, or comes late, knows less than there is until the blocks in question come anew.
"""

import hashlib
import time
from array import array

import msgspec
import zmq

from ..errors import ConfigError
from ..schedule.cache import PrefixCache

LOG_ENTRIES = 1 << 14  # between two steps; beyond it the cache is told anew


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks whose keys and values can be reused, each the next one's parent. parent_block_hash: of the first one's."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Blocks that were let go."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No block is there any more."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """The events of one step. ts: seconds since 1970."""

    ts: float
    events: list[KvEvent]
    data_parallel_rank: int | None = None


class BlockNames:
    """From the cache's own log to events: its block numbers come again, a hash of all tokens up to a block does not."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._hashes: dict[int, int] = {}  # of the blocks that are there

    def events(self, log: tuple[tuple, ...]) -> list[KvEvent]:
        """The events of `PrefixCache.drain_events`, neighbours put together."""
        events: list[KvEvent] = []
        for kind, *what in log:
            if kind == "cleared":
                self._hashes.clear()
                events.append(AllBlocksCleared())
            elif kind == "removed":
                removed = self._hashes.pop(what[0])
                if events and isinstance(events[-1], BlockRemoved):
                    events[-1].block_hashes.append(removed)
                else:
                    events.append(BlockRemoved([removed]))
            else:
                self._stored(events, *what)
        return events

    def _stored(
        self, events: list[KvEvent], block: int, parent: int | None, name_space: str, tokens: list[int]
    ) -> None:
        before = None if parent is None else self._hashes[parent]
        name = self._hashes[block] = block_hash(before, tokens, name_space)
        last = events[-1] if events else None
        if isinstance(last, BlockStored) and before is not None and last.block_hashes[-1] == before:
            last.block_hashes.append(name)
            last.token_ids.extend(tokens)
        else:
            events.append(BlockStored([name], before, list(tokens), self._block_size))


def block_hash(parent: int | None, tokens: list[int], name_space: str = "") -> int:
    """63 bits of BLAKE2b over the parent's hash (or the name space, for a first block) and the tokens."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(name_space.encode() if parent is None else parent.to_bytes(8, "little"))
    digest.update(array("i", tokens).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


class KvEventPublisher:
    """Publishes one cache's events. `publish` is called after each step."""

    def __init__(self, cache: PrefixCache, endpoint: str):
        """endpoint: tcp://HOST:PORT or ipc://PATH. Raises ConfigError where it cannot be bound."""
        self._cache, self._names = cache, BlockNames(cache.config.page_tokens)
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.linger = 0
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"--kv-events {endpoint}: {error.strerror}; it must be like tcp://HOST:PORT.") from None
        self._sequence = 0
        self._encode = msgspec.msgpack.Encoder().encode
        cache.log_events(LOG_ENTRIES)

    def publish(self) -> None:
        """Tell what has happened since the last call; nothing where nothing has."""
        if events := self._names.events(self._cache.drain_events()):
            batch = self._encode(KvEventBatch(time.time(), events))
            self._socket.send_multipart((b"", self._sequence.to_bytes(8, "big"), batch))
            self._sequence += 1

    def close(self) -> None:
        self._cache.log_events(0)
        self._socket.close()
