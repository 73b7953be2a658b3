"""Sampling from a vocabulary split over ranks gives, id for id, what `ops.sample` gives for the whole row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed import ops
from tokenspeed.engine.parallel import sampling
from tokenspeed.engine.parallel.comm import ONE_RANK
from tokenspeed.engine.parallel.mesh import Mesh

from .threads import run_ranks

ROWS = 6


def on_ranks(tp: int, logits, *values):
    def work(communicator):
        local = logits.chunk(tp, dim=1)[communicator.mesh.rank]
        return sampling.sample(local, *values, communicator).tolist(), sampling.greedy(local, communicator).tolist()

    results = run_ranks(Mesh(tp), work)
    assert all(result == results[0] for result in results), "every rank must have the same ids"
    return results[0]


def check(tp, logits, *values) -> None:
    sampled, largest = on_ranks(tp, logits, *values)
    assert sampled == ops.sample(logits, *values).tolist()
    assert largest == ops.sample(logits, torch.zeros_like(values[0]), *values[1:]).tolist()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_ids_are_those_of_one_process(data):
    tp = data.draw(st.sampled_from([1, 2, 3, 4]), "tp")
    width = data.draw(st.integers(1, 40), "vocabulary of a rank")
    vocabulary = tp * width
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    logits = torch.randn(ROWS, vocabulary, generator=generator) * data.draw(st.sampled_from([0.1, 1.0, 9.0]), "scale")
    if data.draw(st.booleans(), "ties"):
        logits = logits.round()  # -0.0 and 0.0 among them
    if data.draw(st.booleans(), "bf16"):
        logits = logits.bfloat16()
    if data.draw(st.booleans(), "grammar"):
        allowed = data.draw(st.integers(0, vocabulary - 1), "allowed")
        forbidden = torch.rand(ROWS, vocabulary, generator=generator) < 0.7
        forbidden[:, allowed] = False
        logits = logits.masked_fill(forbidden, -torch.inf)

    for row in data.draw(st.lists(st.integers(0, ROWS - 1)), "rows without an id"):
        logits[row, data.draw(st.integers(0, vocabulary - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf]))
        if data.draw(st.booleans(), "all of it"):
            logits[row] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))

    def column(values, dtype):
        return torch.tensor(data.draw(st.lists(values, min_size=ROWS, max_size=ROWS)), dtype=dtype)

    check(
        tp,
        logits,
        column(st.sampled_from([0.0, 0.3, 1.0, 4.0]), torch.float32),
        column(st.integers(0, vocabulary + 2), torch.int32),
        column(st.one_of(st.just(1.0), st.floats(2**-7, 1.0, width=32)), torch.float32),
        column(st.sampled_from([0.0, 0.05, 0.9]), torch.float32),
        column(st.integers(0, 2**63 - 1), torch.int64),
        column(st.integers(0, 2**40), torch.int64),
    )


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_a_published_vocabulary_over_eight_ranks(top_p):
    vocabulary, generator = 248_320, torch.Generator().manual_seed(1)
    logits = torch.randn(2, vocabulary, generator=generator).mul(2).bfloat16()

    def full(value, dtype=torch.float32):
        return torch.full((2,), value, dtype=dtype)

    values = full(0.8), full(50_000, torch.int32), full(top_p), full(0.0), full(7, torch.int64), full(3, torch.int64)
    check(8, logits, *values)


def test_nothing_but_keys_and_histograms_is_sent():
    """No rank sends its logits: the bytes do not grow with the vocabulary."""
    values = [torch.ones(1) * 0.9, torch.tensor([5]).int(), torch.ones(1) * 0.9, torch.zeros(1)]
    values += [torch.tensor([1]), torch.tensor([2])]

    def sent(vocabulary):
        def work(communicator):
            sampling.sample(torch.randn(1, vocabulary), *values, communicator)
            return communicator.payload

        return run_ranks(Mesh(2), work)

    assert sent(64) == sent(4096) == [4 + 2 * 8 * (2048 + 1024 + 1024) + 8] * 2


def test_greedy_sends_eight_bytes_a_row_and_takes_the_lowest_of_equals():
    def work(communicator):
        id = sampling.greedy(torch.full((3, 10), -0.0 if communicator.mesh.rank else 0.0), communicator)
        return id.tolist(), communicator.payload

    assert run_ranks(Mesh(2), work) == [([0, 0, 0], 3 * 8)] * 2
    assert sampling.greedy(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), ONE_RANK).tolist() == [1]
