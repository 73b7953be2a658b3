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
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


@operator(fake=lambda k, v, kv, kv_slots: None, mutates=("kv",))
def write_kv(k: Tensor, v: Tensor, kv: Tensor, kv_slots: Tensor) -> None:
    """Store keys and values of tokens into their pages.

    k, v: [N, kv_heads, D]; kv: [pages, 2, kv_heads, page, D], any page stride (one layer of the arena); kv_slots: [N]
    int64, page * page_size + row; a negative one stores nothing (padding, or a row that is already there). Pages may be
    of another type than k and v: e4m3 ones hold the nearest e4m3 number, ties to even, and +-448 for what is larger.
    Mutates kv.
    """
    page_size = kv.shape[3]
    kept = (kv_slots >= 0).nonzero().squeeze(1)
    slots = kv_slots[kept]
    page, row = slots // page_size, slots % page_size
    for part, values in enumerate((k[kept], v[kept])):
        kv[page, part, :, row] = to_fp8(values) if kv.dtype == FP8 else values.to(kv.dtype)


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
    q_gate, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    q = q_gate.unflatten(1, (q_gate.shape[1] // (2 * head_dim), 2, head_dim))[:, :, 0]
    k, v = k.unflatten(1, (kv_heads, head_dim)), v.unflatten(1, (kv_heads, head_dim))
    k = rope.__wrapped__(rms_norm.__wrapped__(k, k_weight, eps), cos_sin)
    write_kv.__wrapped__(k, v, kv, kv_slots)
    return rope.__wrapped__(rms_norm.__wrapped__(q, q_weight, eps), cos_sin)


def _attend(
    q: Tensor, kv: Tensor, page_table: Tensor, context_lens: Tensor, ends: Tensor, scale: float, first_key: int = 0
) -> Tensor:
    """q: [B, q_heads, T, D] -> [B, q_heads, T, D]; token i of a sequence sees keys first_key .. context + i, below its
    end."""
    position = torch.arange(page_table.shape[1] * kv.shape[3], device=q.device)
    last = context_lens[:, None].long() + torch.arange(q.shape[2], device=q.device)
    visible = ((position >= first_key) & (position <= last[..., None]))[:, None]
    # Rows beyond the sequence may hold anything, NaN included, and 0 * NaN must not reach the sum: the sequence's first
    # row, which is there and is finite, stands in for them.
    existing = torch.where(position < ends[:, None], position.clamp(min=first_key), first_key)
    page = page_table.clamp(min=0, max=len(kv) - 1).long().gather(1, existing // kv.shape[3])[:, None]
    head = torch.arange(kv.shape[2], device=q.device)[:, None]
    row = (existing % kv.shape[3])[:, None]
    k, v = (kv[page, part, head, row] for part in range(2))  # [B, kv_heads, keys, D]
    k, v = ((from_fp8(x) if x.dtype == FP8 else x).to(q.dtype) for x in (k, v))
    # cuDNN keeps a plan for every length that it has seen, 2 MB of the process's memory each, for ever.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)


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
    first = torch.zeros_like(context_lens)
    ends = context_lens + cu_seqlens.diff()
    check_longest(cu_seqlens, max_seqlen)
    check_pages(page_table, ends, kv.shape[3])
    rows, valid = grid_of_tokens(cu_seqlens, first, max_seqlen)
    out = _attend(q[rows].transpose(1, 2), kv, page_table, context_lens, ends, scale).transpose(1, 2)
    packed = torch.zeros_like(q, memory_format=torch.contiguous_format)
    packed[rows[valid]] = out[valid]
    return _gated(packed, gate)


@operator(
    fake=lambda q, gate, kv, page_table, context_lens, scale, first_key=0: q.new_empty(
        q.shape[0], q.shape[1] * q.shape[2]
    ),
)
def paged_attention_decode(
    q: Tensor, gate: Tensor, kv: Tensor, page_table: Tensor, context_lens: Tensor, scale: float, first_key: int = 0
) -> Tensor:
    """Attention of T >= 1 new tokens of each of B sequences over their pages, times the sigmoid of the output gate.

    q: [B T, q_heads, D], T consecutive tokens a sequence; the other arguments as in `paged_attention_prefill`.
    context_lens: [B] int32, tokens before this call; a negative one marks a padding row, whose output is zero;
    first_key: keys before it are not seen and may hold anything; below the page size and every context. Returns
    [B T, q_heads D] of q's dtype.
    """
    batch, (heads, head_dim) = len(context_lens), q.shape[1:]
    if batch == 0:
        return q.new_empty(0, heads * head_dim)
    q = q.view(batch, -1, heads, head_dim).transpose(1, 2)
    context = context_lens.clamp(min=0)
    check_pages(page_table, (context + q.shape[2]).masked_fill(context_lens < 0, 0), kv.shape[3])
    out = _attend(q, kv, page_table, context, context + q.shape[2], scale, first_key)
    out = _gated(out.transpose(1, 2).flatten(0, 1), gate)
    return out.view(batch, -1, heads * head_dim).masked_fill_((context_lens < 0)[:, None, None], 0).flatten(0, 1)
