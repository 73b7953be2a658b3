"""Claims about the sum over peer memory: 2 to 8 ranks in any order, sum after sum without a barrier, a lost rank."""

import ctypes

import pytest
import torch

from tests.kernels.launches import emulator
from tests.ops import reference
from tests.ops.backends import same_bits
from tokenspeed.engine.errors import EngineError
from tokenspeed.engine.parallel.peers import Limits, PeerSums, declare

CPU = torch.device("cpu")
EPS = 1e-6


class Ranks:
    """Ranks whose calls queue up, each on a stream of its own, until `run`: the order between them is the seed's."""

    def __init__(self, ranks: int, rows: int, width: int, seed: int = 0):
        self.device = declare(emulator())
        limits = Limits(0, ranks, rows, width)
        size = self.device.tokenspeed_all_reduce_memory(ranks, rows, limits.whole_width)
        self.memory = [torch.zeros(size // 8, dtype=torch.int64) for _ in range(ranks)]
        pointers = [memory.data_ptr() for memory in self.memory]
        self.ranks = [OnStream(self.device, Limits(rank, ranks, rows, width), pointers, CPU) for rank in range(ranks)]
        self.device.emulator_seed(seed)
        self.device.emulator_defer(1)

    def run(self) -> None:
        assert self.device.emulator_synchronize() == 0, self.device.emulator_report()

    def close(self) -> None:
        self.device.emulator_defer(0)
        self.device.emulator_seed(0)


class OnStream(PeerSums):
    """On the stream of its rank: what stands for another card."""

    def _place(self) -> tuple[int, int]:
        return 0, 1 + self._limits.rank


@pytest.fixture
def made():
    everybody = []

    def make(*arguments) -> Ranks:
        everybody.append(Ranks(*arguments))
        return everybody[-1]

    yield make
    for ranks in everybody:
        ranks.close()


def drawn(ranks: int, rows: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator).bfloat16() for _ in range(ranks)]


def summed(terms: list[torch.Tensor]) -> torch.Tensor:
    """In order of rank, in fp32, rounded once."""
    total = torch.zeros(terms[0].shape)
    for term in terms:
        total += term.float()
    return total.bfloat16()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 3, 264), (4, 2, 264), (8, 1, 64)])
def test_sum_after_sum_without_a_barrier(made, ranks, rows, width, seed):
    everybody = made(ranks, rows, width, seed)
    calls = [drawn(ranks, 1 + call % rows, width - 8 * (call % 3), call) for call in range(6)]
    expected = [summed(terms) for terms in calls]
    for rank, sums in enumerate(everybody.ranks):  # each rank's calls in order; all ranks beside one another
        for terms in calls:
            assert sums.serves(terms[rank])
            sums.all_reduce(terms[rank])
    everybody.run()
    for terms, total in zip(calls, expected, strict=True):
        assert all(same_bits(term, total) for term in terms)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("ranks", "rows", "width"), [(2, 5, 264), (4, 2, 1032), (8, 1, 256)])
def test_the_norm_behind_the_sum(made, ranks, rows, width, seed):
    everybody = made(ranks, rows, width, seed)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(width, generator=generator).bfloat16()
    residual = torch.randn(rows, width, generator=generator).bfloat16()
    calls = [drawn(ranks, rows, width, call) for call in range(3)]
    results = [
        [sums.add_rms_norm(terms[rank], residual, weight, EPS) for terms in calls]
        for rank, sums in enumerate(everybody.ranks)
    ]
    everybody.run()
    for call, terms in enumerate(calls):
        total = (summed(terms).float() + residual.float()).bfloat16()
        norm = reference.rms_norm(total, weight, EPS)
        for rank in range(ranks):
            out, sum_and_residual = results[rank][call]
            assert same_bits(sum_and_residual, total)
            assert same_bits(out, results[0][call][0])
            assert (out.double() - norm).abs().max() < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_more_rows_than_blocks(made, seed):
    rows, width = 20, 2048
    everybody = made(2, rows, width, seed)
    everybody.device.emulator_multiprocessors(1)  # 8 blocks at once
    try:
        scale = 8.0 ** (torch.arange(rows) // 8)[:, None]  # rows of one block are far from alike
        terms = [(term * scale).bfloat16() for term in drawn(2, rows, width, 1)]
        zeros = torch.zeros(rows, width).bfloat16()
        expected = summed(terms)
        results = [sums.add_rms_norm(terms[rank], zeros, zeros[0], EPS) for rank, sums in enumerate(everybody.ranks)]
        everybody.run()
    finally:
        everybody.device.emulator_multiprocessors(4)
    norm = reference.rms_norm(expected, zeros[0], EPS)
    for out, total in results:
        assert same_bits(total, expected)
        assert (out.double() - norm).abs().max() < 0.02


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_told_and_later_sums_wait_no_more(made, lost, seed):
    everybody = made(4, 2, 64, seed)
    for sums in everybody.ranks:
        sums.check()
    terms = drawn(4, 2, 64, 0)
    for rank, sums in enumerate(everybody.ranks):
        for _ in range(1 if rank == lost else 3):  # it brings its part once and is not seen again
            sums.all_reduce(terms[rank])
    everybody.run()
    for rank, sums in enumerate(everybody.ranks):
        if rank != lost:
            with pytest.raises(EngineError, match="lost"):
                sums.check()
            assert sums._control[0] == 1  # where later sums look before they wait
    everybody.ranks[lost].check()


def test_whoever_is_told_to_stop_waits_no_more(made):
    everybody = made(2, 1, 64)
    everybody.ranks[0].stop()
    [term] = drawn(1, 1, 64, 0)
    everybody.ranks[0].all_reduce(term)
    everybody.run()
    with pytest.raises(EngineError, match="lost"):
        everybody.ranks[0].check()


def test_what_is_not_served_is_told(made):
    sums = made(2, 4, 264).ranks[0]
    assert sums.serves(torch.zeros(4, 264, dtype=torch.bfloat16))
    for x in (
        torch.zeros(5, 264, dtype=torch.bfloat16),
        torch.zeros(4, 272, dtype=torch.bfloat16),
        torch.zeros(4, 260, dtype=torch.bfloat16),
        torch.zeros(4, 264),
        torch.zeros(0, 264, dtype=torch.bfloat16),
        torch.zeros(4, 528, dtype=torch.bfloat16)[:, ::2],
        torch.zeros(264, dtype=torch.bfloat16),
    ):
        assert not sums.serves(x)
    with pytest.raises(RuntimeError, match="does not serve"):
        sums.all_reduce(torch.zeros(9, 264, dtype=torch.bfloat16))


def test_arguments_of_another_layout_are_refused():
    device = declare(emulator())
    assert b"layout" in device.tokenspeed_all_reduce(ctypes.create_string_buffer(8), 8, 0, None)
