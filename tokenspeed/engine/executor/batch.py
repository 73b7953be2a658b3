"""From a Step to the tensors one forward pass reads, and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..config import PAGE_TOKENS
from ..model.inputs import Batch, DecodeRows, PrefillRows, Rows
from ..schedule.step import Begin, DecodeRow, NewPages, Step
from .memory import Memory

STOPS = 32  # ids that end a sequence that the device knows; others are found by the host, a step later


class Tables:
    """What the device keeps per sequence index between Steps, as `ops.decode_rows` and its neighbours take it. Padding
    rows have an index of their own, `nobody`."""

    def __init__(self, indices: int, pages: int, device: torch.device, drafts: int = 0):
        """indices: sequences at once; pages: of one sequence at most; drafts: behind an id at most."""
        rows = indices + 1
        self.nobody, self.device = indices, device
        self.pages = torch.zeros(rows, pages, dtype=torch.int32, device=device)
        self.ids = torch.zeros(rows, 1 + drafts, dtype=torch.int64, device=device)
        self.stops = torch.full((rows, STOPS), -1, dtype=torch.int64, device=device)
        # One tensor for what a Begin sets, so that it is one copy; each row of it is a table.
        self._numbers = torch.zeros(5, rows, dtype=torch.int32, device=device)
        self.capacity, self.length, self.left, self.prompt, self.min_tokens = self._numbers
        self._held = [0] * rows  # pages of each index

    def clear(self) -> None:
        """As before any sequence began."""
        for table in (self.pages, self.ids, self._numbers):
            table.zero_()

    def begin(self, begins: Sequence[Begin]) -> None:
        """Sequences take their indices. Mutates the tables."""
        if not begins:
            return
        numbers = [(0, 0, b.left, b.prompt_tokens, b.min_tokens) for b in begins]
        stops = [(*b.stops[:STOPS], *[-1] * (STOPS - len(b.stops))) for b in begins]
        index, *rest = to_device(
            np.array(
                [(b.index, *n, *s) for b, n, s in zip(begins, numbers, stops, strict=True)], dtype=np.int32
            ).T.copy(),
            self.device,
        )
        index = index.long()
        self._numbers[:, index] = torch.stack(rest[: len(self._numbers)])
        self.stops[index] = torch.stack(rest[len(self._numbers) :], 1).long()
        self.ids[index] = 0

    def add_pages(self, added: Sequence[NewPages]) -> None:
        """Enter pages into the page table. Mutates it and the capacities."""
        if not added:
            return
        width = self.pages.shape[1]
        places = [index * width + first + i for index, first, pages in added for i in range(len(pages))]
        pages = [page for _, _, pages in added for page in pages]
        for index, first, new in added:
            self._held[index] = first + len(new)
        held = [(index, self._held[index] * PAGE_TOKENS) for index, _, _ in added]
        packed = np.array([*places, *pages, *(i for i, _ in held), *(t for _, t in held)], dtype=np.int32)
        places, pages, index, tokens = to_device(packed, self.device).split(
            [len(places), len(pages), len(held), len(held)]
        )
        self.pages.view(-1)[places.long()] = pages
        self.capacity[index.long()] = tokens

    def width(self, indices: Sequence[int]) -> int:
        """Pages of the longest of some sequences."""
        return max(self._held[index] for index in indices)


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions become angles; see `model.rope`. inv_freq: [R / 2] fp32 on the device."""

    inv_freq: Tensor
    scale: float


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it: the copy runs on the current stream, from pinned memory that
    torch reuses only after it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pack_rows(rows: Sequence[DecodeRow], padded: int, nobody: int) -> np.ndarray:
    """[3, padded] int32: index, read slot and write slot of each row. Rows beyond are padding: they touch no slot and
    no page."""
    packed = np.full((3, padded), -1, dtype=np.int32)
    packed[0] = nobody
    if rows:
        packed[:, : len(rows)] = np.array(rows, dtype=np.int32).T
    return packed


def paged(
    memory: Memory, tables: Tables, rotary: Rotary, rows: Rows, index: Tensor, tokens: Tensor, rope_shift: int = 0
) -> Batch:
    """A batch of B sequences with W tokens each, tokens [B, W], from rows.context_lens on. index: [B] int64."""
    cos_sin, kv_slots = ops.paged_rows(
        index,
        rows.context_lens,
        tables.pages,
        tables.capacity,
        rotary.inv_freq,
        tokens.shape[1],
        rotary.scale,
        rope_shift,
        PAGE_TOKENS,
    )
    return Batch(memory.layers, tokens.flatten(), cos_sin, kv_slots, None, rows, tokens.numel())


def prefill_rows(
    rows: PrefillRows, tables: Tables, rotary: Rotary, row: Tensor, rope_shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Angles and places of a prefill's tokens at rows [N] int32 of their sequences' pages; see `ops.paged_rows`."""
    sizes = (1, rotary.scale, rope_shift, PAGE_TOKENS)
    return ops.paged_rows(rows.index, row, tables.pages, tables.capacity, rotary.inv_freq, *sizes)


def decode_batch(
    packed: Tensor, width: int, memory: Memory, tables: Tables, rotary: Rotary, pages: int | None = None
) -> Batch:
    """The tensors of B decode rows of `width` tokens, packed as by `pack_rows`; pages: of the page table's columns, all
    of them where it is None.

    Reads nothing on the host and has shapes of B and width alone, so it can stand in a CUDA graph."""
    progress = (tables.length, tables.left, tables.prompt, tables.ids)
    places = (tables.pages[:, :pages], tables.capacity, rotary.inv_freq)
    index, tokens, outputs, context, reads, writes, page_table, cos_sin, kv_slots = ops.decode_rows(
        packed, *progress, *places, width, rotary.scale, PAGE_TOKENS
    )
    rows = DecodeRows(page_table, context, reads, writes, index, tokens, outputs)
    return Batch(memory.layers, tokens.flatten(), cos_sin, kv_slots, None, rows, tokens.numel())


def build_batch(step: Step, memory: Memory, tables: Tables, rotary: Rotary) -> Batch:
    """The tensors of a Step with prefill rows, whose pages are in the tables."""
    device, rows = tables.device, step.prefill
    decode = None
    if step.decode:
        packed = to_device(pack_rows(step.decode, len(step.decode), tables.nobody), device)
        pages = tables.width([row.index for row in step.decode])
        decode = decode_batch(packed, step.width, memory, tables, rotary, pages)
    before = decode.decode_tokens if decode else 0
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int32)
    ends = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    logit_rows = [t for row, end in zip(rows, ends[1:].tolist(), strict=True) for t in range(end - row.logits, end)]
    starts = np.array([row.start for row in rows], dtype=np.int32)
    # One copy to the device: everything is cut from one array of int32.
    parts = (
        np.array([(r.index, r.read_slot, r.write_slot, r.kv_tokens, r.start) for r in rows], np.int32).T.reshape(-1),
        np.array([token for row in rows for token in row.tokens], dtype=np.int32),
        np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - ends[:-1], lengths),
        np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
        np.array([*range(before), *(before + t for t in logit_rows)], dtype=np.int32),
        ends,
        np.array([(i, *pair) for i, row in enumerate(rows) for pair in row.snapshots], dtype=np.int32).reshape(-1),
    )
    packed, tokens, position, row, logit_rows, cu_seqlens, snapshots = to_device(np.concatenate(parts), device).split(
        [part.size for part in parts]
    )
    index, read_slot, write_slot, kv_tokens, start = packed.view(5, len(rows))
    index, row, tokens = index.long(), row.long(), tokens.long()
    pages = tables.width([row.index for row in rows])
    prefill = PrefillRows(
        tables.pages[index, :pages],
        start,
        read_slot,
        write_slot,
        index[row],
        torch.where(position < kv_tokens[row], -1, position),
        cu_seqlens,
        snapshots.view(-1, 3),
        int(lengths.max()),
    )
    cos_sin, kv_slots = prefill_rows(prefill, tables, rotary, position)
    kv_slots = kv_slots.masked_fill(prefill.stored < 0, -1)
    if decode:
        tokens = torch.cat([decode.tokens, tokens])
        cos_sin = torch.cat([decode.cos_sin, cos_sin])
        kv_slots = torch.cat([decode.kv_slots, kv_slots])
    rows = decode.decode if decode else None
    return Batch(memory.layers, tokens, cos_sin, kv_slots, logit_rows.long(), rows, before, prefill)


class Forwarded(NamedTuple):
    """A forward pass: its batch, logits [L, V] of the decode rows' tokens and of the prefill rows that want some, and
    with an MTP head the state of every token, [N, hidden]."""

    batch: Batch
    logits: Tensor
    hidden: Tensor | None

    def first(self, rows: int) -> "Forwarded":
        """Without the decode rows behind the first `rows`, which are padding."""
        decode = self.batch.decode
        if decode is None or len(decode.index) == rows:
            return self
        cut = rows * decode.tokens.shape[1]
        decode = DecodeRows(*(getattr(decode, field.name)[:rows] for field in fields(decode)))
        batch = replace(self.batch, decode=decode, decode_tokens=cut)
        return Forwarded(batch, self.logits[:cut], self.hidden if self.hidden is None else self.hidden[:cut])
