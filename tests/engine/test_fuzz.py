"""The short form of the engine's fuzzer: fixed seeds, ten seconds."""

from collections import Counter

import fuzz

HASHED, REAL = range(1000, 1040), range(1000, 1001)


def test_with_hardly_any_memory_text_is_what_it_is_without_a_cache():
    events = Counter()
    for seed in HASHED:
        try:
            events += fuzz.hashed_life(seed)
        except Exception as error:
            raise AssertionError(f"hashed life {seed}: {error}") from error
    assert events["preemption"] > 2 * len(HASHED), "there is room for everybody"
    for name in ("fork", "abort", "draft accepted", "draft rejected", "snapshot evicted", "resumed inside a page"):
        assert events[name] > 0, name


def test_with_hardly_any_memory_logits_are_what_they_are_without_a_cache():
    model, events = fuzz.shipped_with_head(), Counter()
    for seed in REAL:
        events += fuzz.real_life(model, seed)
    assert events["requests"] == 10 * len(REAL) and events["preemption"] > 0
