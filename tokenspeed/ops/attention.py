"""Gated attention over paged KV: the prologue that fills the pages, and prefill and decode that read them."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .fp8 import FP8, from_fp8, to_fp8
from .library import operator
from .norm import rms_norm
from .sequences import check_longest, check_pages, grid_of_tokens


@operator(fake=lambda x, cos_sin: torch.empty_like(x, memory_format=torch.contiguous_format))
def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head, in half-split pairs; the rest passes through.

    x: [N, heads, D]; cos_sin: [N, R] fp32, the cosines of the token's R / 2 angles, then the sines.
    Returns a contiguous [N, heads, D] of x's dtype. Formula: Su et al. 2021, half-split layout.
    """
    out = x.clone(memory_format=torch.contiguous_format)
    _turn(out, cos_sin)
    return out


def _turn(x: Tensor, cos_sin: Tensor) -> None:
    """`rope` in place of x."""
    width = cos_sin.shape[-1]
    part = x.narrow(-1, 0, width)
    first, second = part.unflatten(-1, (2, width // 2)).float().unbind(2)
    cos, sin = cos_sin.unflatten(-1, (2, 1, width // 2)).unbind(1)
    part.copy_(
        torch.cat([torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)], dim=-1)
    )


@operator(fake=lambda k, v, kv, kv_slots: None, mutates=("kv",))
def write_kv(k: Tensor, v: Tensor, kv: Tensor, kv_slots: Tensor) -> None:
    """Store keys and values of tokens into their pages.

    k, v: [N, kv_heads, D]; kv: [pages, 2, kv_heads, page, D], any page stride (one layer of the arena); kv_slots: [N]
    int64, page * page_size + row; a negative one stores nothing (padding, or a row that is already there). Pages may be
    of another type than k and v: e4m3 ones hold the nearest e4m3 number, ties to even, and +-448 for what is larger.
    Mutates kv.
    """
    _store(torch.stack([k, v], dim=1), kv, kv_slots)


def _store(values: Tensor, kv: Tensor, kv_slots: Tensor) -> None:
    """`write_kv` of keys and values [N, 2, kv_heads, D]."""
    if kv_slots.is_cuda or min(kv_slots.tolist(), default=-1) < 0:
        kept = (kv_slots >= 0).nonzero().squeeze(1)
        kv_slots, values = kv_slots[kept], values[kept]
    place = kv_slots // kv.shape[3], kv_slots % kv.shape[3]
    kv.permute(0, 3, 1, 2, 4).index_put_(place, to_fp8(values) if kv.dtype == FP8 else values.to(kv.dtype))


@operator(
    fake=lambda qkv, q_weight, k_weight, cos_sin, kv, kv_slots, eps: qkv.new_empty(
        qkv.shape[0], qkv.shape[1] // (2 * kv.shape[4]) - kv.shape[2], kv.shape[4]
    ),
    mutates=("kv",),
)
def attention_prologue(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor, kv: Tensor, kv_slots: Tensor, eps: float
) -> Tensor:
    """From the raw projection to rotated queries and stored keys and values, in one launch.

    qkv: [N, 2 q_heads D + 2 kv_heads D]: per query head D values of q and D of its gate, then the keys, then the
    values; there may be no query heads; q_weight, k_weight: [D], zero-centred norm weights; cos_sin: [N, R] as in
    `rope`; kv and kv_slots as in `write_kv`. Returns q, [N, q_heads, D], normalised and rotated; the gates stay where
    they are in qkv. Mutates kv.
    """
    kv_heads, head_dim = kv.shape[2], kv.shape[4]
    heads = qkv.unflatten(1, (qkv.shape[1] // head_dim, head_dim))
    q_heads = heads.shape[1] // 2 - kv_heads
    q_gate, k, v = torch.split_with_sizes(heads, [2 * q_heads, kv_heads, kv_heads], 1)
    # Queries and keys together: their norms differ in the weight alone.
    both = torch.cat([q_gate[:, ::2], k], dim=1)
    weight = torch.cat([q_weight.expand(q_heads, -1), k_weight.expand(kv_heads, -1)])
    both = rms_norm.__wrapped__(both, weight, eps)
    _turn(both, cos_sin)
    q, k = torch.split_with_sizes(both, [q_heads, kv_heads], 1)
    _store(torch.stack([k, v], dim=1), kv, kv_slots)
    return q.contiguous()


def _attend(
    q: Tensor, kv: Tensor, page_table: Tensor, context_lens: Tensor, ends: Tensor, scale: float, first_key: int = 0
) -> Tensor:
    """q: [B, q_heads, T, D] -> [B, q_heads, T, D]; token i of a sequence sees keys first_key .. context + i, below its
    end."""
    # Rows beyond the sequence may hold anything, NaN included, and 0 * NaN must not reach the sum.
    page_size, all_have = kv.shape[3], first_key
    longest = page_table.shape[1] * page_size
    if q.is_cpu:  # where reading a tensor costs nothing, few of them are left
        ends_here = ends.tolist()
        all_have, longest = max(first_key, min(ends_here)), min(longest, max(first_key + 1, *ends_here))
    heads = torch.arange(kv.shape[2], device=q.device).unsqueeze(1)
    part = torch.arange(2, device=q.device)[:, None, None, None]
    pages = page_table[:, None, : -(-longest // page_size)].clamp(min=0, max=len(kv) - 1)
    k_v = kv[pages, part, heads].flatten(3, 4)[..., first_key:longest, :]  # [2, B, kv_heads, keys, D]
    k_v = (from_fp8(k_v) if k_v.dtype == FP8 else k_v).to(q.dtype)
    position = torch.arange(first_key, longest, device=q.device)
    if all_have < longest:
        absent = position[all_have - first_key :] >= ends.unsqueeze(1)
        k_v[..., all_have - first_key :, :].masked_fill_(absent[:, None, :, None], 0)
    k, v = k_v.unbind(0)
    mask = None
    # First prompts alone: without a mask half of the products are left out.
    first = q.is_cpu and first_key == 0 and longest == q.shape[2] and not any(context_lens.tolist())
    if not first:
        last = context_lens.unsqueeze(1) + torch.arange(q.shape[2], device=q.device)
        mask = (position <= last.unsqueeze(-1)).unsqueeze(1)
    grouped = q.shape[1] > k.shape[1]
    # cuDNN keeps a plan for every length that it has seen, 2 MB of the process's memory each, for ever.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=first, scale=scale, enable_gqa=grouped)


def _gated(out: Tensor, gate: Tensor) -> Tensor:
    return (out * torch.sigmoid(gate)).flatten(1)


@operator(
    fake=lambda q, gate, kv, page_table, cu_seqlens, context_lens, max_seqlen, scale: q.new_empty(
        q.shape[0], q.shape[1] * q.shape[2]
    )
)
def paged_attention_prefill(
    q: Tensor,
    gate: Tensor,
    kv: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Causal attention of a packed batch of prefills over their pages, times the sigmoid of the output gate.

    q: [N, q_heads, D]; gate: the same shape, any strides; kv: [pages, 2, kv_heads, page, D], any page stride, this
    call's keys and values already stored, of q's dtype or e4m3; page_table: [B, P] int32, P pages suffice for every
    sequence, entries past a sequence's end are not read; cu_seqlens: [B + 1] int32; context_lens: [B] int32, tokens
    before this call; max_seqlen: no sequence of the batch is longer; scale: 1 / sqrt(D). Query head h reads kv head
    h // (q_heads / kv_heads). Returns [N, q_heads D] of q's dtype. Softmax in fp32 (Vaswani et al. 2017).
    """
    ends = context_lens + cu_seqlens.diff()
    check_longest(cu_seqlens, max_seqlen)
    check_pages(page_table, ends, kv.shape[3])
    if not len(q):
        return torch.empty_like(q.flatten(1))
    places = (kv, page_table, context_lens, ends, scale)
    if q.is_cpu and len(q) == len(ends) * max_seqlen:  # all of one length, as one prompt alone is
        alike = q.unflatten(0, (len(ends), max_seqlen)).transpose(1, 2)
        return _gated(_attend(alike, *places).transpose(1, 2).flatten(0, 1), gate)
    rows, valid = grid_of_tokens(cu_seqlens, torch.zeros_like(context_lens), max_seqlen)
    out = _attend(q[rows].transpose(1, 2), *places).transpose(1, 2)
    packed = torch.zeros_like(q, memory_format=torch.contiguous_format)
    packed[rows[valid]] = out[valid]
    return _gated(packed, gate)


@operator(
    fake=lambda q, gate, kv, page_table, context_lens, scale, first_key=0, settled=False: q.new_empty(
        q.shape[0], q.shape[1] * q.shape[2]
    ),
)
def paged_attention_decode(
    q: Tensor,
    gate: Tensor,
    kv: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    scale: float,
    first_key: int = 0,
    settled: bool = False,
) -> Tensor:
    """Attention of T >= 1 new tokens of each of B sequences over their pages, times the sigmoid of the output gate.

    q: [B T, q_heads, D], T consecutive tokens a sequence; the other arguments as in `paged_attention_prefill`.
    context_lens: [B] int32, tokens before this call; a negative one marks a padding row, whose output is zero;
    first_key: keys before it are not seen and may hold anything; below the page size and every context. Returns
    [B T, q_heads D] of q's dtype.

    settled: whoever wrote page_table, context_lens and a sequence's first context // page pages was done before the
    kernel ahead of this one on the stream began its work, as where that is `attention_prologue` of the same tokens:
    they may then be read while that one still runs. Nothing else depends on it.
    """
    batch, (heads, head_dim) = len(context_lens), q.shape[1:]
    if batch == 0:
        return q.new_empty(0, heads * head_dim)
    q = q.view(batch, -1, heads, head_dim).transpose(1, 2)
    padded = not (context_lens.is_cpu and min(context_lens.tolist()) >= 0)
    context = context_lens.clamp(min=0) if padded else context_lens
    ends = context + q.shape[2]
    check_pages(page_table, ends.masked_fill(context_lens < 0, 0) if padded else ends, kv.shape[3])
    out = _attend(q, kv, page_table, context, ends, scale, first_key)
    out = _gated(out.transpose(1, 2).flatten(0, 1), gate)
    if padded:
        out.view(batch, -1).masked_fill_((context_lens < 0)[:, None], 0)
    return out
