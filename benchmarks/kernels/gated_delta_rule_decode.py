"""One decode step of a Gated DeltaNet mixer, with and without a fold of the update ring."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case, Inputs, Sizes, optional_peer, torch_implementation

KEY_HEADS, DIM, TAPS, RING, EPS = 16, 128, 4, 8, 1e-6
CONTEXT = 1000
_fla_recurrent = optional_peer("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")


def _fla(qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, *rest) -> Tensor:
    """The update alone: no convolution, no gates, no norm; the state is read and written."""
    state, contexts = rest[5], rest[9]
    batch, heads = len(contexts), state.shape[1]
    keys = KEY_HEADS * DIM
    q, k, v = (x.view(batch, -1, x.shape[1] // DIM, DIM) for x in qkv.split([keys, keys, heads * DIM], dim=1))
    g, beta = a.float().view(batch, -1, heads), b.view(batch, -1, heads)
    return _fla_recurrent(
        q,
        k,
        v,
        g,
        beta=beta,
        initial_state=state[:batch],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )[0]


def cases(sizes: Sizes) -> Iterator[Case]:
    """Value heads of the published models; the ring half full, and a fold (a copy on write stores as much as one)."""
    shapes = [(32, batch, 1) for batch in sizes.decode]
    if len(sizes.decode) > 1:
        shapes += [(16, 1, 1), (48, 1, 1), (64, 1, 1), (64, 64, 1), (32, 2, 1), (32, 16, 1), (32, 1, 4), (64, 64, 4)]
    for heads, batch, tokens in shapes:
        for fold in (False, True):

            def step(draw: Inputs, heads=heads, batch=batch, tokens=tokens, fold=fold) -> tuple:
                channels = (2 * KEY_HEADS + heads) * DIM
                widths = [channels, heads * DIM, heads, heads]
                projections = draw.randn(batch * tokens, sum(widths)).split(widths, dim=1)
                slots, pending = batch * (1 + fold), RING // 2
                ring = draw.randn(slots, RING, (KEY_HEADS + heads) * DIM + heads, dtype=torch.float32)
                ring[..., -heads:] = -ring[..., -heads:].abs()
                read = draw.integers(range(batch))
                return (
                    *projections,
                    draw.randn(channels, TAPS),
                    draw.randn(heads, dtype=torch.float32),
                    draw.randn(heads, dtype=torch.float32),
                    draw.randn(DIM),
                    EPS,
                    draw.randn(slots, heads, DIM, DIM, dtype=torch.float32),
                    ring,
                    draw.integers([[CONTEXT - pending] * heads] * slots),
                    draw.randn(slots, TAPS + tokens - 1, channels),
                    draw.integers([CONTEXT] * batch),
                    read,
                    draw.integers(range(batch, 2 * batch)) if fold else read,
                )

            state = batch * heads * DIM * DIM * 4
            updates = batch * (RING // 2 + (0 if fold else tokens)) * (KEY_HEADS + heads) * DIM * 4
            rows = batch * tokens * 2 * (2 * KEY_HEADS + 3 * heads) * DIM
            kind = "fold" if fold else "append"
            shape = f"{kind}, {KEY_HEADS}:{heads} heads, {batch} x {tokens} tokens"
            peers = {"flash-linear-attention, update alone": _fla if _fla_recurrent else None}
            size = state * (1 + fold) + updates + rows
            if fold and (heads, batch, tokens) == shapes[0]:
                peers["torch"] = torch_implementation("gated_delta_rule_decode")
            # Elsewhere without the torch implementation: it takes milliseconds, and it folds, which would leave the
            # kernel an empty ring.
            run = torch.ops.tokenspeed.gated_delta_rule_decode.default
            yield Case("gated_delta_rule_decode", shape, size, step, run, peers=peers)
