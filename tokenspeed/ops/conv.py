"""Depthwise causal convolution over ragged prefills, with its window kept in the state slot."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator
from .sequences import check_slots, snapshot_rows


def conv_history(window: Tensor, slots: Tensor, context_lens: Tensor, taps: int) -> Tensor:
    """The `taps - 1` inputs before each sequence's next token, zero before its first token.

    window: [slots, W, C], the ring in which token t stands at entry t % W. Returns [B, taps - 1, C].
    """
    tokens = context_lens[:, None].long() - torch.arange(taps - 1, 0, -1, device=window.device)
    history = window[slots.clamp(min=0).long()[:, None], tokens.remainder(window.shape[1])]
    return history.masked_fill_((tokens < 0)[..., None], 0)


def _like_input(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(fake=_like_input, mutates=("window",))
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    window: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    read_slot: Tensor,
    write_slot: Tensor,
    snapshots: Tensor,
) -> Tensor:
    """`silu(sum_i weight[c, i] x[t - taps + 1 + i, c])` for every token of a packed batch of prefills.

    x: [N, C], any row stride; weight: [C, taps]; window: [slots, W, C] of x's dtype, W >= taps, the ring in which the
    input of token t stands at entry t % W; cu_seqlens: [B + 1] int32; context_lens: [B] int32, tokens before this
    call, 0 for a sequence that starts here (its read slot is not read); read_slot, write_slot: [B] int32, equal for an
    update in place, a negative write slot stores nothing; snapshots: [M, 3] int32 rows of (sequence, token count,
    slot), context < count <= end, a negative slot is padding. Returns [N, C] of x's dtype.
    Mutates window: after the call each write slot holds the last W inputs, each snapshot slot those at its count.
    Formula: the short convolution of Gated DeltaNet (Yang et al. 2024).
    """
    check_slots(write_slot, snapshots)
    tokens, taps = x.shape[0], weight.shape[1]
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    rows = lengths.tolist() or [0]
    rows[-1] += tokens - sum(rows)  # of padding, behind the last sequence
    # Each sequence is preceded by its history, so that one shifted sum serves all of them.
    history = conv_history(window, read_slot, context_lens, taps)
    history = history if len(history) else x.new_zeros(1, taps - 1, x.shape[1])
    padded = torch.cat([part for pair in zip(history, x.split(rows), strict=True) for part in pair]).float()
    by_tap, count = weight.float().t().contiguous(), len(padded) - taps + 1
    summed = padded[:count] * by_tap[0]
    for tap in range(1, taps):
        summed.addcmul_(padded[tap : tap + count], by_tap[tap])
    wanted = F.silu(summed, inplace=True).split([part for length in rows for part in (length, taps - 1)][:-1])[::2]
    out = torch.cat(wanted).to(x.dtype)

    snapshot_sequence, snapshot_count, snapshot_slot = snapshot_rows(snapshots)
    kept = (write_slot >= 0).nonzero().squeeze(1)
    owner = torch.cat([kept, snapshot_sequence])
    end = torch.cat([(context_lens + lengths).long()[kept], snapshot_count])[:, None]
    entry = torch.arange(window.shape[1], device=x.device)
    token = end - 1 - (end - 1 - entry).remainder(window.shape[1])  # the latest token before `end` at this entry
    new = token - context_lens.long()[owner, None]
    source = x if tokens else x.new_zeros(1, x.shape[1])  # something to gather from where there is only padding
    from_input = source[(starts[owner, None] + new).clamp(min=0, max=len(source) - 1)]
    from_window = window[read_slot.clamp(min=0).long()[owner, None], entry]
    slots = torch.cat([write_slot.long()[kept], snapshot_slot])
    window[slots] = torch.where((new >= 0)[..., None], from_input, from_window)
    return out
