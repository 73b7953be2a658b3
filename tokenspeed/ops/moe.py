"""Mixture of experts: routing with the permutation that groups tokens by expert, and the grouped expert product."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8 import dequantise, product
from .library import operator
from .norm import silu_mul


def _route_fake(logits: Tensor, top_k: int, context_lens: Tensor | None = None):
    rows, experts = logits.shape
    integers = [(rows, top_k), (rows * top_k,), (experts + 1,)]
    return logits.new_empty(rows, top_k), *(logits.new_empty(shape, dtype=torch.int32) for shape in integers)


def _chosen(logits: Tensor, top_k: int, context_lens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and experts of `moe_route`, both [N, top_k], the experts int64."""
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to {logits.shape[1]}, the number of experts.")
    probabilities, experts = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = probabilities[:, :top_k], experts[:, :top_k]
    weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
    if context_lens is not None and len(context_lens) and not (context_lens.is_cpu and min(context_lens.tolist()) >= 0):
        padding = (context_lens < 0).repeat_interleave(len(logits) // len(context_lens))[:, None]
        weights, experts = weights.masked_fill(padding, 0), experts.masked_fill(padding, logits.shape[1])
    return weights, experts


@operator(fake=_route_fake)
def moe_route(logits: Tensor, top_k: int, context_lens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose `top_k` experts a token and group the choices by expert.

    logits: [N, E]. Softmax over all experts in fp32; of equal probabilities the lower expert wins; weights are
    renormalised to sum to 1 and rounded to logits' dtype. Returns weights [N, top_k]; experts [N, top_k] int32, by
    falling probability; order [N top_k] int32, the flat choices (token * top_k + rank) sorted by expert, stable;
    offsets [E + 1] int32, expert e owns order[offsets[e] : offsets[e + 1]].
    context_lens: [B] int32 of sequences of N / B rows each, negative for padding: its rows choose "expert" E, weight 0,
    which is nobody's, so their choices stand behind offsets[E] and cost no expert's weights.
    Raises ValueError for a top_k that is not in 1 .. E.
    """
    weights, experts = _chosen(logits, top_k, context_lens)
    grouped, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(logits.shape[1] + 1, device=logits.device)
    offsets = torch.searchsorted(grouped, bounds, out_int32=True)
    return weights, experts.int(), order.int(), offsets


def _experts_fake(x, *_, **__):
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
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    model_experts: int = 0,
) -> Tensor:
    """Run each token through its experts and sum their outputs: `sum_k w_k down_k(silu(gate_k x) * up_k x)`.

    x: [N, H]; weights, experts, order, offsets: from `moe_route`; gate_up: [E, 2 I, H], the gate half first; down:
    [E, H, I]; rows of H and of I elements are multiples of 16 bytes. The sum over a token's experts runs in order of
    rank, in fp32. Returns [N, H] of x's dtype.
    Of a model with more experts, gate_up and down may hold those from `first_expert` on, with offsets
    [first_expert : first_expert + E + 1]: choices of the others add nothing, and nothing of them is read.
    model_experts is then how many it has, by which a card guesses how many choices an expert has.
    e4m3 experts have scales (fp8.py): gate_up_scale: [E, 2 ceil(I / 128), ceil(H / 128)] fp32, the gate half's blocks
    first, so that either half begins with a block; down_scale: [E, ceil(H / 128), ceil(I / 128)] fp32. As with
    `linear`, products of few tokens are those of the weights they stand for.
    """
    top_k = weights.shape[1]
    order = order.long()
    if x.is_cuda or (gate_up_scale is None and int(offsets[0])):
        # The choices of the experts at hand lie together, and the grouped product wants them first.
        order = order[(torch.arange(len(order), device=order.device) + offsets[0]) % max(len(order), 1)]
        offsets = offsets - offsets[0]
    halves = 1 if gate_up_scale is None else 2
    gated = silu_mul.__wrapped__(_by_expert(x[order // top_k], gate_up, offsets, gate_up_scale, halves))
    out = _by_expert(gated, down, offsets, down_scale)
    by_choice = torch.empty_like(out)
    by_choice[order] = out
    by_choice = by_choice.unflatten(0, (-1, top_k)).float()
    return (by_choice * weights.float()[..., None]).sum(1).to(x.dtype)


_FEW_WEIGHTS = 1 << 18  # of gate_up, the elements up to which multiplying with all experts is cheap, and the rows:
_FEW_ROWS = 96  # measured, a product of each expert with its own rows costs 3 times as much for 1 to 8, as much for 128


def few_for_all_experts(x: Tensor, gate_up: Tensor, scale: Tensor | None) -> bool:
    """Whether a CPU is faster by `all_experts`, whose calls are as many as those of one expert."""
    few = gate_up.numel() <= _FEW_WEIGHTS and len(x) <= _FEW_ROWS
    return few and x.is_cpu and scale is None and x.dtype == torch.float32


def all_experts(
    x: Tensor,
    shared: Tensor,
    logits: Tensor,
    top_k: int,
    context_lens: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int,
) -> Tensor:
    """`moe_experts` behind `moe_route`, and `shared` [N, H] added, by two products with all experts' weights, where
    those that a row has not chosen weigh nothing. So an expert whose weights are not finite spoils every row."""
    weights, experts = _chosen(logits, top_k, context_lens)
    by_expert = weights.new_zeros(len(x), logits.shape[1] + 1).scatter_(1, experts, weights)
    by_expert = by_expert[:, first_expert : first_expert + len(gate_up), None]
    gate, up = F.linear(x, gate_up.flatten(0, 1)).view(len(x), *gate_up.shape[:2]).chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up).mul_(by_expert)
    return torch.addmm(shared, hidden.flatten(1), down.transpose(1, 2).flatten(0, 1))


def _by_expert(x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None, parts: int = 1) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of x times the transpose of weight[e]; other rows are zero. parts: how many
    pieces of a weight's rows have blocks of their own."""
    if x.is_cuda or scale is None:
        if scale is not None:  # experts in one product have x's type, to which they are rounded
            pairs = zip(weight.chunk(parts, dim=1), scale.chunk(parts, dim=1), strict=True)
            weight = torch.cat([dequantise(*pair).to(x.dtype) for pair in pairs], dim=1)
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
        if not x.is_cuda and int(offsets[-1]) == len(out):
            return out
        return out.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= offsets[-1], 0)
    # On the host the offsets cost nothing to read, and only experts with tokens are converted from FP8.
    bounds = offsets.tolist()
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        columns = out[start:end].chunk(parts, dim=1)
        pieces = zip(columns, weight[expert].chunk(parts), scale[expert].chunk(parts), strict=True)
        for column, part, part_scale in pieces:
            column.copy_(product(x[start:end], part, part_scale))
    return out
