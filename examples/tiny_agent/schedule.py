"""What depends on how much of the training time has passed: learning rate, sequence lengths, and so the batches."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from examples.tiny_agent.data import TRAINING_SEEDS
from examples.tiny_agent.dataset import Batch, batch

WARM_UP_STEPS = 60
DECAY_FROM = 0.45  # share of the time after which the learning rate falls, linearly, to FINAL_RATE of its peak
FINAL_RATE = 0.02

# Sequence lengths and their odds, from a share of the time on. Below 512 tokens the tool list takes most of the room,
# so that little is learnt per token; long sequences cost most and come last.
LENGTHS = (
    (0.00, {256: 1, 512: 3}),
    (0.25, {256: 1, 512: 3, 1024: 2}),
    (0.55, {256: 2, 512: 3, 1024: 3, 2048: 3}),
)
SHORTEST, *_, LONGEST = sorted({length for _, odds in LENGTHS for length in odds})


@dataclass(frozen=True, slots=True)
class Clock:
    """Training time in seconds, stops left out; `before` had passed when this process started at `started`.

    `started` is time.monotonic(), which all processes of a machine share.
    """

    total: float
    before: float
    started: float

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def share(self) -> float:
        """0 at the start, 1 and more when the time is over."""
        return self.seconds() / self.total


def learning_rate(share: float, step: int, peak: float) -> float:
    """Linear warm-up by steps, a plateau, then linear decay by the share of time that has passed."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = min(1.0, (1 - share) / (1 - DECAY_FROM))
    return peak * warm * max(FINAL_RATE, decay)


def sequence_length(share: float, draw: random.Random) -> int:
    """The length of the next batch's sequences, in tokens."""
    odds = next(odds for start, odds in reversed(LENGTHS) if share >= start)
    (length,) = draw.choices(list(odds), list(odds.values()))
    return length


@dataclass(frozen=True, slots=True)
class BatchStream(IterableDataset):
    """Endless training batches of tokens_per_step tokens; data loader workers take the steps in turn."""

    tokenizer: Tokenizer
    clock: Clock
    first_step: int
    first_seed: int
    tokens_per_step: int
    padding: int

    def seeds_per_step(self) -> int:
        """Seeds set aside for a step: what the shortest sequences need."""
        return self.tokens_per_step // SHORTEST

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            length = sequence_length(self.clock.share(), random.Random(self.first_step + offset))
            seeds = TRAINING_SEEDS[self.first_seed + offset * self.seeds_per_step() :][: self.tokens_per_step // length]
            yield batch(seeds, self.tokenizer, length, self.padding)
            offset += stride
