"""flash-linear-attention's functions of the gated delta rule, forward alone."""

import torch
from torch import Tensor

from .delta_rule import as_vk, check_normalised, check_shapes, gated_delta_rule, raw_gates


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_layout: str = "KV",
    max_seqlen: int | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule over whole sequences: as `fla.ops.gated_delta_rule.chunk_gated_delta_rule`.

    q, k: [B, T, H, K]; v: [B, T, HV, V], HV a multiple of H; g: [B, T, HV], log decay, at most 0; beta: [B, T, HV], in
    [0, 1]; scale: of q, None for 1 / sqrt(K); initial_state: [N, HV, K, V], which is left as it is, None for zeros;
    cu_seqlens: [N + 1] integers, where B is 1 and holds N packed sequences.
    Beyond FLA: state_layout "VK" for states [N, HV, V, K], which the kernel has, so nothing is transposed; max_seqlen:
    of the packed sequences, None for T; strict: raise where no compiled kernel serves the call.
    Returns [B, T, HV, V] of q's dtype, and the state after the last token, in fp32 and the layout asked for, or None.

    The kernel takes q, k, v in bf16, K = V = 128, up to 8 value heads for a key head, on a card of capability 9.0. What
    else there is, the torch implementation serves. There is no backward pass.
    Raises ValueError for shapes that do not fit and for use_qk_l2norm_in_kernel False (the operators always normalise
    q and k), `ops.NoKernel` under strict, RuntimeError for an argument that requires a gradient.
    """
    check_normalised(use_qk_l2norm_in_kernel, "use_qk_l2norm_in_kernel")
    batch, tokens, _, _ = q.shape
    heads = v.shape[2]
    check_shapes(g=(g, (batch, tokens, heads)), beta=(beta, (batch, tokens, heads)))
    if cu_seqlens is None:
        starts = torch.arange(0, (batch + 1) * tokens, max(tokens, 1), dtype=torch.int32, device=q.device)[: batch + 1]
    elif batch == 1:
        starts = cu_seqlens.int()
    else:
        raise ValueError(f"q has a batch of {batch} and cu_seqlens is given; packed sequences have a batch of 1.")
    a, b = (x.flatten(0, 1) for x in raw_gates(g, beta))
    zeros = torch.zeros(heads, dtype=torch.float32, device=q.device)
    out, state = gated_delta_rule(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        a,
        b,
        zeros,
        zeros,
        scale,
        None if initial_state is None else as_vk(initial_state, state_layout),
        starts,
        max_seqlen or tokens,
        strict,
    )
    return out.unflatten(0, (batch, tokens)), as_vk(state, state_layout).contiguous() if output_final_state else None


# flash-linear-attention's function for short sequences: arguments, errors and kernel are the same here. An engine that
# decodes is faster with `ops.gated_delta_rule_decode`, which has the whole mixer in it.
fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
