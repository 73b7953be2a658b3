"""A decode layer's Gated DeltaNet mixer, from the residual sum on: one launch beside the three that it stands for."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed import ops
from tokenspeed.ops.gdn_block import GDN_BLOCK_ROWS, gdn_block_scratch

from ..cases import Case, Inputs, Sizes
from .gated_delta_rule_decode import CONTEXT, DIM, EPS, KEY_HEADS, RING, TAPS

MODELS = (("0.8B", 1024, 16), ("2B", 2048, 16), ("35B-A3B", 2048, 32), ("4B", 2560, 32), ("27B", 5120, 48))
ON_GPU = ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 4), (GDN_BLOCK_ROWS, 1))  # sequences x tokens


def _apart(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, in_proj: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    """The three operators, with their kernels: what torch's implementation is, but for the scratch."""
    *weights, gated_norm, state, ring, cursor, window, contexts, reads, writes, out_proj, _ = rest
    channels, values, heads = len(weights[0]), out_proj.shape[1], state.shape[1]
    projected, _, total = ops.add_rms_norm_linear(x, residual, norm_weight, eps, in_proj)
    qkv, z, b, a = projected.split([channels, values, heads, heads], dim=1)
    record = (state, ring, cursor, window, contexts, reads, writes)
    y = ops.gated_delta_rule_decode(qkv, z, a, b, *weights, gated_norm, eps, *record)
    return ops.linear(y, out_proj), total


def cases(sizes: Sizes) -> Iterator[Case]:
    """The ring half full; a copy on write stores as much as a fold."""
    on_gpu = len(sizes.decode) > 1
    models = [(name, KEY_HEADS, hidden, heads) for name, hidden, heads in MODELS] if on_gpu else [("tiny", 1, 128, 2)]
    for model, keys, hidden, heads in models:
        for batch, tokens in ON_GPU if on_gpu else ((1, 1),):
            for fold in (False, True) if batch * tokens == 1 else (False,):

                def layer(draw: Inputs, keys=keys, hidden=hidden, heads=heads, batch=batch, tokens=tokens, fold=fold):
                    channels, values, slots = (2 * keys + heads) * DIM, heads * DIM, batch * (1 + fold)
                    projections = channels + values + 2 * heads
                    stream = (draw.randn(batch * tokens, hidden), draw.randn(batch * tokens, hidden))
                    ring = draw.randn(slots, RING, (keys + heads) * DIM + heads, dtype=torch.float32)
                    ring[..., -heads:] = -ring[..., -heads:].abs()
                    read = draw.integers(range(batch))
                    return (
                        *(*stream, draw.randn(hidden).mul_(0.1), EPS),
                        draw.randn(projections, hidden).mul_(hidden**-0.5),
                        draw.randn(channels, TAPS),
                        draw.randn(heads, dtype=torch.float32),
                        draw.randn(heads, dtype=torch.float32),
                        draw.randn(DIM),
                        draw.randn(slots, heads, DIM, DIM, dtype=torch.float32),
                        ring,
                        draw.integers([[CONTEXT - RING // 2] * heads] * slots),
                        draw.randn(slots, TAPS + tokens - 1, channels),
                        draw.integers([CONTEXT] * batch),
                        read,
                        draw.integers(range(batch, 2 * batch)) if fold else read,
                        draw.randn(hidden, values).mul_(values**-0.5),
                        draw.integers([0] * gdn_block_scratch(projections, values)),
                    )

                channels, values = (2 * keys + heads) * DIM, heads * DIM
                weights = 2 * hidden * (channels + 2 * values + 2 * heads)
                state = batch * heads * DIM * DIM * 4 * (1 + fold)
                yield Case(
                    "gdn_block",
                    f"{model}, {batch} x {tokens} tokens{', fold' if fold else ''}",
                    weights + state + 8 * batch * tokens * hidden,
                    layer,
                    torch.ops.tokenspeed.gdn_block.default,
                    peers={"its operators apart": _apart},
                    ceiling="read",
                )
