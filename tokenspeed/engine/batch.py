"""From a Step to the tensors one forward pass reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import PAGE_TOKENS
from .memory import Memory
from .step import Row, Step


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
    logit_rows: Tensor  # [L] int64: the tokens whose logits are wanted
    decode: Rows | None
    decode_tokens: int
    prefill: PrefillRows | None


class Tables:
    """What the device keeps per sequence index between Steps: its pages, and the id sampled last."""

    def __init__(self, indices: int, pages: int, device: torch.device):
        """indices: sequences at once; pages: of one sequence at most."""
        self.pages = torch.zeros(indices, pages, dtype=torch.int32, device=device)
        self.last_ids = torch.zeros(indices, dtype=torch.int64, device=device)

    def update(self, rows: Sequence[Row]) -> None:
        """Enter the rows' new pages. Mutates the page table."""
        width = self.pages.shape[1]
        places = [r.index * width + r.first_page + i for r in rows if r.pages for i in range(len(r.pages))]
        if places:
            pages = [page for row in rows for page in row.pages]
            places, pages = to_device(np.array([places, pages], dtype=np.int32), self.pages.device)
            self.pages.view(-1)[places.long()] = pages


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it: the copy runs on the current stream, from pinned memory that
    torch reuses only after it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def build_batch(step: Step, memory: Memory, tables: Tables, inv_freq: Tensor, rope_scale: float) -> Batch:
    """The tensors of a Step, whose pages are in the tables. inv_freq: [R / 2] fp32 on the device; see `model.rope`."""
    device, rows = inv_freq.device, step.rows
    decodes, count = len(step.decode), len(rows)
    lengths = np.array([len(row.tokens) or 1 for row in rows], dtype=np.int32)
    ends = np.zeros(count + 1, dtype=np.int32)
    np.cumsum(lengths, out=ends[1:])
    columns = [(row.index, row.start, row.read_slot, row.write_slot, row.kv_tokens) for row in rows]
    logit_rows = [t for row, end in zip(rows, ends[1:].tolist(), strict=True) for t in range(end - row.logits, end)]
    snapshots = [(i, count_, slot) for i, row in enumerate(step.prefill) for count_, slot in row.snapshots]
    tokens = np.array([token for row in rows for token in (row.tokens or (-1,))], dtype=np.int32)
    # One copy to the device: everything is cut from one array of int32.
    parts = (
        np.array(columns, dtype=np.int32).T.reshape(-1),
        tokens,
        np.repeat(np.arange(count, dtype=np.int32), lengths),
        np.array(logit_rows, dtype=np.int32),
        ends[decodes:] - decodes,
        np.array(snapshots, dtype=np.int32).reshape(-1),
    )
    packed = to_device(np.concatenate(parts), device).split([part.size for part in parts])
    index, start, read_slot, write_slot, kv_tokens = packed[0].view(5, count)
    token, row_of_token, logit_rows, cu_seqlens, snapshots = packed[1:]
    index, row_of_token = index.long(), row_of_token.long()

    token = torch.where(token < 0, tables.last_ids[index[row_of_token]], token) if decodes else token.long()
    first_token = torch.cat([torch.arange(decodes, device=device), cu_seqlens[:-1] + decodes])
    positions = start[row_of_token] + torch.arange(len(token), device=device) - first_token[row_of_token]
    page = tables.pages[index[row_of_token], positions // PAGE_TOKENS].long()
    kv_slots = page * PAGE_TOKENS + positions % PAGE_TOKENS
    kv_slots.masked_fill_(positions < kv_tokens[row_of_token], -1)
    angles = positions[:, None].float() * inv_freq

    def rows_from(first: int, last: int) -> dict[str, Tensor]:
        width = max(-(-row.end // PAGE_TOKENS) for row in rows[first:last])
        return {
            "page_table": tables.pages[index[first:last], :width],
            "context_lens": start[first:last],
            "read_slot": read_slot[first:last],
            "write_slot": write_slot[first:last],
        }

    prefill = None
    if step.prefill:
        longest = int(lengths[decodes:].max())
        prefill = PrefillRows(
            **rows_from(decodes, count), cu_seqlens=cu_seqlens, snapshots=snapshots.view(-1, 3), max_seqlen=longest
        )
    return Batch(
        memory=memory,
        tokens=token,
        positions=positions,
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1) * rope_scale,
        kv_slots=kv_slots,
        logit_rows=logit_rows.long(),
        decode=Rows(**rows_from(0, decodes)) if decodes else None,
        decode_tokens=decodes,
        prefill=prefill,
    )
