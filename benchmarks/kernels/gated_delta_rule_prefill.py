"""The chunked gated delta rule over prefills."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case, Inputs, Sizes, optional_peer, torch_implementation, without_last

KEY_HEADS, DIM = 16, 128
CONTEXT = 640  # tokens before the call: a state is read, and chunks are whole
_fla_chunk = optional_peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
_flashinfer_chunk = optional_peer("flashinfer.gdn_prefill", "chunk_gated_delta_rule")
_flash_qla_chunk = optional_peer("flash_qla", "chunk_gated_delta_rule")


class Given(NamedTuple):
    """What peers get besides the operator's arguments: contiguous q, k, v [T, heads, D], q and k of norm 1, the decay
    and its logarithm, beta."""

    q: Tensor
    k: Tensor
    v: Tensor
    unit_q: Tensor
    unit_k: Tensor
    alpha: Tensor
    g: Tensor
    beta: Tensor


def _given(qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rest) -> Given:
    keys = KEY_HEADS * DIM
    parts = qkv.split([keys, keys, state.shape[1] * DIM], dim=1)
    q, k, v = (x.unflatten(1, (-1, DIM)).contiguous() for x in parts)
    unit_q, unit_k = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
    g = -a_log.exp() * F.softplus(a.float() + dt_bias)
    return Given(q, k, v, unit_q, unit_k, g.exp(), g, b.float().sigmoid())


def _fla(qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rest) -> Tensor:
    """The same work from contiguous q, k, v; equal lengths make a batch of it, so nothing is listed on the host."""
    batch, given = len(rest[3]), rest[-1]
    return _fla_chunk(
        *(x.unflatten(0, (batch, -1)) for x in given[:3]),
        a.unflatten(0, (batch, -1)),
        b.unflatten(0, (batch, -1)),
        initial_state=state[:batch],
        output_final_state=True,
        state_v_first=True,
        use_qk_l2norm_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=a_log,
        dt_bias=dt_bias,
    )[0]


def _flashinfer(qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rest) -> Tensor:
    """With the norm of q and k, without the gates."""
    starts, contexts, given = rest[2], rest[3], rest[-1]
    return _flashinfer_chunk(
        given.q,
        given.k,
        given.v,
        given.alpha,
        given.beta,
        initial_state=state[: len(contexts)],
        output_final_state=True,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=True,
        max_seqlen=rest[-2],
    )[0]


def _flash_qla(qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, *rest) -> Tensor:
    """Without the norm of q and k and without the gates."""
    batch, given = len(rest[3]), rest[-1]
    return _flash_qla_chunk(
        *(x.unflatten(0, (batch, -1)) for x in (given.unit_q, given.unit_k, given.v, given.g, given.beta)),
        initial_state=state[:batch],
        output_final_state=True,
        state_v_first=True,
    )[0]


def cases(sizes: Sizes) -> Iterator[Case]:
    """Short and long prompts of one sequence, then batches, at the value heads of the published models."""
    tokens = sizes.prefill
    shapes = [(32, 1, tokens // 4), (32, 1, tokens), (32, 1, 4 * tokens), (64, 1, tokens), (64, 4, tokens)]
    shapes += [(16, 1, tokens), (48, 1, tokens), (32, 16, tokens // 64)]
    for heads, batch, length in shapes:
        for snapshots in (0, 1) if (heads, batch, length) == shapes[1] else (0,):

            def prefill(draw: Inputs, heads=heads, batch=batch, length=length, snapshots=snapshots) -> tuple:
                slots = draw.integers(range(batch))
                arguments = (
                    draw.randn(batch * length, (2 * KEY_HEADS + heads) * DIM),
                    draw.randn(batch * length, heads),
                    draw.randn(batch * length, heads),
                    draw.randn(heads, dtype=torch.float32),
                    draw.randn(heads, dtype=torch.float32),
                    draw.randn(batch + snapshots, heads, DIM, DIM, dtype=torch.float32),
                    draw.randn(batch + snapshots, 8, (KEY_HEADS + heads) * DIM + heads, dtype=torch.float32),
                    draw.integers([[CONTEXT] * heads] * (batch + snapshots)),
                    draw.integers([i * length for i in range(batch + 1)]),
                    draw.integers([CONTEXT] * batch),
                    slots,
                    slots,
                    draw.integers([(0, CONTEXT + length // 2 - 5, batch)] * snapshots).reshape(-1, 3),
                    length,
                )
                return *arguments, _given(*arguments)

            rows = batch * length * (2 * KEY_HEADS + 2 * heads) * DIM * 2 + batch * length * heads * 4
            states = (2 * batch + snapshots) * heads * DIM * DIM * 4
            # Per token and head: products with the state three times, with the chunk's A and P, and k k^T, q k^T.
            flops = batch * length * heads * 2 * (3 * DIM * DIM + 2 * 64 * DIM + 2 * 64 * DIM)
            shape = f"{KEY_HEADS}:{heads} heads, {batch} x {length} tokens" + (", 1 snapshot" if snapshots else "")
            peers: dict = {
                "flash-linear-attention": _fla if _fla_chunk else None,
                "FlashInfer, gates given": _flashinfer if _flashinfer_chunk else None,
                "FlashQLA, gates and norms given": _flash_qla if _flash_qla_chunk else None,
            }
            if (heads, batch, length) == shapes[0]:  # elsewhere it takes tens of milliseconds
                peers["torch"] = without_last(torch_implementation("gated_delta_rule_prefill"))
            run = without_last(torch.ops.tokenspeed.gated_delta_rule_prefill.default)
            yield Case(
                "gated_delta_rule_prefill",
                shape,
                rows + states,
                prefill,
                run,
                flops=flops,
                peers=peers,
                ceiling="matmul",
            )
