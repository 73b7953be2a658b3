"""Mixture of experts: routing with the permutation that groups tokens by expert, and the grouped expert product."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator
from .norm import silu_mul


def _route_fake(logits: Tensor, top_k: int):
    rows, experts = logits.shape
    integers = [(rows, top_k), (rows * top_k,), (experts + 1,)]
    return logits.new_empty(rows, top_k), *(logits.new_empty(shape, dtype=torch.int32) for shape in integers)


@operator(fake=_route_fake)
def moe_route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose `top_k` experts a token and group the choices by expert.

    logits: [N, E]. Softmax over all experts in fp32; of equal probabilities the lower expert wins; weights are
    renormalised to sum to 1 and rounded to logits' dtype. Returns weights [N, top_k]; experts [N, top_k] int32, by
    falling probability; order [N top_k] int32, the flat choices (token * top_k + rank) sorted by expert, stable;
    offsets [E + 1] int32, expert e owns order[offsets[e] : offsets[e + 1]].
    """
    probabilities, experts = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = probabilities[:, :top_k], experts[:, :top_k]
    weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
    grouped, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(logits.shape[1] + 1, device=logits.device)
    offsets = torch.searchsorted(grouped, bounds, out_int32=True)
    return weights, experts.int(), order.int(), offsets


def _experts_fake(x, weights, experts, order, offsets, gate_up, down, first_expert=0):
    return torch.empty_like(x)


@operator(fake=_experts_fake)
def moe_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int = 0,
) -> Tensor:
    """Run each token through its experts and sum their outputs: `sum_k w_k down_k(silu(gate_k x) * up_k x)`.

    x: [N, H]; weights, experts, order, offsets: from `moe_route`; gate_up: [E, 2 I, H], the gate half first; down:
    [E, H, I]; rows of H and of I elements are multiples of 16 bytes. The sum over a token's experts runs in order of
    rank, in fp32. Returns [N, H] of x's dtype.
    Of a model with more experts, gate_up and down may hold those from `first_expert` on, with offsets
    [first_expert : first_expert + E + 1]: choices of the others add nothing, and nothing of them is read.
    """
    top_k = weights.shape[1]
    order = order.long()
    if x.is_cuda:
        # The choices of the experts at hand lie together, and the grouped product wants them first.
        order = order[(torch.arange(len(order), device=order.device) + offsets[0]) % max(len(order), 1)]
        offsets = offsets - offsets[0]
    out = _by_expert(silu_mul.__wrapped__(_by_expert(x[order // top_k], gate_up, offsets)), down, offsets)
    by_choice = torch.empty_like(out)
    by_choice[order] = out
    by_choice = by_choice.unflatten(0, (-1, top_k)).float()
    return (by_choice * weights.float()[..., None]).sum(1).to(x.dtype)


def _by_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of x times the transpose of weight[e]; other rows are zero."""
    if x.is_cuda:
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
        return out.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= offsets[-1], 0)
    # On the host the offsets cost nothing to read, and only experts with tokens are visited.
    bounds = offsets.tolist()
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
    return out
