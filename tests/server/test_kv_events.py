"""What routers are told of the cache, as a subscriber hears it."""

import socket
import time

import httpx
import msgspec
import numpy as np
import pytest
import zmq
from launch import Server

from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.schedule.cache import CacheConfig, PrefixCache
from tokenspeed.engine.server.kv_events import (
    AllBlocksCleared,
    BlockNames,
    BlockRemoved,
    BlockStored,
    KvEventBatch,
    KvEventPublisher,
    block_hash,
)

PAGE = 4


def cache_of(pages: int, log: int = 100) -> PrefixCache:
    cache = PrefixCache(CacheConfig(pages=pages, slots=4, page_tokens=PAGE, ghost_nodes=100))
    cache.log_events(log)
    return cache


def run(cache: PrefixCache, id: int, tokens: list[int], name_space: str = "") -> None:
    buffer = np.array(tokens, np.int32)
    cache.admit(id, name_space, buffer)
    cache.finish(id, buffer, len(tokens))


def test_a_prompt_is_one_chain_and_its_branch_names_its_parent():
    cache, names = cache_of(16), BlockNames(PAGE)
    first, left, right = [1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 9]
    run(cache, 1, [*first, *left, 10])
    run(cache, 2, [*first, *right, 10])
    cleared, stored, branch = names.events(cache.drain_events())
    assert cleared == AllBlocksCleared(), "whoever listens starts from nothing"
    root = block_hash(None, first)
    assert stored == BlockStored([root, block_hash(root, left)], None, [*first, *left], PAGE)
    assert branch == BlockStored([block_hash(root, right)], root, right, PAGE)
    assert cache.drain_events() == ()


def test_what_is_evicted_or_cleared_is_removed_deepest_first():
    cache, names = cache_of(4), BlockNames(PAGE)
    run(cache, 1, list(range(9)))
    a = block_hash(None, [0, 1, 2, 3])
    b = block_hash(a, [4, 5, 6, 7])
    names.events(cache.drain_events())
    run(cache, 2, list(range(100, 113)))  # needs every page
    events = names.events(cache.drain_events())
    assert events[0] == BlockRemoved([b, a]) and isinstance(events[1], BlockStored)
    cache.clear("")
    (removed,) = names.events(cache.drain_events())
    assert removed == BlockRemoved(events[1].block_hashes[::-1])


def test_a_log_that_overflows_starts_over():
    cache, names = cache_of(64, log=2), BlockNames(PAGE)
    names.events(cache.drain_events())
    run(cache, 1, list(range(33)))
    events = names.events(cache.drain_events())
    assert events[0] == AllBlocksCleared() and events[1].token_ids == list(range(32)) and len(events) == 2


def test_name_spaces_do_not_share_hashes():
    cache, names = cache_of(16), BlockNames(PAGE)
    run(cache, 1, [1, 2, 3, 4, 5])
    run(cache, 2, [1, 2, 3, 4, 5], "salted")
    _, plain, salted = names.events(cache.drain_events())
    assert plain.token_ids == salted.token_ids and plain.block_hashes != salted.block_hashes


def test_an_endpoint_that_cannot_be_bound_is_named():
    with pytest.raises(ConfigError, match="nonsense"):
        KvEventPublisher(cache_of(4), "nonsense")


def test_a_subscriber_hears_a_prompt_stored_and_cleared_in_plain_messagepack():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    server = Server("--kv-events", endpoint)
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.linger, subscriber.rcvtimeo = 0, 20_000
    subscriber.subscribe(b"")
    subscriber.connect(endpoint)
    try:
        time.sleep(0.5)  # a PUB socket drops what comes before its subscriber is there
        ids = [5 + i % 50 for i in range(130)]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        heard = []
        for number in range(2):  # the first step, and the one in which the prompt is known to be computed
            topic, sequence, batch = subscriber.recv_multipart()
            assert (topic, int.from_bytes(sequence, "big")) == (b"", number)
            ts, events, rank = msgspec.msgpack.decode(batch)
            assert abs(time.time() - ts) < 60 and rank is None
            heard += events
        cleared, stored = heard
        assert cleared == ["AllBlocksCleared"]
        first = block_hash(None, ids[:64])
        assert stored == ["BlockStored", [first, block_hash(first, ids[64:128])], None, ids[:128], 64, None, None]
        httpx.post(f"{server.url}/reset_prefix_cache", timeout=60)
        _, sequence, batch = subscriber.recv_multipart()
        assert int.from_bytes(sequence, "big") == 2
        decoded = msgspec.msgpack.decode(batch, type=KvEventBatch)
        assert decoded.events == [BlockRemoved(stored[1][::-1])]
    finally:
        subscriber.close()
        server.stop()
