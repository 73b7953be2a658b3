"""A dense decode layer's feed-forward, from the residual sum on: one launch beside the two that it stands for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed.ops.ffn_block import FFN_BLOCK_ROWS, ffn_block_scratch

from ..cases import Case, Inputs, Sizes

EPS = 1e-6
MODELS = (("0.8B", 1024, 3584), ("2B", 2048, 6144), ("4B", 2560, 9216), ("9B", 4096, 12288), ("27B", 5120, 17408))
ON_CPU = (("small", 128, 192),)


def apart(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor, down: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """What the model runs past FFN_BLOCK_BYTES, with the operators' kernels."""
    operators = torch.ops.tokenspeed
    projected, _, total = operators.add_rms_norm_linear(x, residual, norm_weight, eps, gate_up)
    return operators.silu_mul_linear(projected, down), total


def cases(sizes: Sizes) -> Iterator[Case]:
    """Calls follow each other in one graph, so each fills its ring beside the one before, as in a decode step."""
    on_gpu = len(sizes.decode) > 1
    for model, hidden, width in MODELS if on_gpu else ON_CPU:
        for tokens in (1, 2, 4, FFN_BLOCK_ROWS) if on_gpu else sizes.decode:

            def layer(draw: Inputs, tokens=tokens, hidden=hidden, width=width) -> tuple:
                stream = (draw.randn(tokens, hidden), draw.randn(tokens, hidden), draw.randn(hidden) * 0.1, EPS)
                gate_up = draw.randn(2 * width, hidden).mul_(hidden**-0.5)
                down = draw.randn(hidden, width).mul_(width**-0.5)
                return *stream, gate_up, down, draw.integers([0] * ffn_block_scratch(width))

            yield Case(
                "ffn_block",
                f"{model}, {tokens} tokens, {6 * hidden * width / 1e6:.0f} MB",
                2 * hidden * (3 * width + 4 * tokens),
                layer,
                torch.ops.tokenspeed.ffn_block.default,
                peers={"its operators apart": apart},
                ceiling="read",
            )
