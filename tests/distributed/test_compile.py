"""From placements to collectives: the rules on made-up stages, and the programs of the model."""

import pytest
import torch

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.errors import PlacementError
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator
from tokenspeed.engine.parallel.compile import ReduceInto, compile_program, link
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.parallel.placement import Keep, Partial, Replicate, Shard

from . import models
from .threads import run_ranks

FOUR = Mesh(4, 4)


class Double:
    """A stage that doubles x, whatever its placement."""

    def __init__(self, input=Replicate(), output=Replicate(), absorbs_reduce=False, picks_rows=False):  # noqa: B008
        self.input, self.output = input, output
        self.absorbs_reduce, self.picks_rows = absorbs_reduce, picks_rows

    def forward(self, x, residual, batch):
        return 2 * x, residual

    def reduce_into(self, x, residual, batch, communicator, group):
        return self.forward(communicator.all_reduce(x, group), residual, batch)


def collectives(compiled):
    return [str(entry.collective) if entry.collective else None for entry in compiled]


RULES = [
    (Replicate(), Replicate(), None),
    (Partial("tp"), Replicate(), "all-reduce(tp)"),
    (Partial("tp"), Shard(0, "tp"), "reduce-scatter(0, tp)"),
    (Partial("tp"), Shard(1, "tp"), "reduce-scatter(1, tp)"),
    (Shard(1, "tp"), Replicate(), "all-gather(1, tp)"),
    (Shard(0, "tp"), Keep(), "all-gather(0, tp)"),
    (Shard(1, "tp"), Shard(1, "tp"), None),
    (Partial("tp"), Partial("tp"), None),
    (Partial("tp"), Keep(), None),
    (Partial("world"), Shard(0, "ep"), "reduce-scatter(0, tp)"),  # three names of the same four ranks
]


@pytest.mark.parametrize(("have", "want", "collective"), RULES, ids=lambda value: str(value))
def test_a_boundary_gets_the_one_collective_that_it_needs(have, want, collective):
    compiled = compile_program([("a", Double(output=have)), ("b", Double(input=want))], FOUR, Replicate())
    assert collectives(compiled) == [None, collective]


@pytest.mark.parametrize(("have", "want"), [rule[:2] for rule in RULES if not isinstance(rule[1], Keep)], ids=str)
def test_the_collective_turns_the_values_of_one_placement_into_the_other(have, want):
    whole = torch.arange(64.0).view(8, 8)

    def placed(placement, mesh):
        """What a rank holds of `whole`: terms of a sum are multiples 0.1 .. 0.4 of it."""
        if isinstance(placement, Shard):
            return whole.chunk(4, placement.dim)[mesh.rank].clone()
        return whole * 0.1 * (1 + mesh.rank) if isinstance(placement, Partial) else whole.clone()

    def work(communicator):
        program = [("a", Double(output=have)), ("b", Double(input=want, output=want))]
        x, residual = placed(have, communicator.mesh) / 2, torch.ones(1)
        for call in link(compile_program(program, communicator.mesh, want), communicator):
            x, residual = call(x, residual, None)
        return x, placed(want, communicator.mesh) * 2, residual

    for x, expected, residual in run_ranks(FOUR, work):
        assert torch.allclose(x, expected) and residual.tolist() == [1]


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (Replicate(), Partial("tp")),
        (Replicate(), Shard(0, "tp")),
        (Shard(0, "tp"), Shard(1, "tp")),
        (Shard(0, "tp"), Partial("tp")),
    ],
)
def test_boundaries_that_no_collective_crosses_are_refused_with_both_names(have, want):
    program = [("first.stage", Double(output=have)), ("second.stage", Double(input=want))]
    with pytest.raises(PlacementError) as error:
        compile_program(program, FOUR, Replicate())
    for word in ("first.stage", "second.stage", str(have), str(want)):
        assert word in str(error.value)


def test_groups_of_different_ranks_do_not_mix():
    program = [("a", Double(output=Partial("ep"))), ("b", Double(input=Shard(0, "tp")))]
    with pytest.raises(PlacementError, match=r"a gives Partial\(ep\) and b takes Shard\(0, tp\)"):
        compile_program(program, Mesh(2, 4), Replicate())


def test_the_ends_of_a_program_are_boundaries_too():
    with pytest.raises(PlacementError, match="the program's input"):
        compile_program([("a", Double(input=Shard(0)))], FOUR, Replicate())
    with pytest.raises(PlacementError, match="the program's output"):
        compile_program([("a", Double())], FOUR, Shard(1))
    compiled = compile_program([("a", Double(output=Shard(1)))], FOUR, Replicate())
    assert collectives(compiled) == [None, "all-gather(1, tp)"] and compiled[-1].stage is None
    assert len(link(compiled, Communicator(FOUR))) == 2


def test_sums_wait_for_fewer_rows_and_end_inside_the_norm():
    program = [
        ("block", Double(output=Partial("tp"))),
        ("rows", Double(Keep(), Keep(), picks_rows=True)),
        ("norm", Double(absorbs_reduce=True)),
    ]
    compiled = compile_program(program, FOUR, Replicate())
    assert collectives(compiled) == [None, None, "all-reduce(tp)"]
    assert compiled[-1].fused and compiled[-1].collective.rows == "logit row"
    calls = link(compiled, Communicator(FOUR))
    assert len(calls) == 3 and isinstance(calls[-1], ReduceInto)


def test_a_gather_is_not_fused_into_a_norm():
    compiled = compile_program(
        [("a", Double(output=Shard(0))), ("norm", Double(absorbs_reduce=True))], FOUR, Replicate()
    )
    assert collectives(compiled) == [None, "all-gather(0, tp)"] and not compiled[-1].fused
    assert len(link(compiled, Communicator(FOUR))) == 3


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_on_one_rank_the_program_is_its_stages_and_nothing_else(moe):
    config = ModelConfig.from_dict(models.config(moe, kv_heads=2))
    model = Qwen3_5.empty(config, torch.float32, torch.device("meta"))
    assert [entry.stage for entry in model.compiled] == list(model.program)
    assert not any(entry.collective for entry in model.compiled)
    assert link(model.compiled, ONE_RANK) == [stage.forward for stage in model.program]


@pytest.mark.parametrize("mesh", [Mesh(2, 1), Mesh(4, 2), Mesh(2, 4)])
def test_every_sum_of_the_model_ends_inside_a_norm(mesh):
    config = ModelConfig.from_dict(models.config(moe=True, kv_heads=2))
    model = Qwen3_5.empty(config, torch.float32, torch.device("meta"), Communicator(mesh))
    reduced = [entry for entry in model.compiled if entry.collective]
    # The embedding's, two of each of four layers, and nothing else; no callable is added.
    assert len(reduced) == 1 + 2 * 4 and all(entry.fused for entry in reduced)
    assert len(link(model.compiled, Communicator(mesh))) == len(model.program)
    assert reduced[0].name == "layers.0.input_layernorm"
    assert [entry.collective.rows for entry in reduced] == ["token"] * 8 + ["logit row"]


def test_experts_alone_need_one_sum_a_layer():
    config = ModelConfig.from_dict(models.config(moe=True, kv_heads=2))
    model = Qwen3_5.empty(config, torch.float32, torch.device("meta"), Communicator(Mesh(1, 4)))
    assert len([entry for entry in model.compiled if entry.collective]) == 4
