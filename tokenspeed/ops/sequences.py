"""Index arithmetic shared by the operators on ragged batches: every result is a tensor, nothing is read on the host.

Checks of what a caller promises are the exception: they read, and so look at tensors of the host alone.
"""

import torch
from torch import Tensor

CHUNK = 64  # tokens per chunk of the delta rule and per page of the KV arena; chunks lie at absolute multiples of it


def grid_of_tokens(cu_seqlens: Tensor, first: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lay ragged sequences out as a padded grid.

    cu_seqlens: [B + 1]; first: [B], the token of the sequence that stands in column 0 (negative: columns before the
    sequence's first token are padding); width: columns. Returns row numbers into the packed tokens and their validity,
    both [B, width]; rows of padding are clamped to an existing row.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    rows = starts + first[:, None].long() + torch.arange(width, device=cu_seqlens.device)
    valid = (rows >= starts) & (rows < ends)
    return rows.clamp(min=0).clamp(max=(cu_seqlens[-1].long() - 1).clamp(min=0)), valid


def snapshot_rows(snapshots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split [M, 3] rows of (sequence, token count, slot) and drop the padding rows, whose slot is negative."""
    kept = snapshots[snapshots[:, 2] >= 0] if len(snapshots) else snapshots
    sequence, count, slot = kept.long().unbind(1)
    return sequence, count, slot


def check_longest(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raises ValueError for a sequence of the batch that is longer than it says."""
    if cu_seqlens.is_cpu and len(cu_seqlens) > 1 and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, and a sequence of the batch has {longest} tokens.")


def check_pages(page_table: Tensor, ends: Tensor, page_size: int) -> None:
    """Raises ValueError for a sequence whose tokens do not fit the table's pages. ends: [B], tokens of each."""
    room = page_table.shape[1] * page_size
    if ends.is_cpu and len(ends) and (longest := max(ends.tolist())) > room:
        raise ValueError(
            f"page_table has {page_table.shape[1]} pages of {page_size} tokens, and a sequence has {longest} tokens."
        )


def check_slots(write_slot: Tensor, snapshots: Tensor | None = None) -> None:
    """Raises ValueError for a slot that is written twice in a call; negative ones are written by nobody."""
    if not write_slot.is_cpu:
        return
    slots = write_slot.tolist() + ([] if snapshots is None else snapshots[:, 2].tolist())
    slots = [slot for slot in slots if slot >= 0]
    if len(set(slots)) < len(slots):
        raise ValueError(f"slots {slots} are written, one of them twice.")
