"""Sums of a prefill by one all-reduce or in parts: the same model, and what was measured decides which."""

import threading
import time

import pytest
import torch

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel import costs
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator
from tokenspeed.engine.parallel.compile import JoinParts, ReduceInParts, ReduceInto, group_of_parts, link
from tokenspeed.engine.parallel.costs import ALL_REDUCE, IN_PARTS, Costs, always_in_parts, never_in_parts
from tokenspeed.engine.parallel.mesh import Mesh

from . import models
from .threads import ThreadCommunicator, run_ranks

CASES = {
    "dense": (models.config(moe=False, kv_heads=2), Mesh(2, 1)),
    "dense-mtp": (models.config(moe=False, kv_heads=1, mtp_num_hidden_layers=1), Mesh(4, 1)),
    "moe": (models.config(moe=True, kv_heads=2), Mesh(4, 2)),
}


def from_tokens(tokens: int) -> Costs:
    """In parts from that number on: the lines cross between the two sizes."""
    return Costs("tp", (1, 2 * tokens - 1), (100.0, 300.0), (150.0, 230.0)) if tokens > 1 else always_in_parts(Mesh(2))


def test_the_pick_follows_the_costs():
    table = Costs("tp", (100, 200, 400), (10.0, 20.0, 40.0), (30.0, 30.0, 30.0))
    assert [table.pick(n) for n in (1, 100, 200, 300, 330, 400, 4000)] == [ALL_REDUCE] * 4 + [IN_PARTS] * 3
    assert Costs("tp", (100, 200), (10.0, 20.0), (9.9, 19.9)).pick(150) == ALL_REDUCE  # no more than noise
    assert Costs("tp", (100, 200), (10.0, 20.0), (8.0, 30.0)).pick(100) == IN_PARTS
    assert "100 tokens 10 or 30 us: all-reduce;" in str(table)
    assert "400 tokens 40 or 30 us: reduce-scatter + all-gather" in str(table)


def test_below_what_was_measured_it_is_one_all_reduce():
    assert always_in_parts(Mesh(2)).pick(1) == IN_PARTS
    assert never_in_parts(Mesh(2)).pick(100_000) == ALL_REDUCE
    assert Costs("tp", (64, 128), (9.0, 9.0), (1.0, 1.0)).pick(63) == ALL_REDUCE


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            directory = models.write_checkpoint(tmp_path_factory.mktemp(name), CASES[name][0])
            made[name] = directory, models.run(ONE_RANK, directory)
        return made[name]

    return get


class Counting(Communicator):
    """The sums of a rank by their kind."""

    def __init__(self, inner: ThreadCommunicator, table: Costs | None):
        super().__init__(inner.mesh)
        self.inner, self.costs, self.kinds = inner, table, []

    def all_reduce(self, x, group, largest=False):
        if x.is_floating_point() and not largest:
            self.kinds.append((ALL_REDUCE, len(x)))
        return self.inner.all_reduce(x, group, largest)

    def reduce_scatter(self, x, dim, group):
        self.kinds.append((IN_PARTS, len(x)))
        return self.inner.reduce_scatter(x, dim, group)

    def all_gather(self, x, dim, group):
        return self.inner.all_gather(x, dim, group)


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("name", CASES)
def test_both_forms_give_the_logits_of_one_process(checkpoints, name, tokens):
    """Prefills of 103 and 18 tokens, not always as many to a rank as to another, and decode, which stays whole."""
    directory, expected = checkpoints(name)

    def work(communicator):
        counting = Counting(communicator, from_tokens(tokens))
        return models.run(counting, directory), counting.kinds

    results = run_ranks(CASES[name][1], work)
    models.check([outcome for outcome, _ in results], expected)
    ranks = CASES[name][1].world
    for _, kinds in results:
        parts = {rows for kind, rows in kinds if kind == IN_PARTS}
        assert parts == {-(-rows // ranks) * ranks for rows in (103, 18) if rows >= tokens}
        assert {rows for kind, rows in kinds if kind == ALL_REDUCE} >= {2, 4}


def test_without_costs_nothing_changes(checkpoints):
    directory, expected = checkpoints("dense")

    def work(communicator):
        counting = Counting(communicator, None)
        return models.run(counting, directory), counting.kinds

    for outcome, kinds in run_ranks(Mesh(2), work):
        models.check([outcome], expected)
        assert {kind for kind, _ in kinds} == {ALL_REDUCE}


def test_the_program_in_parts_joins_the_stream_before_rows_are_picked():
    config = ModelConfig.from_dict(models.config(moe=True, kv_heads=2))
    model = Qwen3_5.empty(config, torch.float32, torch.device("meta"), Communicator(Mesh(4, 2)))
    assert group_of_parts(model.compiled) == "tp"
    calls = link(model.compiled, Communicator(Mesh(4, 2)), in_parts=True)
    kinds = [type(call) for call in calls if isinstance(call, ReduceInParts | ReduceInto | JoinParts)]
    assert kinds == [ReduceInParts] * 8 + [JoinParts, ReduceInto]


@pytest.mark.parametrize("mesh", [Mesh(1, 4), Mesh(2, 4), Mesh()])
def test_where_sums_are_over_different_ranks_they_stay_whole(mesh):
    config = ModelConfig.from_dict(models.config(moe=True, kv_heads=2))
    communicator = Communicator(mesh)
    communicator.costs = always_in_parts(mesh)
    model = Qwen3_5.empty(config, torch.float32, torch.device("meta"), communicator)
    assert group_of_parts(model.compiled) is None and not model._calls_in_parts


def test_every_rank_has_the_costs_of_the_slowest(monkeypatch):
    real = costs.microseconds

    def late(work, device):
        if threading.current_thread() is slow:
            time.sleep(0.01)
            return real(work, device, rounds=1) + 1e6
        return real(work, device, rounds=1)

    slow = None

    def work(communicator):
        nonlocal slow
        if communicator.mesh.rank == 1:
            slow = threading.current_thread()
        return costs.measure(communicator, 16, torch.float32, models.CPU, 640, progress=False)

    monkeypatch.setattr(costs, "microseconds", late)
    first, second = run_ranks(Mesh(2), work)
    assert first == second and first.tokens == (10, 40, 160, 640)
    assert min(first.all_reduce + first.in_parts) > 1e6
