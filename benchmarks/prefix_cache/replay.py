"""Runs requests through the real cache without a model, and times each call."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tokenspeed.engine.schedule.cache import CacheConfig, NoRoom, PrefixCache


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: its prompt ([tokens] int32), the stable boundaries in it, and what the model answered."""

    prompt: np.ndarray
    boundaries: tuple[int, ...]
    output: np.ndarray
    ideal: int = 0  # tokens that an unlimited cache with a state everywhere would not compute
    donate: bool = True  # the end of the generation may come back


class Timer:
    """Seconds and calls per operation."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.calls = defaultdict(int)

    def __call__(self, name, function, *arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        self.seconds[name] += time.perf_counter() - start
        self.calls[name] += 1
        return result

    def microseconds(self) -> dict[str, float]:
        return {name: round(1e6 * self.seconds[name] / self.calls[name], 2) for name in self.seconds}


def replay(config: CacheConfig, turns: Iterable[Turn], total: int, label: str) -> dict:
    """One sequence at a time; moves cost nothing. Returns the cache's stats, rates, and microseconds per call."""
    cache, timer = PrefixCache(config), Timer()
    ideal = refused = 0
    for request, turn in enumerate(tqdm(turns, total=total, desc=label, unit="request", leave=False)):
        prompt, count = turn.prompt, len(turn.prompt)
        admission = timer("admit", cache.admit, request, "", prompt, turn.boundaries)
        if isinstance(admission, NoRoom):
            refused += 1
            continue
        for move in timer("take_moves", cache.take_moves) if config.host_slots else ():
            cache.moved(move.number)
        ideal += turn.ideal
        timer("commit", cache.commit, request, prompt, count)
        tokens = prompt
        if len(turn.output):
            tokens = np.concatenate([prompt, turn.output])
            if isinstance(timer("extend", cache.extend, request, len(tokens)), NoRoom):
                tokens = prompt
        timer("finish", cache.finish, request, tokens, len(tokens), donate=turn.donate)
    if broken := cache.check():
        raise AssertionError(broken)
    stats = cache.stats()
    rates = {
        "hit_rate": stats["cached_tokens"] / stats["prompt_tokens"],
        "kv_ideal": stats["known_tokens"] / stats["prompt_tokens"],
        "recomputed_though_matched": stats["recomputed_matched_tokens"],
    }
    if ideal:
        rates["share_of_ideal"] = stats["cached_tokens"] / ideal
    return {"label": label, **rates, "refused": refused, "microseconds": timer.microseconds(), "stats": stats}
