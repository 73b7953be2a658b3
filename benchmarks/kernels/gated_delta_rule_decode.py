"""One decode step of a Gated DeltaNet mixer, with and without a fold of the update ring."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import Case, Inputs, Sizes, optional_peer, torch_implementation, without_last

KEY_HEADS, DIM, TAPS, RING, EPS = 16, 128, 4, 8, 1e-6
CONTEXT = 1000
_fla_recurrent = optional_peer("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
_flashinfer_decode = optional_peer("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose")


class Given(NamedTuple):
    """What peers get besides the operator's arguments: all of it contiguous, [B, T, heads, D] and [B, T, heads]."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


def _given(qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, *rest) -> Given:
    batch, heads, keys = len(rest[9]), a.shape[1], KEY_HEADS * DIM
    parts = qkv.split([keys, keys, heads * DIM], dim=1)
    q, k, v = (x.reshape(batch, -1, x.shape[1] // DIM, DIM).contiguous() for x in parts)
    return Given(q, k, v, *(x.reshape(batch, -1, heads).contiguous() for x in (a, b)))


# The peers' updates have the gates and the norm of q and k, but no convolution and no norm of the output; they read the
# state and write it.
def _fla(qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, *rest) -> Tensor:
    a_log, dt_bias, state, given = rest[1], rest[2], rest[5], rest[-1]
    return _fla_recurrent(
        given.q,
        given.k,
        given.v,
        given.a,
        beta=given.b,
        initial_state=state[: len(given.q)],
        output_final_state=True,
        state_v_first=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=a_log,
        dt_bias=dt_bias,
    )[0]


def _flashinfer(qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, *rest) -> Tensor:
    a_log, dt_bias, state, read, given = rest[1], rest[2], rest[5], rest[10], rest[-1]
    tokens = given.q.shape[1]
    # One token goes through a batch of states, several tokens through slots of a pool.
    where: dict = {"initial_state": state, "initial_state_indices": read} if tokens > 1 else {}
    batch = None if tokens > 1 else state[: len(given.q)]
    where["output"] = torch.empty_like(given.v)
    return _flashinfer_decode(given.q, given.k, given.v, batch, a_log, given.a, dt_bias, given.b, **where)[0]


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
                arguments = (
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
                return *arguments, _given(*arguments)

            state = batch * heads * DIM * DIM * 4
            updates = batch * (RING // 2 + (0 if fold else tokens)) * (KEY_HEADS + heads) * DIM * 4
            rows = batch * tokens * 2 * (2 * KEY_HEADS + 3 * heads) * DIM
            kind = "fold" if fold else "append"
            shape = f"{kind}, {KEY_HEADS}:{heads} heads, {batch} x {tokens} tokens"
            peers: dict = {
                "flash-linear-attention, update alone": _fla if _fla_recurrent else None,
                "FlashInfer, update alone": _flashinfer if _flashinfer_decode else None,
            }
            size = state * (1 + fold) + updates + rows
            if fold and (heads, batch, tokens) == shapes[0]:
                peers["torch"] = without_last(torch_implementation("gated_delta_rule_decode"))
            # Elsewhere without the torch implementation: it takes milliseconds, and it folds, which would leave the
            # kernel an empty ring.
            run = without_last(torch.ops.tokenspeed.gated_delta_rule_decode.default)
            yield Case("gated_delta_rule_decode", shape, size, step, run, peers=peers)
