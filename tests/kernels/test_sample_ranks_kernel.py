"""Claims about draws over ranks: the ids of one rank with the whole row, whatever cuts it; a lost rank."""

import ctypes
import math

import pytest
import torch

from tests.kernels.launches import emulator
from tests.kernels.test_sample import arguments
from tokenspeed import ops
from tokenspeed.engine.errors import EngineError
from tokenspeed.engine.executor.sampling import Parameters, Vocabulary
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.parallel.peers import PeerDraws, declare
from tokenspeed.ops.sampling import NONE_ALLOWED, NOT_FINITE

CPU = torch.device("cpu")


class OnStream(PeerDraws):
    """On the stream of its rank: what stands for another card."""

    def _place(self) -> tuple[int, int]:
        return 0, 1 + self._rank


class Ranks:
    """Ranks whose calls queue up, each on a stream of its own, until `run`: the order between them is the seed's."""

    def __init__(self, ranks: int, clusters: tuple[int, int, int] = (2, 3, 5), seed: int = 0):
        self.device = declare(emulator())
        size = self.device.tokenspeed_sample_ranks_memory(ranks, max(clusters))
        self.memory = [torch.zeros(size // 8, dtype=torch.int64) for _ in range(ranks)]
        pointers = [memory.data_ptr() for memory in self.memory]
        self.ranks = [OnStream(self.device, rank, ranks, clusters, pointers, CPU) for rank in range(ranks)]
        self.device.emulator_seed(seed)
        self.device.emulator_defer(1)

    def draw(self, values: tuple) -> list[torch.Tensor]:
        """Each rank's ids, once it has run. values: as of `ops.sample`, of whole rows."""
        parts = [part.contiguous() for part in values[0].chunk(len(self.ranks), 1)]
        self.held = [*getattr(self, "held", []), values, parts]  # until it has run
        return [draws.sample(part, *values[1:]) for draws, part in zip(self.ranks, parts, strict=True)]

    def run(self) -> None:
        assert self.device.emulator_synchronize() == 0, self.device.emulator_report()

    def close(self) -> None:
        self.device.emulator_defer(0)
        self.device.emulator_seed(0)


@pytest.fixture
def made():
    everybody = []

    def make(*arguments, **options) -> Ranks:
        everybody.append(Ranks(*arguments, **options))
        return everybody[-1]

    yield make
    for ranks in everybody:
        ranks.close()


def check(ranks: Ranks, *calls: tuple) -> None:
    """Every rank has the ids of one rank with the whole rows."""
    drawn = [ranks.draw(values) for values in calls]
    ranks.run()
    for values, everybody in zip(calls, drawn, strict=True):
        expected = ops.sample(*values).tolist()
        assert [ids.tolist() for ids in everybody] == [expected] * len(everybody)


def rows_of(count: int, vocabulary: int, seed: int, spread: float = 3.0, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, vocabulary, generator=generator) * spread).to(dtype)


CUTS = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "min-p": {"min_p": 0.05},
    "top-k": {"top_k": 5},
    "top-k, top-p and min-p": {"temperature": 1.7, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
    "top-p": {"top_p": 0.9, "temperature": 0.4},
}
BEYOND_LISTS = {  # whose histograms take the emulated device a while
    "top-k and top-p": {"top_k": 400, "top_p": 0.95},
    "top-p": {"top_p": 0.97, "temperature": 9.0},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ids_are_those_of_one_rank(made, ranks, cut, seed):
    logits = rows_of(1, ranks * 4096, seed)
    check(made(ranks, seed=seed), arguments(logits, **CUTS[cut], seed=seed, output=3))


@pytest.mark.parametrize("cut", ["none", "top-k", "top-p"])
@pytest.mark.parametrize("width", [4 * 4096, 8 * 4096 + 12])
def test_rows_in_clusters_of_four_and_eight_blocks(made, width, cut):
    check(made(2, seed=3), arguments(rows_of(1, 2 * width, 1), **CUTS[cut], seed=9))


@pytest.mark.parametrize("cut", BEYOND_LISTS)
def test_cuts_that_keep_more_ids_than_are_listed(made, cut):
    check(made(2, seed=1), arguments(rows_of(1, 2 * 2048, 1), **BEYOND_LISTS[cut], seed=4, output=3))


@pytest.mark.thinned(2, "dtype", "seed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_all_kinds_in_one_launch(made, dtype, seed):
    """More rows than clusters, of two blocks each, call after call without a barrier between the ranks."""
    cuts = list(CUTS.values())
    keys = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    options = {key: torch.tensor([cut.get(key, default) for cut in cuts]) for key, default in keys.items()}
    calls = [
        arguments(rows_of(len(cuts), 2 * width, seed + width, dtype=dtype), **options, seed=torch.arange(len(cuts)))
        for width in (1500, 2048, 36)
    ]
    check(made(2, (1, 2, 3), seed), *calls)


def test_eight_ranks(made):
    check(made(8, seed=1), arguments(rows_of(1, 8 * 512, 4), top_k=2, top_p=0.9))


def test_ties_at_a_cut_are_all_kept_however_many(made):
    """Rows of equal logits, of which top-k keeps all, and rows of two values."""
    flat = torch.zeros(2, 4096, dtype=torch.bfloat16)
    flat[1, ::3] = 1.0
    options = {"top_k": torch.tensor([2, 4]), "top_p": torch.tensor([1.0, 0.5]), "seed": torch.tensor([5, 6])}
    check(made(2), arguments(flat, **options, output=3))


def test_where_there_is_no_id_every_rank_gives_the_reason(made):
    logits = rows_of(5, 2048, 1, dtype=torch.float32)
    logits[0, 3], logits[1, 2040], logits[2], logits[3, :2000] = math.nan, math.inf, -math.inf, -math.inf
    calls = [arguments(logits, **cut) for cut in ({"temperature": 0.0}, {"top_k": 4, "top_p": 0.7})]
    check(made(2), *calls)
    assert ops.sample(*calls[0])[:3].tolist() == [NOT_FINITE, NOT_FINITE, NONE_ALLOWED]


def test_greedy_takes_the_lowest_of_equals(made):
    logits = torch.zeros(3, 64)
    logits[0, 40], logits[1, [7, 50]], logits[2] = 1.0, 2.0, -0.0
    logits[2, 32:] = 0.0
    ranks = made(2)
    parts = [part.contiguous() for part in logits.chunk(2, 1)]
    ids = [draws.greedy(part) for draws, part in zip(ranks.ranks, parts, strict=True)]
    ranks.run()
    assert [each.tolist() for each in ids] == [[40, 7, 0]] * 2


def test_rows_apart_in_memory_and_off_its_borders(made):
    whole = rows_of(3, 2 * 1028 + 6, 2)
    parts = [whole[:, 1 : 1 + 1028], whole[:, 3 + 1028 : 3 + 2 * 1028]]
    values = arguments(torch.cat(parts, 1), top_k=torch.tensor([0, 3, 9]), seed=8)
    ranks = made(2)
    ids = [draws.sample(part, *values[1:]) for draws, part in zip(ranks.ranks, parts, strict=True)]
    ranks.run()
    assert [each.tolist() for each in ids] == [ops.sample(*values).tolist()] * 2


@pytest.mark.parametrize("cut", ["none", "top-k", "top-p"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_told_and_later_draws_wait_no_more(made, lost, cut):
    ranks = made(2, (1, 1, 1), lost)
    values = arguments(rows_of(2, 4096, 1), **CUTS[cut])
    parts = [part.contiguous() for part in values[0].chunk(2, 1)]
    left = ranks.ranks[1 - lost]
    ids = [left.sample(parts[1 - lost], *values[1:]) for _ in range(2)]
    ranks.run()
    assert [each.tolist() for each in ids] == [[NOT_FINITE] * 2] * 2
    assert left._control[0] == 1  # where later draws look before they wait
    with pytest.raises(EngineError, match="lost"):
        left.check()
    ranks.ranks[lost].check()


class Connected(Communicator):
    """A rank that has draws, as one of several cards has."""

    def __init__(self, draws: PeerDraws, rank: int):
        super().__init__(Mesh(2, 1, rank))
        self._draws = draws

    def draws(self, logits):
        return self._draws if self._draws.serves(logits) else None


def test_the_vocabulary_of_a_rank_draws_by_them(made):
    ranks, values = made(2), arguments(rows_of(2, 1024, 3), top_k=2, seed=torch.tensor([1, 2]))
    parts = [part.contiguous() for part in values[0].chunk(2, 1)]
    vocabularies = [Vocabulary(512, Connected(draws, rank)) for rank, draws in enumerate(ranks.ranks)]
    _, *of_rows, output = values
    parameters = Parameters(*of_rows, index=None)
    sampled = [v.sample(part, parameters, output) for v, part in zip(vocabularies, parts, strict=True)]
    likeliest = [v.likeliest(part) for v, part in zip(vocabularies, parts, strict=True)]
    ranks.run()
    assert [ids.tolist() for ids in sampled] == [ops.sample(*values).tolist()] * 2
    assert [ids.tolist() for ids in likeliest] == [values[0].argmax(-1).tolist()] * 2
    assert vocabularies[0].split and not vocabularies[0].tells_greedy
    assert Vocabulary(512, Communicator(Mesh(2))).tells_greedy and not Vocabulary(512).tells_greedy


def test_what_is_not_served_is_told(made):
    draws = made(2).ranks[0]
    assert draws.serves(torch.zeros(4, 264)) and draws.serves(torch.zeros(1, 264, dtype=torch.bfloat16))
    for logits in (
        torch.zeros(0, 264),
        torch.zeros(4, 262),
        torch.zeros(264),
        torch.zeros(4, 264, dtype=torch.float16),
        torch.zeros(4, 528)[:, ::2],
        torch.zeros(1, 200_004, dtype=torch.bfloat16),
    ):
        assert not draws.serves(logits)
    with pytest.raises(RuntimeError, match="does not serve"):
        draws.greedy(torch.zeros(4, 262))


def test_arguments_of_another_layout_are_refused():
    device = declare(emulator())
    assert b"layout" in device.tokenspeed_sample_ranks(ctypes.create_string_buffer(8), 8, 0, None)
