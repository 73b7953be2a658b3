"""What the tests of csrc/cache/cache.h's contract share. Pages of 4 tokens keep the numbers readable."""

import numpy as np
import pytest

from tokenspeed.engine.schedule.cache import Admission, CacheConfig, PrefixCache

PAGE = 4


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def text(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32)


def make(**changes) -> PrefixCache:
    return PrefixCache(CacheConfig(**({"pages": 64, "slots": 16, "page_tokens": PAGE, "ghost_nodes": 64} | changes)))


def run(cache: PrefixCache, request: int, prompt: np.ndarray, boundaries=(), output=(), donate=True) -> Admission:
    """One whole request, whose last output token was not fed back (a length stop)."""
    admission = cache.admit(request, "", prompt, boundaries)
    assert isinstance(admission, Admission)
    cache.commit(request, prompt, len(prompt))
    whole = join(prompt, np.asarray(output, np.int32))
    consumed = max(len(prompt), len(whole) - 1)
    cache.extend(request, consumed)
    cache.finish(request, whole, consumed, donate=donate)
    assert cache.check() == ""
    return admission


def settle(cache: PrefixCache) -> list:
    """Starts what is to be moved, and says that it is done."""
    moves = cache.take_moves()
    for move in moves:
        cache.moved(move.number)
    return list(moves)


def away(**changes) -> PrefixCache:
    """The state after text(0, 10) is in host memory alone; the pages are in both."""
    cache = make(**{"slots": 2, "host_pages": 32, "host_slots": 4} | changes)
    run(cache, 1, text(0, 10))
    settle(cache)
    run(cache, 2, text(300, 10))
    settle(cache)
    run(cache, 3, text(600, 10))
    return cache


@pytest.fixture(autouse=True)
def invariants_hold_afterwards():
    made = []
    original = PrefixCache.__init__

    def remember(self, config):
        original(self, config)
        made.append(self)

    PrefixCache.__init__ = remember
    yield
    PrefixCache.__init__ = original
    assert [cache.check() for cache in made] == [""] * len(made)
