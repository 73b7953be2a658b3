"""FlashInfer's functions of the gated delta rule."""

import torch
from torch import Tensor

from .delta_rule import as_vk, check_normalised, check_shapes, gated_delta_rule, raw_gates


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Tensor | None = None,
    output_state: Tensor | None = None,
    *,
    max_seqlen: int | None = None,
    strict: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A prefill of packed sequences: as `flashinfer.gdn_prefill.chunk_gated_delta_rule`.

    q, k: [N, H, K]; v: [N, HV, V], HV a multiple of H; g: [N, HV] fp32, the decay itself (alpha, in (0, 1]), None for
    ones; beta: [N, HV] fp32, None for ones; initial_state: [B, HV, V, K], which is left as it is; cu_seqlens: [B + 1]
    integers; output, output_state: where results go, None for fresh memory. Beyond FlashInfer: max_seqlen, of one
    sequence, None for N; strict: raise where no compiled kernel serves the call.
    Returns [N, HV, V], and with output_final_state the state after each sequence's last token, [B, HV, V, K] fp32.

    The kernel's preconditions are those of `fla.chunk_gated_delta_rule`.
    Raises ValueError for shapes that do not fit, without cu_seqlens, and for use_qk_l2norm_in_kernel False;
    `ops.NoKernel` under strict.
    """
    check_normalised(use_qk_l2norm_in_kernel, "use_qk_l2norm_in_kernel")
    if cu_seqlens is None:
        raise ValueError("cu_seqlens is None; it must be the starts of the packed sequences and their end.")
    tokens, heads = v.shape[:2]
    g = q.new_ones(tokens, heads, dtype=torch.float32) if g is None else g
    beta = q.new_ones(tokens, heads, dtype=torch.float32) if beta is None else beta
    check_shapes(g=(g, (tokens, heads)), beta=(beta, (tokens, heads)))
    a, b = raw_gates(g.float().log(), beta)
    zeros = torch.zeros(heads, dtype=torch.float32, device=q.device)
    out, state = gated_delta_rule(
        q, k, v, a, b, zeros, zeros, scale, initial_state, cu_seqlens.int(), max_seqlen or tokens, strict
    )
    out = out if output is None else output.copy_(out)
    state = state if output_state is None else output_state.copy_(state)
    return (out, state) if output_final_state else out


def gated_delta_rule_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    *,
    state_layout: str = "KV",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens of each sequence, after its state: as `flashinfer.gdn_decode.gated_delta_rule_decode`.

    q, k: [B, T, H, K]; v: [B, T, HV, V]; state: [B, HV, K, V], or [B, HV, V, K] with state_layout "VK"; A_log,
    dt_bias: [HV]; a, b: [B, T, HV], raw projections; output: where the result goes, None for fresh memory; strict:
    raise where no compiled kernel serves the call. Returns [B, T, HV, V] of q's dtype, and state.
    Mutates state, and output where it is given.

    Raises ValueError for shapes that do not fit and for use_qk_l2norm False; `ops.NoKernel` under strict.
    """
    check_normalised(use_qk_l2norm, "use_qk_l2norm")
    batch, tokens = q.shape[:2]
    check_shapes(a=(a, (batch, tokens, v.shape[2])), b=(b, (batch, tokens, v.shape[2])))
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    own = as_vk(state, state_layout)
    q, k, v, a, b = (x.flatten(0, 1) for x in (q, k, v, a, b))
    out, after = gated_delta_rule(q, k, v, a, b, A_log.float(), dt_bias.float(), scale, own, starts, tokens, strict)
    own.copy_(after)
    out = out.unflatten(0, (batch, tokens))
    return (out if output is None else output.copy_(out)), state


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose`: `gated_delta_rule_decode` with a state
    [B, HV, V, K]; arguments, mutation and errors alike."""
    return gated_delta_rule_decode(
        q, k, v, state, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, state_layout="VK", strict=strict
    )
