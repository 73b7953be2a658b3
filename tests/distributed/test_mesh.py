"""Groups of ranks, and what a rank takes of a dimension."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.parallel.mesh import GROUPS, Mesh
from tokenspeed.engine.parallel.sharding import Split, rank_share
from tokenspeed.engine.sizes import PUBLISHED

from . import models


@st.composite
def meshes(draw) -> Mesh:
    small, factor = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    tp, ep = draw(st.permutations([small, small * factor]))
    return Mesh(tp, ep, draw(st.integers(0, small * factor - 1)))


@given(meshes())
def test_groups_of_a_name_part_the_ranks_and_know_their_places(mesh):
    for name in GROUPS:
        groups = mesh.members(name)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world))
        own = next(group for group in groups if mesh.rank in group)
        assert len(own) == mesh.size(name) and own[mesh.place(name)] == mesh.rank
        assert mesh.members(mesh.canonical(name)) == groups


@given(meshes())
def test_expert_slices_meet_in_pairs_of_expert_group_and_slice(mesh):
    """Experts over ep and their columns over expert_tp: every rank has a different pair."""
    places = {
        (m.place("ep"), m.place("expert_tp")) for m in (Mesh(mesh.tp, mesh.ep, rank) for rank in range(mesh.world))
    }
    assert len(places) == mesh.world == mesh.size("ep") * mesh.size("expert_tp")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 1), ["tp", "0"]),
        ((1, -2), ["ep", "-2"]),
        ((4, 3), ["tp 4", "ep 3"]),
        ((2, 4, 4), ["rank 4", "4 ranks"]),
        ((2, 1, -1), ["rank -1"]),
    ],
)
def test_meshes_that_cannot_be_are_refused_with_the_numbers(arguments, expected):
    with pytest.raises(ConfigError) as error:
        Mesh(*arguments)
    for word in expected:
        assert word in str(error.value)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_split_deals_every_piece_out_evenly_and_in_order(ranks, each, width, copies):
    split = Split("pieces", ranks * each, "tp", width)
    taken = [split.slice(Mesh(ranks, rank=rank)) for rank in range(ranks)]
    assert [i for part in taken for i in range(split.size)[part]] == list(range(split.size))
    shared = Split("pieces", ranks, "tp", width, shared=True)
    owners = [shared.slice(Mesh(ranks * copies, rank=rank)) for rank in range(ranks * copies)]
    assert owners == [slice(r // copies * width, (r // copies + 1) * width) for r in range(ranks * copies)]


@pytest.mark.parametrize(
    ("raw", "mesh", "expected"),
    [
        (models.config(False, 2, linear_num_key_heads=2), Mesh(4), ["linear_num_key_heads", "2", "4 ranks", "'tp'"]),
        (
            models.config(False, 4, num_attention_heads=12, vocab_size=304),
            Mesh(8),
            ["num_attention_heads", "12", "8 ranks"],
        ),
        (models.config(False, 3, num_attention_heads=12), Mesh(2), ["num_key_value_heads", "3", "multiple of it"]),
        (models.config(False, 2, vocab_size=301), Mesh(2), ["vocab_size", "301", "2 ranks"]),
        (models.config(False, 2, intermediate_size=97), Mesh(2), ["intermediate_size", "97", "2 ranks"]),
        (models.config(True, 2, num_experts=6), Mesh(1, 4), ["num_experts", "6", "4 ranks", "'ep'"]),
        (models.config(True, 2, moe_intermediate_size=33), Mesh(2, 1), ["moe_intermediate_size", "33", "'expert_tp'"]),
        (models.config(True, 2, shared_expert_intermediate_size=49), Mesh(1, 2), ["shared_expert", "49", "'world'"]),
        (models.config(False, 2), Mesh(1, 2), ["ep is 2", "dense"]),
    ],
)
def test_models_that_do_not_split_are_refused_with_the_dimension_and_the_group(raw, mesh, expected):
    with pytest.raises(ConfigError) as error:
        rank_share(ModelConfig.from_dict(raw), mesh)
    for word in expected:
        assert word in str(error.value)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_split_over_eight_ranks_with_queries_beside_their_keys(size, tp):
    config = PUBLISHED[size]
    share = rank_share(config, Mesh(tp))
    assert share.q_heads * tp == config.q_heads and share.value_heads * tp == config.value_heads
    assert share.kv_heads == max(1, config.kv_heads // tp)
    # A rank's query heads read the key heads it holds, and no other.
    for rank in range(tp):
        first_query, first_kv = rank * share.q_heads, rank * config.kv_heads // tp
        for query in range(share.q_heads):
            whole = (first_query + query) // (config.q_heads // config.kv_heads)
            assert whole == first_kv + query // (share.q_heads // share.kv_heads)
