"""From a Step to the tensors one forward pass reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import PAGE_TOKENS
from .memory import Memory
from .step import NextStep, Row, Step


@dataclass(frozen=True, slots=True)
class Rows:
    """What every kind of row has, B of them: decode rows are this and one token each."""

    page_table: Tensor  # [B, P] int32
    context_lens: Tensor  # [B] int32: tokens before this step
    read_slot: Tensor  # [B] int32
    write_slot: Tensor  # [B] int32


@dataclass(frozen=True, slots=True)
class PrefillRows(Rows):
    """Rows of any length, packed."""

    cu_seqlens: Tensor  # [B + 1] int32
    snapshots: Tensor  # [M, 3] int32: row, token count, slot
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: the decode rows' tokens first, then the prefill rows', N in all."""

    memory: Memory
    tokens: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    cos_sin: Tensor  # [N, R] fp32
    kv_slots: Tensor  # [N] int64: page * 64 + row of the arena; negative where nothing is stored
    logit_rows: Tensor | None  # [L] int64: the tokens whose logits are wanted; None: all of them
    decode: Rows | None
    decode_tokens: int
    prefill: PrefillRows | None


class Tables:
    """What the device keeps per sequence index between Steps: its pages, and the id sampled last."""

    def __init__(self, indices: int, pages: int, device: torch.device):
        """indices: sequences at once; pages: of one sequence at most."""
        self.pages = torch.zeros(indices, pages, dtype=torch.int32, device=device)
        self.last_ids = torch.zeros(indices, dtype=torch.int64, device=device)

    def update(self, grown: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Enter new pages: (index, first page, pages) of each that got some. Mutates the page table."""
        if grown:
            width = self.pages.shape[1]
            places = [index * width + first + i for index, first, pages in grown for i in range(len(pages))]
            pages = [page for _, _, pages in grown for page in pages]
            places, pages = to_device(np.array([places, pages], dtype=np.int32), self.pages.device)
            self.pages.view(-1)[places.long()] = pages


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it: the copy runs on the current stream, from pinned memory that
    torch reuses only after it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pack_rows(rows: Sequence[Row], padded: int) -> np.ndarray:
    """[6, padded] int32: of each row its index, tokens before it, read slot, write slot, kv_tokens, and its token where
    it has one, -1 for the id that was sampled last. Rows beyond are padding: they touch no slot and no page."""
    packed = np.full((6, padded), -1, dtype=np.int32)
    packed[0] = packed[4] = 0
    if rows:
        packed[:, : len(rows)] = np.array(
            [
                (r.index, r.start, r.read_slot, r.write_slot, r.kv_tokens, r.tokens[0] if len(r.tokens) == 1 else -1)
                for r in rows
            ],
            dtype=np.int32,
        ).T
    return packed


class DecodeColumns:
    """The packed rows of Steps that only decode. Those of a NextStep follow from its base's, whatever their number."""

    def __init__(self) -> None:
        self._base: tuple[Step, int] | None = None
        self._packed = np.empty((6, 0), dtype=np.int32)

    def of(self, step: Step | NextStep, padded: int) -> np.ndarray:
        """As `pack_rows` of the step's decode rows; the array is the caller's."""
        base, ahead = (step.base, step.ahead) if isinstance(step, NextStep) else (step, 0)
        if self._base is None or self._base[0] is not base or self._base[1] != padded:
            self._base, self._packed = (base, padded), pack_rows(base.decode, padded)
        packed = self._packed.copy()
        if ahead:
            _, start, read_slot, write_slot, _, token = packed
            start[: len(base.decode)] += ahead
            read_slot[:], token[:] = write_slot, -1
        return packed


def decode_batch(
    packed: Tensor, memory: Memory, tables: Tables, inv_freq: Tensor, rope_scale: float, width: int | None = None
) -> Batch:
    """The tensors of B decode rows, packed as by `pack_rows`; width: of the page table, all of it where it is None.

    Reads nothing on the host and has shapes of B alone, so it can stand in a CUDA graph."""
    index, start, read_slot, write_slot, kv_tokens, token = packed.unbind(0)
    index = index.long()
    return _batch(
        memory,
        tables,
        (inv_freq, rope_scale),
        index=index,
        tokens=torch.where(token < 0, tables.last_ids[index], token),
        positions=start.long(),
        kv_tokens=kv_tokens,
        logit_rows=None,
        decode=Rows(tables.pages[index, :width], start, read_slot, write_slot),
        decode_tokens=len(index),
    )


def build_batch(step: Step, memory: Memory, tables: Tables, inv_freq: Tensor, rope_scale: float) -> Batch:
    """The tensors of a Step with prefill rows, whose pages are in the tables. inv_freq: [R / 2] fp32 on the device; see
    `model.rope`."""
    device, rows, decodes = inv_freq.device, step.rows, len(step.decode)
    widths = [max((-(-row.end // PAGE_TOKENS) for row in part), default=0) for part in (step.decode, step.prefill)]
    count = len(rows)
    lengths = np.array([len(row.tokens) or 1 for row in rows], dtype=np.int32)
    ends = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    logit_rows = [t for row, end in zip(rows, ends[1:].tolist(), strict=True) for t in range(end - row.logits, end)]
    snapshots = [(i, tokens, slot) for i, row in enumerate(step.prefill) for tokens, slot in row.snapshots]
    starts = np.array([row.start for row in rows], dtype=np.int32)
    # One copy to the device: everything is cut from one array of int32.
    parts = (
        pack_rows(rows, count).reshape(-1),
        np.array([token for row in rows for token in (row.tokens or (-1,))], dtype=np.int32),
        np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - ends[:-1], lengths),
        np.repeat(np.arange(count, dtype=np.int32), lengths),
        np.array(logit_rows, dtype=np.int32),
        ends[decodes:] - decodes,
        np.array(snapshots, dtype=np.int32).reshape(-1),
    )
    packed, token, positions, row, logit_rows, cu_seqlens, snapshots = to_device(np.concatenate(parts), device).split(
        [part.size for part in parts]
    )
    index, start, read_slot, write_slot, kv_tokens, _ = packed.view(6, count)
    index, row = index.long(), row.long()

    def rows_from(first: int, last: int, width: int) -> tuple[Tensor, ...]:
        each = slice(first, last)
        return tables.pages[index[each], :width], start[each], read_slot[each], write_slot[each]

    return _batch(
        memory,
        tables,
        (inv_freq, rope_scale),
        index=index[row],
        tokens=torch.where(token < 0, tables.last_ids[index[row]], token),
        positions=positions.long(),
        kv_tokens=kv_tokens[row],
        logit_rows=logit_rows.long(),
        decode=Rows(*rows_from(0, decodes, widths[0])) if decodes else None,
        decode_tokens=decodes,
        prefill=PrefillRows(
            *rows_from(decodes, count, widths[1]), cu_seqlens, snapshots.view(-1, 3), int(lengths[decodes:].max())
        ),
    )


def _batch(
    memory: Memory,
    tables: Tables,
    rotary: tuple[Tensor, float],
    *,
    index: Tensor,
    tokens: Tensor,
    positions: Tensor,
    kv_tokens: Tensor,
    logit_rows: Tensor | None,
    decode: Rows | None,
    decode_tokens: int,
    prefill: PrefillRows | None = None,
) -> Batch:
    """index, tokens, positions, kv_tokens: one entry a token."""
    inv_freq, rope_scale = rotary
    page = tables.pages[index, positions // PAGE_TOKENS]
    kv_slots = torch.add(positions % PAGE_TOKENS, page, alpha=PAGE_TOKENS)
    angles = positions[:, None] * inv_freq
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    return Batch(
        memory=memory,
        tokens=tokens,
        positions=positions,
        cos_sin=cos_sin if rope_scale == 1 else cos_sin * rope_scale,
        kv_slots=kv_slots.masked_fill_(positions < kv_tokens, -1),
        logit_rows=logit_rows,
        decode=decode,
        decode_tokens=decode_tokens,
        prefill=prefill,
    )
