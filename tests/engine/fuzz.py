"""The prefix cache under an engine, against the same requests without one: forks, edited and repeated histories,
aborts, drafts, and so little memory that somebody always gives way. What differs or is not given back is an error.

    python -m tests.engine.fuzz [--seconds 3600] [--seed 1]

Most lives are on the hash device (`hash_device.py`), where one wrong token in a page or state changes every id behind
it; one in `REAL_EVERY` is on the shipped model, whose logits are compared at every position with one uncached pass.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import CPU
from lab import TOLERANCE, Lab
from lives import live
from schedules import Setting, run_schedule

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights

REAL_EVERY = 50


def shipped_with_head() -> Qwen3_5:
    model = Qwen3_5.empty(ModelConfig.from_directory(SHIPPED), torch.float32, CPU, mtp=True)
    load_weights(model, SHIPPED, progress=False)
    return model


def hashed_life(seed: int) -> Counter:
    """What happened in it. Raises AssertionError where a request got something else than it gets alone, or memory is
    missing."""
    bench = run_schedule(seed, settings=Setting.tight)
    return bench.events + Counter({"requests": len(bench.requests)})


def real_life(model: Qwen3_5, seed: int) -> Counter:
    """The same on a model that computes."""
    random = Random(seed)
    settings = {
        "pages": random.choice([7, 8, 9, 12]),
        "slots": random.choice([1, 2, 3, 4]),
        "max_seqs": random.choice([3, 4, 6]),
        "max_num_batched_tokens": random.choice([33, 64, 256]),
        "drafts": random.choice([0, 1, 3, 7]),
        "grid_tokens": random.choice([0, 50]),
    }
    lab = Lab(model, **settings)
    live(lab, seed, turns=10, agents=6)
    assert lab.difference() <= TOLERANCE, settings
    return Counter({"requests": len(lab.talks), "preemption": lab.scheduler.preemptions, "positions": lab.compared})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default 3600)")
    parser.add_argument("--seed", type=int, default=1, help="of the first life; the next are counted on (default 1)")
    options = parser.parse_args()
    model, events, start, failures = shipped_with_head(), Counter(), time.monotonic(), 0
    with tqdm(total=int(options.seconds), unit="s", file=sys.stderr) as bar:
        for seed in itertools.count(options.seed):
            real = seed % REAL_EVERY == 0
            try:
                events += real_life(model, seed) if real else hashed_life(seed)
            except Exception as error:  # whatever it is: this seed did it
                failures += 1
                tqdm.write(f"{'real' if real else 'hashed'} life {seed}: {type(error).__name__}: {error}")
            bar.update(min(int(time.monotonic() - start), bar.total) - bar.n)
            if time.monotonic() - start > options.seconds:
                break
    told = ("requests", "preemption", "fork", "abort", "drafts verified", "snapshot evicted", "positions")
    print(
        f"{seed + 1 - options.seed} lives, {', '.join(f'{events[name]} {name}' for name in told)}: {failures} failures"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
