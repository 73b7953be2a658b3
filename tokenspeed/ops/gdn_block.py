"""The Gated DeltaNet mixer of a decode layer as one operator."""

import torch
from torch import Tensor

from .delta_rule import gated_delta_rule_decode
from .library import operator
from .linear import add_rms_norm_linear, linear

GDN_BLOCK_ROWS = 8  # that the kernel of `gdn_block` serves
_MAX_BLOCKS = 512
_TILE = 16


def gdn_block_scratch(projections: int, values: int) -> int:
    """How many int32 `gdn_block` wants for scratch, with P rows of in_proj and V columns of out_proj: numbers of
    launches, and what blocks tell others in 8 bytes each."""
    pairs = -(-projections // _TILE) * _TILE // 2
    return 2 * _MAX_BLOCKS + 2 * GDN_BLOCK_ROWS * (pairs + values // _TILE)


def _block_fake(x, residual, *others):
    return torch.empty_like(residual), torch.empty_like(residual)


@operator(fake=_block_fake, mutates=("state", "ring", "cursor", "window", "scratch"))
def gdn_block(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    in_proj: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    gated_norm_weight: Tensor,
    state: Tensor,
    ring: Tensor,
    cursor: Tensor,
    window: Tensor,
    context_lens: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    out_proj: Tensor,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """The Gated DeltaNet mixer of a decode layer, from the residual sum to the output projection, in one launch.

    x, residual: [B T, H], T consecutive tokens of each of B sequences; norm_weight: [H]; eps: of both norms; in_proj:
    [P, H], rows of q, k, v, z, b and a, and it may have more; conv_weight, a_log, dt_bias, gated_norm_weight, state,
    ring, cursor, window, context_lens, read_slot, write_slot: as in `gated_delta_rule_decode`; out_proj: [H, V], V = nv
    dv. Weights may be read before the kernel ahead on the stream is complete.
    Returns the projected output and the residual sum, both [B T, H]: of `add_rms_norm_linear`,
    `gated_delta_rule_decode` and `linear`, of which this is made where no kernel serves the call (more than
    GDN_BLOCK_ROWS rows or four tokens a sequence, for two).
    Mutates state, ring, cursor and window as `gated_delta_rule_decode` does, and scratch, [gdn_block_scratch(P, V)]
    int32: zeros at first, then what the last call left, whatever its sizes. Calls that may run at the same time need
    one of their own each. Raises ValueError where it is too short.
    """
    wanted = gdn_block_scratch(len(in_proj), out_proj.shape[1])
    if len(scratch) < wanted:
        raise ValueError(f"scratch has {len(scratch)} elements; {tuple(in_proj.shape)} in_proj wants {wanted}")
    channels, values, heads = len(conv_weight), out_proj.shape[1], state.shape[1]
    projected, _, total = add_rms_norm_linear(x, residual, norm_weight, eps, in_proj)
    qkv, z, b, a = projected[:, : channels + values + 2 * heads].split([channels, values, heads, heads], dim=1)
    gates, record = (a_log, dt_bias, gated_norm_weight, eps), (state, ring, cursor, window)
    y = gated_delta_rule_decode(qkv, z, a, b, conv_weight, *gates, *record, context_lens, read_slot, write_slot)
    scratch[:_MAX_BLOCKS] += 1  # each block of the kernel counts calls
    return linear(y, out_proj), total
