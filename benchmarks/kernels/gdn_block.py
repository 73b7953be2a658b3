"""A decode layer's Gated DeltaNet mixer, from the residual sum on: one launch beside the three that it stands for."""

from collections.abc import Iterator

import torch

from tokenspeed.ops.gdn_block import GDN_BLOCK_ROWS, gdn_block_scratch

from ..cases import Case, Inputs, Sizes, operator_case
from .gated_delta_rule_decode import CONTEXT, DIM, EPS, KEY_HEADS, RING, TAPS

MODELS = (("0.8B", 1024, 16), ("2B", 2048, 16), ("35B-A3B", 2048, 32), ("4B", 2560, 32), ("27B", 5120, 48))
ON_GPU = ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 4), (GDN_BLOCK_ROWS, 1))  # sequences x tokens


def cases(sizes: Sizes) -> Iterator[Case]:
    """The ring half full; a copy on write stores as much as a fold. The first peer, torch, is the composition of this
    package's other operators, with their kernels."""
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
                yield operator_case(
                    "gdn_block",
                    f"{model}, {batch} x {tokens} tokens{', fold' if fold else ''}",
                    weights + state + 8 * batch * tokens * hidden,
                    layer,
                    ceiling="read",
                )
