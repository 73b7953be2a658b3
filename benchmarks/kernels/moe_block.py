"""A layer's mixture of experts, from the residual sum on: at decode one launch beside the five that it stands for; at a
prefill in FP8 operators whose norm is quantised once, beside the same operators apart."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from tokenspeed.ops.fp8 import quantise_blocks
from tokenspeed.ops.moe_block import MOE_BLOCK_ROWS, moe_block_scratch

from ..cases import Case, Inputs, Sizes, operator_case
from .moe_experts import MODELS, ON_CPU, Weights

EPS = 1e-6


def cases(sizes: Sizes) -> Iterator[Case]:
    """Tokens choose experts at random: as many as they hit on the average. The first peer, torch, is the composition of
    this package's other operators, with their kernels."""
    on_gpu = len(sizes.decode) > 1
    for (model, experts, top_k, hidden, width), fp8 in product(MODELS if on_gpu else ON_CPU, (False, True)):
        held = Weights(experts, hidden, width, fp8)
        few = (1, 2, 4, MOE_BLOCK_ROWS) if on_gpu else sizes.decode
        for tokens in (*few, sizes.prefill) if fp8 else few:
            # Every set renames the experts that the first hits: other weights, but as many of them.
            generator = torch.Generator().manual_seed(tokens)
            logits = torch.randn(tokens, experts, generator=generator)
            hit = logits.topk(top_k).indices.unique().numel()

            def layer(draw: Inputs, logits: Tensor = logits, sizes=(experts, top_k, hidden, width), held=held) -> tuple:
                experts, top_k, hidden, width = sizes
                x, residual = draw.randn(len(logits), hidden), draw.randn(len(logits), hidden)
                total = (x + residual).float()
                normed = total * total.square().mean(1, keepdim=True).add(EPS).rsqrt()
                in_proj = draw.randn(2 * width + experts + 8, hidden).mul_(hidden**-0.5)
                if len(logits) <= MOE_BLOCK_ROWS:  # more tokens choose at random anyway
                    # The router's rows that give these tokens these logits, whatever their rows are otherwise.
                    renamed = logits[:, torch.randperm(experts)].to(draw.device)
                    router = torch.linalg.lstsq(normed.cpu(), renamed.cpu()).solution.T
                    in_proj[2 * width : 2 * width + experts] = router.to(in_proj)
                shared_down = draw.randn(hidden, width).mul_(width**-0.5)
                scratch = draw.integers([0] * moe_block_scratch(experts, top_k, hidden))
                norm_weight = draw.randn(hidden).mul_(1e-3)
                stream = (x, residual, norm_weight, EPS)
                if not held.fp8:
                    gate_up, down = held.draw(draw)
                    return *stream, in_proj, experts, top_k, gate_up, down, shared_down, scratch
                gate_up, gate_up_scale, down, down_scale = held.draw(draw)
                (shared, in_scale), (shared_down, shared_scale) = map(
                    quantise_blocks, (in_proj[: 2 * width], shared_down)
                )
                weights = (shared, experts, top_k, gate_up, down, shared_down, scratch, 0, in_proj[2 * width :])
                return *stream, *weights, in_scale, gate_up_scale, down_scale, shared_scale

            per_weight = 1 if fp8 else 2
            yield operator_case(
                "moe_block",
                f"{model}, {tokens} tokens, {hit} experts" + ", e4m3" * fp8,
                hidden * (per_weight * 3 * (hit + 1) * width + 2 * (experts + 8 + 4 * tokens)),
                layer,
                flops=2 * tokens * hidden * (3 * (top_k + 1) * width + experts),
                ceiling="read" if tokens in few else "matmul",
            )
