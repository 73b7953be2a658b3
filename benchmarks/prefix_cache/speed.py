"""The calls of one 100,000-token prompt: cold, on a hit, and beside 10,000 siblings that diverge inside one page."""

import statistics
import time

import numpy as np

from tokenspeed.engine.schedule.cache import CacheConfig, PrefixCache

PROMPT = 100_000
PAGES = 60_000
SIBLINGS = 10_000


def clock(function, *arguments, **options) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments, **options)
    return 1e6 * (time.perf_counter() - start), result


def through(cache: PrefixCache, request: int, prompt: np.ndarray) -> dict[str, float]:
    """Microseconds of probe, admit and commit of one prompt."""
    probe, _ = clock(cache.probe, "", prompt)
    admit, admission = clock(cache.admit, request, "", prompt, (6_000, len(prompt) - 4))
    commit, _ = clock(cache.commit, request, prompt, len(prompt))
    cache.finish(request, prompt, len(prompt))
    return {
        "probe": probe,
        "admit": admit,
        "commit": commit,
        "all": probe + admit + commit,
        "cached": admission.match.state_tokens,
    }


def measure(rounds: int = 20) -> list[dict]:
    random = np.random.default_rng(0)
    rows = []
    for siblings in (0, SIBLINGS):
        cold, hits = [], []
        cache = PrefixCache(CacheConfig(pages=PAGES, slots=512, ghost_nodes=PAGES))
        request = 0
        base = random.integers(0, 248_000, 64, dtype=np.int32)
        for _ in range(siblings):  # all in the first page, none like another
            prompt = np.concatenate([base, base[:8]])
            prompt[int(random.integers(8, 64)) :] = random.integers(0, 248_000, 1, dtype=np.int32)
            cache.admit(request, "", prompt, (len(prompt) - 4,))
            cache.finish(request, prompt, len(prompt))
            request += 1
        for _ in range(rounds):
            prompt = random.integers(0, 248_000, PROMPT, dtype=np.int32)
            prompt[:32] = base[:32]
            cold.append(through(cache, request, prompt))
            hits.append(through(cache, request + 1, prompt))
            request += 2
        for name, samples in (("cold", cold), ("hit", hits)):
            row = {key: round(statistics.median(sample[key] for sample in samples), 1) for key in samples[0]}
            rows.append({"prompt": name, "siblings": siblings, **row})
    rows.append({"prompt": "decode", "siblings": 0, **decode()})
    stats = cache.stats()
    resident = PAGES - stats["pages_free"]
    rows.append({"bookkeeping_bytes_per_page": round(stats["bookkeeping_bytes"] / resident, 1), "pages": resident})
    return rows


def decode(sequences: int = 64, steps: int = 256) -> dict[str, float]:
    """Microseconds per sequence and step of extend and commit while `sequences` decode."""
    cache = PrefixCache(CacheConfig(pages=4096, slots=128))
    tokens = np.random.default_rng(1).integers(0, 248_000, (sequences, 1024 + steps), dtype=np.int32)
    for i in range(sequences):
        cache.admit(i, "", tokens[i, :1024])
        cache.commit(i, tokens[i], 1024)
    spent = {"extend": 0.0, "commit": 0.0}
    for step in range(1025, 1025 + steps):
        start = time.perf_counter()
        for i in range(sequences):
            cache.extend(i, step)
        middle = time.perf_counter()
        for i in range(sequences):
            cache.commit(i, tokens[i], step)
        spent["extend"] += middle - start
        spent["commit"] += time.perf_counter() - middle
    return {name: round(1e6 * seconds / (sequences * steps), 3) for name, seconds in spent.items()}


def show(rows: list[dict]) -> None:
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"microseconds, median; {PROMPT:,} tokens; goals: cold 1000 in all, hit 300 in all, extend 1")
