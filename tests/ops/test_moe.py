"""Claims about `moe_route` and `moe_experts`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.ops.moe_block import moe_block_scratch

from . import reference
from .backends import bounded, same_bits
from .samples import SAMPLES

SHAPES = [(256, 8), (512, 10)]  # experts and top-k of the published models


def shapes(backend):
    return SHAPES if backend.kernels else [*SHAPES, (5, 3), (4, 4), (3, 1)]


def check_route(backend, logits, top_k):
    """Against a sort by (falling logit, expert); the grouping against a scan over experts."""
    weights, experts, order, offsets = backend.op("moe_route")(logits, top_k)
    expected_weights, expected_experts, groups = reference.route(logits, top_k)
    backend.assert_close(weights, expected_weights)
    assert (experts.dtype, order.dtype, offsets.dtype) == (torch.int32,) * 3
    assert experts.tolist() == expected_experts.tolist()
    assert order.tolist() == [choice for group in groups for choice in group]
    assert offsets.tolist() == [0, *torch.tensor([len(group) for group in groups]).cumsum(0).tolist()]
    return weights, experts, order, offsets


def spread_logits(backend, tokens, experts):
    """Random multiples of 1/16: equal logits are frequent, different ones have different probabilities."""
    return (backend.randn(tokens, experts, dtype=torch.float32) * 16).round().div(16).to(backend.dtype)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 33])
def test_routing_equals_a_stable_sort(backend, tokens):
    for experts, top_k in shapes(backend):
        check_route(backend, spread_logits(backend, tokens, experts), top_k)


@bounded
@given(st.data())
def test_ties_go_to_the_lower_expert(backend, data):
    experts, top_k = data.draw(st.sampled_from(shapes(backend)), "shape")
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    levels = data.draw(st.integers(1, 4), "levels")  # few levels: most choices are ties
    logits = torch.randint(0, levels, (data.draw(st.integers(1, 9), "tokens"), experts))
    check_route(backend, logits.to(backend.device, backend.dtype), top_k)


def test_equal_logits_choose_the_first_experts_with_equal_weights(backend):
    weights, experts, _, _ = backend.op("moe_route")(backend.randn(3, 256).fill_(1.5), 8)
    assert experts.tolist() == [list(range(8))] * 3
    assert weights.float().tolist() == [[0.125] * 8] * 3


def test_large_logits_do_not_overflow(backend):
    logits = (spread_logits(backend, 4, 256) * 16).clamp(-20, 20) * 2 + 300  # even numbers are exact in bf16
    assert check_route(backend, logits, 8)[0].isfinite().all()


@pytest.mark.parametrize(("sequences", "each"), [(1, 1), (4, 1), (7, 1), (11, 3), (130, 1), (70, 2)])
def test_rows_of_padding_choose_nobody_and_add_nothing(backend, sequences, each):
    """The other rows' results have the same bits as without them, and experts that padding alone would have chosen are
    not read."""
    (experts, top_k), tokens = SHAPES[0], sequences * each
    logits, contexts = spread_logits(backend, tokens, experts), torch.arange(sequences, dtype=torch.int32)
    contexts[torch.rand(sequences) < 0.4] = -1
    contexts[sequences // 2] = -1
    kept = (contexts >= 0).repeat_interleave(each)
    logits[~kept.to(logits.device)] = torch.nan
    padded = backend.op("moe_route")(logits, top_k, contexts.to(backend.device))
    weights, chosen, order, offsets = (x.cpu() for x in padded)
    alone = [x.cpu() for x in backend.op("moe_route")(logits[kept.to(logits.device)], top_k)]
    assert same_bits(weights[kept], alone[0]) and same_bits(chosen[kept], alone[1])
    assert not weights[~kept].any() and (chosen[~kept] == experts).all()
    rows = torch.arange(tokens)[kept].int()
    assert order[: offsets[-1]].tolist() == (rows[alone[2] // top_k] * top_k + alone[2] % top_k).tolist()
    assert sorted(order.tolist()) == list(range(tokens * top_k)) and same_bits(offsets, alone[3])
    hidden, width = expert_sizes(backend)
    x, (gate_up, down) = backend.randn(tokens, hidden), expert_weights(backend, experts, hidden, width)
    unused = torch.ones(experts, dtype=torch.bool)
    unused[chosen[kept].flatten().long()] = False
    gate_up[unused.to(backend.device)] = torch.nan
    x[~kept.to(backend.device)] = torch.nan
    out = backend.op("moe_experts")(x, *padded, gate_up, down).cpu()
    assert not out[~kept].any()
    assert out[kept].isfinite().all()


def expert_sizes(backend):
    """Hidden size and an expert's width: kernels serve multiples of 64."""
    return (128, 64) if backend.kernels else (64, 32)


def expert_weights(backend, experts, hidden, width):
    return backend.randn(experts, 2 * width, hidden) * 0.2, backend.randn(experts, hidden, width) * 0.2


def check_experts(backend, logits, top_k):
    hidden, width = expert_sizes(backend)
    routed = backend.op("moe_route")(logits, top_k)
    x, (gate_up, down) = backend.randn(len(logits), hidden), expert_weights(backend, logits.shape[1], hidden, width)
    unused = torch.ones(logits.shape[1], dtype=torch.bool, device=backend.device)
    unused[routed[1].flatten().long()] = False
    gate_up[unused], down[unused] = torch.nan, torch.nan  # an expert without tokens is not read
    out = backend.op("moe_experts")(x, *routed, gate_up, down)
    backend.assert_close(out, reference.mixture(x, routed[0], routed[1], gate_up, down))


@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 33])
def test_experts_equal_the_sum_token_by_token(backend, tokens):
    for experts, top_k in [(16, 4), (5, 5), (3, 1)]:
        check_experts(backend, spread_logits(backend, tokens, experts), top_k)


def test_all_tokens_on_one_expert(backend):
    logits = spread_logits(backend, 70, 8)
    logits[:, 5] = 100
    check_experts(backend, logits, 1)


def test_a_token_does_not_see_its_neighbours(backend):
    hidden, width = expert_sizes(backend)
    logits, x = spread_logits(backend, 6, 8), backend.randn(6, hidden)
    weights = expert_weights(backend, 8, hidden, width)
    together = backend.op("moe_experts")(x, *backend.op("moe_route")(logits, 2), *weights)
    order = [4, 0, 5]
    apart = backend.op("moe_experts")(x[order], *backend.op("moe_route")(logits[order], 2), *weights)
    backend.assert_close(apart, together[order])


@pytest.mark.parametrize("tokens", [0, 1, 9, 33])
def test_experts_at_hand_add_their_share_and_the_shares_add_up(backend, tokens):
    experts, top_k, hidden, width = 12, 4, 64, 32
    routed = backend.op("moe_route")(spread_logits(backend, tokens, experts), top_k)
    x, (gate_up, down) = backend.randn(tokens, hidden), expert_weights(backend, experts, hidden, width)
    shares = []
    for first, last in ((0, 3), (3, 4), (4, 12)):
        held = (routed[3][first : last + 1], gate_up[first:last], down[first:last], first)
        shares.append(backend.op("moe_experts")(x, *routed[:3], *held))
        here = (routed[1] >= first) & (routed[1] < last)
        backend.assert_close(
            shares[-1], reference.mixture(x, routed[0].masked_fill(~here, 0), routed[1], gate_up, down)
        )
    backend.assert_close(
        sum(share.float() for share in shares).to(backend.dtype), backend.op("moe_experts")(x, *routed, gate_up, down)
    )


def test_experts_that_nobody_chose_add_zero(backend):
    logits = spread_logits(backend, 5, 8)
    logits[:, :4] -= 100
    routed = backend.op("moe_route")(logits, 2)
    gate_up, down = expert_weights(backend, 4, 64, 32)
    out = backend.op("moe_experts")(backend.randn(5, 64), *routed[:3], routed[3][:5], gate_up, down, 0)
    assert out.tolist() == torch.zeros(5, 64).tolist()


def test_a_block_wants_scratch_of_its_size(backend):
    args = list(SAMPLES["moe_block"](backend))
    args[10] = args[10][:-1].clone()
    with pytest.raises((ValueError, RuntimeError), match=f"scratch has {len(args[10])} elements"):
        backend.op("moe_block")(*args)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("rows", [1, 5, 96, 97])
def test_a_block_of_few_small_experts_is_the_mixture(backend, rows, first):
    """Where a CPU multiplies with all experts at once: of those at hand from `first` on, and nothing for padding."""
    experts, top_k, hidden, width, eps = 8, 2, 128, 64, 1e-6
    (gate_up, down), shared_down = expert_weights(backend, experts, hidden, width), backend.randn(hidden, width) * 0.2
    norm, in_proj = backend.randn(hidden) * 0.1, backend.randn(2 * width + experts + 8, hidden) * 0.2
    x, residual = backend.randn(rows, hidden), backend.randn(rows, hidden)
    contexts = torch.ones(rows, dtype=torch.int32)
    contexts[1::4] = -1
    scratch = backend.tensor([0] * moe_block_scratch(experts, top_k, hidden))
    weights = (gate_up[first : first + 4], down[first : first + 4], shared_down)
    block = (x, residual, norm, eps, in_proj, experts, top_k, *weights, scratch, first)
    y, total = backend.op("moe_block")(*block, *[None] * 5, contexts.to(backend.device))
    normed = reference.rms_norm(total, norm, eps).to(backend.dtype)
    projected = (normed.double() @ reference.exact(in_proj).T).to(backend.dtype)
    weights, chosen, _ = reference.route(projected[:, 2 * width : 2 * width + experts], top_k)
    outside = (chosen < first) | (chosen >= first + 4) | (contexts < 0).to(chosen.device)[:, None]
    expected = reference.mixture(normed, weights.masked_fill(outside, 0).to(backend.dtype), chosen, gate_up, down)
    gate, up, _, shared_gate, _ = reference.exact(projected).split([width, width, experts, 1, 7], dim=1)
    shared = (reference.silu(gate) * up) @ reference.exact(shared_down).T * reference.sigmoid(shared_gate)
    expected = expected.cpu() + shared.cpu()
    tolerance = 1e-5 if backend.dtype == torch.float32 else 2e-2
    far = (y.double().cpu() - expected).norm(dim=1) > tolerance * expected.norm(dim=1)
    assert far.sum() <= min(rows // 5, 1 + rows // 50)  # a tie that rounding decides otherwise costs a row
    assert not far[1::4].any()


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_a_block_is_the_composition_of_its_operators(backend, rows):
    """Norm, routing, experts and the shared expert, each against the published mathematics."""
    _, _, norm, eps, in_proj, experts, top_k, gate_up, down, shared_down, scratch = SAMPLES["moe_block"](backend)
    x, residual = backend.randn(rows, 128), backend.randn(rows, 128)
    y, total = backend.op("moe_block")(
        x, residual, norm, eps, in_proj, experts, top_k, gate_up, down, shared_down, scratch
    )
    backend.assert_close(total, reference.exact(x) + reference.exact(residual))
    normed = reference.rms_norm(total, norm, eps).to(backend.dtype)
    projected = (normed.double() @ reference.exact(in_proj).T).to(backend.dtype)
    weights, chosen, _ = reference.route(projected[:, 128 : 128 + experts], top_k)
    gate, up = reference.exact(projected[:, :64]), reference.exact(projected[:, 64:128])
    shared = (reference.silu(gate) * up) @ reference.exact(shared_down).T
    shared *= reference.sigmoid(projected[:, 128 + experts : 129 + experts])
    expected = reference.mixture(normed, weights.to(backend.dtype), chosen, gate_up, down) + shared
    near = (y.double().cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    tolerance = 1e-5 if backend.dtype == torch.float32 else 2e-2
    assert near.median() < tolerance  # a tie that rounding decides otherwise costs a row
    assert (near < tolerance).sum() >= rows - 1
