"""A sequence's progress on the device: where the next tokens of a decode step stand, and how many of the ids that were
chosen behind them count.

The caller keeps, per sequence index 0 .. I - 1: length, the tokens consumed; ids, the id chosen last and behind it the
drafts of the ids that may follow; left, the outputs it may still have; prompt, the tokens that are no outputs; pages,
its page table, of which `capacity` tokens are there. So a step that merely goes on needs nothing from the host.
"""

import torch
from torch import Tensor

from .library import operator


def _decode_fake(packed, length, left, prompt, ids, pages, capacity, inv_freq, width, rope_scale, page_size):
    sequences = packed.shape[1]
    index, tokens = ids.new_empty(sequences), ids.new_empty(sequences, width)
    numbers = (packed.new_empty(sequences) for _ in range(3))
    rows = _rows_fake(index, None, pages, capacity, inv_freq, width, rope_scale, 0, page_size)
    return index, tokens, torch.empty_like(tokens), *numbers, pages.new_empty(sequences, pages.shape[1]), *rows


@operator(fake=_decode_fake)
def decode_rows(
    packed: Tensor,
    length: Tensor,
    left: Tensor,
    prompt: Tensor,
    ids: Tensor,
    pages: Tensor,
    capacity: Tensor,
    inv_freq: Tensor,
    width: int,
    rope_scale: float,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a decode step begins with: what each of B sequences consumes, its last id and width - 1 drafts, and where.

    packed: [3, B] int32: index, read slot and write slot of each; a negative write slot marks padding. length, left,
    prompt: [I] int32; ids: [I, >= width] int64; pages, capacity, inv_freq, rope_scale: as in `paged_rows`. Returns
    index [B] int64; tokens [B, width] int64; outputs [B, width] int64, the number of the output that is chosen behind
    each token, from 0; context_lens [B] int32, the tokens before; read and write slots [B] int32; page_table [B, P]
    int32, a row of pages each; and the cos_sin and kv_slots of `paged_rows` for the tokens. Padding, and a sequence
    with nothing left to say, have context -1 and slots -1.
    """
    index, read_slot, write_slot = packed.unbind(0)
    index = index.long()
    going = (write_slot >= 0) & (left[index] > 0)
    context = torch.where(going, length[index], -1)
    outputs = (context - prompt[index]).long()[:, None] + torch.arange(1, width + 1, device=index.device)
    reads, writes = torch.where(going, read_slot, -1), torch.where(going, write_slot, -1)
    rows = paged_rows(index, context, pages, capacity, inv_freq, width, rope_scale, 0, page_size)
    return index, ids[index, :width], outputs, context, reads, writes, pages[index], *rows


def _rows_fake(index, first, pages, capacity, inv_freq, width, rope_scale, rope_shift, page_size):
    rows = len(index) * width
    return inv_freq.new_empty(rows, 2 * len(inv_freq)), index.new_empty(rows)


@operator(fake=_rows_fake)
def paged_rows(
    index: Tensor,
    first: Tensor,
    pages: Tensor,
    capacity: Tensor,
    inv_freq: Tensor,
    width: int,
    rope_scale: float,
    rope_shift: int,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Angles and places of `width` consecutive rows of each of B sequences.

    index: [B] int64; first: [B] int32, the first of the rows, negative for padding; pages: [I, P] int32; capacity: [I]
    int32, tokens that fit the pages a sequence has; inv_freq: [R / 2] fp32; rope_scale: of cosines and sines;
    rope_shift: added to a row for its position. Returns cos_sin [B width, R] fp32, as `rope` takes it, and kv_slots
    [B width] int64, as `write_kv` takes them: -1 for padding and for rows beyond the capacity.
    """
    first = first.long().unsqueeze(1)
    row = first + torch.arange(width, device=index.device)
    absent = (row >= capacity[index].unsqueeze(1)).logical_or_(first < 0)
    place = row.masked_fill(absent, 0)
    page = pages[index.unsqueeze(1), place // page_size].long()
    kv_slots = torch.add(place % page_size, page, alpha=page_size).masked_fill_(absent, -1)
    angles = (row.clamp_(min=0) + rope_shift).view(-1, 1) * inv_freq
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    return cos_sin if rope_scale == 1 else cos_sin * rope_scale, kv_slots.flatten()


def _draft_fake(index, context, capacity, prompt, ids, drafts):
    rows = (drafts, len(index))
    return torch.empty_like(index), context.new_empty(rows), index.new_empty(rows)


@operator(fake=_draft_fake)
def draft_rows(
    index: Tensor, context: Tensor, capacity: Tensor, prompt: Tensor, ids: Tensor, drafts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the drafts behind each of B sequences' last ids are made.

    index: [B] int64; context: [B] int32, the row of the last id, negative for padding; capacity, prompt: [I] int32;
    ids: [I, >= 1] int64; drafts: D >= 1. Returns tokens [B] int64, the last ids; rows [D, B] int32, of which each draft
    is made, the last id's and those behind it, -1 for padding and beyond the capacity; outputs [D, B] int64, the number
    of the output that each draft may be, from 0.
    """
    ahead = torch.arange(drafts, dtype=context.dtype, device=context.device)[:, None]
    room = capacity[index].masked_fill(context < 0, 0)
    rows = torch.where(context + ahead < room, context + ahead, -1)
    return ids[index, 0], rows, (context - prompt[index]).long() + (1 + ahead)


@operator(
    fake=lambda chosen, tokens, outputs, context_lens, index, min_tokens, stops, length, left, ids: torch.empty_like(
        index
    ),
    mutates=("length", "left", "ids"),
)
def accept_tokens(
    chosen: Tensor,
    tokens: Tensor,
    outputs: Tensor,
    context_lens: Tensor,
    index: Tensor,
    min_tokens: Tensor,
    stops: Tensor,
    length: Tensor,
    left: Tensor,
    ids: Tensor,
) -> Tensor:
    """Verify drafts: the ids chosen behind drafts that were chosen themselves count, up to an end.

    chosen: [B, T] int64, the id chosen behind each of tokens [B, T] int64, of which the first is certain and the others
    are drafts; outputs, context_lens: as from `decode_rows`; index: [B] int64, of different sequences; min_tokens: [I]
    int32, outputs before which nothing ends; stops: [I, S] int64, ids that end a sequence, -1 for none. Returns how
    many of the chosen ids count, [B] int64: 0 for context -1, else 1 and one more for each draft that is the id chosen
    before it, no further than a stop and than what is left. A negative "id" (see `sample`) counts, and ends whatever
    min_tokens says. Sequences that ended have nothing left from then on.
    Mutates length (the context and the count), left and column 0 of ids (the last id that counts, 0 for a negative one)
    at index.
    """
    agreed = (chosen[:, :-1] == tokens[:, 1:]).int().cumprod(1).sum(1)
    ends = (chosen[:, :, None] == stops[index][:, None]).any(-1) & (outputs + 1 >= min_tokens[index][:, None])
    ends |= chosen < 0
    before_end = (ends.int().cumsum(1) == 0).sum(1)
    count = torch.minimum(torch.minimum(agreed, before_end) + 1, left[index]).masked_fill_(context_lens < 0, 0)
    last = (count - 1).clamp_(min=0)[:, None]
    ended = ends.gather(1, last)[:, 0] & (count > 0)
    going = context_lens >= 0
    length[index] = torch.where(going, context_lens + count, length[index]).int()
    left[index] = (left[index] - count).masked_fill_(ended, 0).int()
    ids[index, 0] = torch.where(going, chosen.gather(1, last)[:, 0].clamp(min=0), ids[index, 0])
    return count
