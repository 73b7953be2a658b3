"""Claims about the routing kernels: one launch and two, words of the membership bits, ties, NaN."""

import pytest
import torch

from tests.kernels.launches import torch_served
from tests.ops import reference
from tests.ops.backends import same_bits

pytest_plugins = ["tests.kernels.schedules"]

SHAPES = [(256, 8), (512, 10)]


def grid_logits(backend, tokens, experts, step=16):
    """Multiples of 1 / step: ties are frequent, and different logits have different probabilities."""
    return (backend.randn(tokens, experts, dtype=torch.float32) * step).round().div(step).to(backend.dtype)


def check(backend, logits, top_k):
    results = []
    assert torch_served(lambda: results.append(backend.op("moe_route")(logits, top_k))) == []
    weights, experts, order, offsets = results[0]
    expected_weights, expected_experts, groups = reference.route(logits, top_k)
    backend.assert_close(weights, expected_weights)
    assert experts.tolist() == expected_experts.tolist()
    assert order.tolist() == [choice for group in groups for choice in group]
    assert offsets.tolist() == [0, *torch.tensor([len(group) for group in groups]).cumsum(0).tolist()]
    return results[0]


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 9, 33, 97])
def test_one_launch_under_every_schedule(scheduled, tokens, experts, top_k):
    check(scheduled, grid_logits(scheduled, tokens, experts), top_k)


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
@pytest.mark.parametrize("tokens", [64, 65, 127, 129])
def test_both_sides_of_the_border_between_one_launch_and_two(backend, tokens, experts, top_k):
    check(backend, grid_logits(backend, tokens, experts, step=2), top_k)


@pytest.mark.parametrize("tokens", [3, 130])
def test_logits_may_lie_a_stride_apart(backend, tokens):
    """The router is a part of a wider product."""
    wide = grid_logits(backend, tokens, 256 + 24)
    wide[:, :8], wide[:, -16:] = 99, torch.nan
    check(backend, wide[:, 8:-16], 8)


@pytest.mark.thinned(2, "scheduled")
def test_two_launches_under_every_schedule(scheduled):
    check(scheduled, grid_logits(scheduled, 130, 256), 8)


def test_one_launch_and_two_agree_on_the_same_rows(backend):
    logits = grid_logits(backend, 132, 256)
    many, few = backend.op("moe_route")(logits, 8), backend.op("moe_route")(logits[:100], 8)
    assert same_bits(many[0][:100], few[0])
    assert same_bits(many[1][:100], few[1])


@pytest.mark.parametrize("top_k", [1, 16])
def test_the_least_and_the_most_choices(backend, top_k):
    check(backend, grid_logits(backend, 5, 512), top_k)


def test_probabilities_that_underflow_fall_to_the_lower_expert(backend):
    logits = torch.full((1, 256), -300.0)
    logits[0, 200] = 0.0
    _, experts, _, _ = backend.op("moe_route")(logits.to(backend.device, backend.dtype), 4)
    assert experts.tolist() == [[200, 0, 1, 2]]


@pytest.mark.parametrize("tokens", [6, 70, 130])
def test_rows_of_nan_and_infinity_choose_distinct_experts_and_leave_the_others_alone(backend, tokens):
    logits = grid_logits(backend, tokens, 256)
    spoiled = logits.clone()
    spoiled[0], spoiled[2], spoiled[3], spoiled[4, 7] = torch.nan, torch.inf, -torch.inf, torch.nan
    weights, experts, order, offsets = backend.op("moe_route")(spoiled, 8)
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 256 for row in experts.tolist())
    assert sorted(order.tolist()) == list(range(8 * tokens))
    assert offsets[-1].item() == 8 * tokens
    clean = backend.op("moe_route")(logits, 8)
    for row in (1, 5):
        assert same_bits(weights[row], clean[0][row])
        assert same_bits(experts[row], clean[1][row])
