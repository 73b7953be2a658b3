"""A decode layer's mixture of experts, from the residual sum on: one launch beside the five that it stands for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed.ops.moe_block import MOE_BLOCK_ROWS, moe_block_scratch

from ..cases import Case, Inputs, Sizes, operator_case
from .moe_experts import MODELS, ON_CPU, Weights

EPS = 1e-6


def cases(sizes: Sizes) -> Iterator[Case]:
    """Tokens choose experts at random: as many as they hit on the average. The first peer, torch, is the composition of
    this package's other operators, with their kernels."""
    on_gpu = len(sizes.decode) > 1
    for model, experts, top_k, hidden, width in MODELS if on_gpu else ON_CPU:
        held = Weights(experts, hidden, width)
        for tokens in (1, 2, 4, MOE_BLOCK_ROWS) if on_gpu else sizes.decode:
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
                # The router's rows that give these tokens these logits, whatever their rows are otherwise.
                renamed = logits[:, torch.randperm(experts)].to(draw.device)
                router = torch.linalg.lstsq(normed.cpu(), renamed.cpu()).solution.T
                in_proj[2 * width : 2 * width + experts] = router.to(in_proj)
                shared_down = draw.randn(hidden, width).mul_(width**-0.5)
                scratch = draw.integers([0] * moe_block_scratch(experts, top_k, hidden))
                norm_weight = draw.randn(hidden).mul_(1e-3)
                gate_up, down = held.draw(draw)
                stream = (x, residual, norm_weight, EPS)
                return *stream, in_proj, experts, top_k, gate_up, down, shared_down, scratch

            dense = 2 * width + experts + 8 + width
            yield operator_case(
                "moe_block",
                f"{model}, {tokens} tokens, {hit} experts",
                2 * hidden * (3 * hit * width + dense + 4 * tokens),
                layer,
                ceiling="read",
            )
