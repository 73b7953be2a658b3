"""The mixture of experts of a layer as one operator."""

import torch
from torch import Tensor

from .library import operator
from .linear import add_gated_silu_mul_linear, add_rms_norm_linear, linear, silu_mul_linear
from .moe import all_experts, few_for_all_experts, moe_experts, moe_route

MOE_BLOCK_ROWS = 8  # that the kernel of `moe_block` serves


def moe_block_scratch(experts: int, top_k: int, hidden: int) -> int:
    """How many int32 `moe_block` wants for scratch, in a model of these sizes: counters, and what blocks tell others in
    8 bytes each."""
    return 448 + 2 * MOE_BLOCK_ROWS * (experts + top_k * hidden)


def _block_fake(x, residual, *others):
    return torch.empty_like(residual), torch.empty_like(residual)


@operator(fake=_block_fake, mutates=("scratch",))
def moe_block(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    in_proj: Tensor,
    experts: int,
    top_k: int,
    gate_up: Tensor,
    down: Tensor,
    shared_down: Tensor,
    scratch: Tensor,
    first_expert: int = 0,
    router: Tensor | None = None,
    in_scale: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    shared_scale: Tensor | None = None,
    context_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixture of experts of a layer, from the residual sum to the sum of all experts; of few rows in one launch.

    x, residual: [N, H]; norm_weight: [H]; in_proj: [at least 2 S + E + 1, H], the shared expert's gate and its up, the
    router and the shared expert's own gate; experts: E, of the model; gate_up, down, top_k, first_expert: as in
    `moe_experts`; shared_down: [H, S]. Weights may be read before the kernel ahead on the stream is complete. In FP8
    (all with their scales, as in `linear` and `moe_experts`) in_proj ends before the router: `router`, [at least E + 1,
    H] of x's dtype, goes on with it. context_lens: as in `moe_route`, whose padding rows choose nobody.
    Returns `y = moe_experts(norm) + sigmoid(gate) shared(norm)` and the residual sum, both [N, H]; rounded where
    `add_rms_norm_linear`, `moe_route`, `moe_experts` and `add_gated_silu_mul_linear` round, of which this is made where
    no kernel serves the call (more than MOE_BLOCK_ROWS rows, for one). Of many rows in FP8 a card quantises the norm
    once, for the shared expert and the others, with the same bits.
    Mutates scratch, [moe_block_scratch(E, top_k, H)] int32: zeros at first, then what the last call left, whatever its
    sizes. Calls that may run at the same time need one of their own each. Raises ValueError where it is too short.
    """
    wanted = moe_block_scratch(experts, top_k, x.shape[1])
    if len(scratch) < wanted:
        raise ValueError(f"scratch has {len(scratch)} elements; {experts} experts, top {top_k} want {wanted}")
    shared = 2 * shared_down.shape[1]
    projected, normed, total = add_rms_norm_linear(x, residual, norm_weight, eps, in_proj, in_scale)
    if router is not None:
        projected = torch.cat([projected[:, :shared], linear(normed, router)], dim=1)
    logits = projected[:, shared : shared + experts]
    gate = projected[:, shared + experts : shared + experts + 1]
    if few_for_all_experts(normed, gate_up, gate_up_scale):
        y = silu_mul_linear.__wrapped__(projected[:, :shared], shared_down).mul_(torch.sigmoid(gate))
        y = all_experts(normed, y, logits, top_k, context_lens, gate_up, down, first_expert)
    else:
        weights, chosen, order, offsets = moe_route(logits, top_k, context_lens)
        offsets = offsets[first_expert : first_expert + len(gate_up) + 1]
        held = (gate_up, down, first_expert, gate_up_scale, down_scale, experts)
        y = moe_experts(normed, weights, chosen, order, offsets, *held)
        add_gated_silu_mul_linear(y, projected[:, :shared], shared_down, gate, shared_scale)
    scratch[1:448].zero_()  # the kernel counts from here, and finds the half of it clear that the number of calls names
    scratch[:1].add_(1)
    return y, total
