"""What `fla` and `flashinfer` share: the gated delta rule over tensors of a caller, by `gated_delta_rule_prefill`."""

import contextlib

import torch
from torch import Tensor

from .. import ops
from ..ops.sequences import CHUNK

STARTED = CHUNK  # tokens before a call that brings a state: chunks of 64 begin with the call


def check_shapes(**tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises ValueError for a tensor of another shape than the one beside it."""
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}.")


def check_normalised(use_qk_l2norm: bool, name: str) -> None:
    if not use_qk_l2norm:
        raise ValueError(
            f"{name} is False, and the operators always normalise q and k: pass True, and q and k as they are."
        )


def raw_gates(g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The projections a and b, in fp32, that the operators turn into g and beta with a_log and dt_bias of zero:
    `g = -softplus(a)`, `beta = sigmoid(b)`. g: log decay, held to -100 .. -1e-20, which are
    decays of 0 and 1 in fp32; beta: in [0, 1]."""
    g, beta = g.float().clamp(-100, -1e-20), beta.float()
    return (-torch.expm1(g)).log() - g, torch.logit(beta)


def as_vk(state: Tensor, layout: str) -> Tensor:
    """A state [..., K, V] or [..., V, K] as [..., V, K], a view."""
    if layout not in ("KV", "VK"):
        raise ValueError(f"state layout is {layout!r}; it must be 'KV' or 'VK'.")
    return state.transpose(-1, -2) if layout == "KV" else state


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    """The rule over packed sequences. q, k: [N, nk, dk]; v: [N, nv, dv]; a, b: [N, nv], of q's dtype or fp32; a_log,
    dt_bias: [nv] fp32; initial_state: [B, nv, dv, dk] of any dtype and strides, None for zeros; cu_seqlens: [B + 1]
    int32; strict: raise NoKernel where no kernel serves the call. Returns [N, nv, dv] of q's dtype, and the state after
    the last token of each sequence, [B, nv, dv, dk] fp32, contiguous.

    Raises ValueError for shapes that do not fit, NoKernel as said.
    """
    (tokens, nk, dk), (nv, dv), batch = q.shape, v.shape[1:], len(cu_seqlens) - 1
    check_shapes(k=(k, (tokens, nk, dk)), v=(v, (tokens, nv, dv)), a=(a, (tokens, nv)), b=(b, (tokens, nv)))
    if nv % nk:
        raise ValueError(f"v has {nv} heads and k has {nk}; the first must be a multiple of the second.")
    state = torch.empty(batch, nv, dv, dk, dtype=torch.float32, device=q.device)
    context = 0
    if initial_state is not None:
        check_shapes(initial_state=(initial_state, tuple(state.shape)))
        state.copy_(initial_state)
        context = STARTED
    ring = state.new_empty(batch, 0, nk * dk + nv * dv + nv)
    cursor = torch.full((batch, nv), context, dtype=torch.int32, device=q.device)
    context_lens = torch.full((batch,), context, dtype=torch.int32, device=q.device)
    slots = torch.arange(batch, dtype=torch.int32, device=q.device)
    no_snapshots = torch.empty(0, 3, dtype=torch.int32, device=q.device)
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    with ops.strict() if strict else contextlib.nullcontext():
        out = ops.gated_delta_rule_prefill(
            qkv,
            a,
            b,
            a_log,
            dt_bias,
            state,
            ring,
            cursor,
            cu_seqlens,
            context_lens,
            slots,
            slots,
            no_snapshots,
            max_seqlen,
        )
    if scale is not None and scale != dk**-0.5:
        out = out * (scale * dk**0.5)
    return out, state
