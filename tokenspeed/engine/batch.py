"""From a Step to the tensors one forward pass reads."""

from dataclasses import dataclass

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


def build_batch(step: Step, memory: Memory, inv_freq: Tensor, rope_scale: float) -> Batch:
    """Copy a Step to the device. inv_freq: [R / 2] fp32 on that device; see `model.rope`."""
    device = inv_freq.device
    tokens, positions, kv_slots, logit_rows = [], [], [], []
    for row in (*step.decode, *step.prefill):
        logit_rows.extend(range(len(tokens) + len(row.tokens) - row.logits, len(tokens) + len(row.tokens)))
        tokens.extend(row.tokens)
        for position in range(row.start, row.start + len(row.tokens)):
            positions.append(position)
            page = row.pages[position // PAGE_TOKENS]
            kv_slots.append(page * PAGE_TOKENS + position % PAGE_TOKENS if position >= row.kv_tokens else -1)

    def wide(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    positions = wide(positions)
    angles = positions[:, None].float() * inv_freq
    return Batch(
        memory=memory,
        tokens=wide(tokens),
        positions=positions,
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1) * rope_scale,
        kv_slots=wide(kv_slots),
        logit_rows=wide(logit_rows),
        decode=Rows(**_row_tensors(step.decode, device)) if step.decode else None,
        decode_tokens=len(step.decode),
        prefill=_prefill(step.prefill, device) if step.prefill else None,
    )


def _narrow(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _row_tensors(rows: tuple[Row, ...], device: torch.device) -> dict[str, Tensor]:
    width = max(-(-(row.start + len(row.tokens)) // PAGE_TOKENS) for row in rows)
    return {
        "page_table": _narrow([[*row.pages[:width], *[0] * (width - len(row.pages))] for row in rows], device),
        "context_lens": _narrow([row.start for row in rows], device),
        "read_slot": _narrow([row.read_slot for row in rows], device),
        "write_slot": _narrow([row.write_slot for row in rows], device),
    }


def _prefill(rows: tuple[Row, ...], device: torch.device) -> PrefillRows:
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row.tokens))
    snapshots = [[i, count, slot] for i, row in enumerate(rows) for count, slot in row.snapshots]
    return PrefillRows(
        **_row_tensors(rows, device),
        cu_seqlens=_narrow(ends, device),
        snapshots=_narrow(snapshots, device).reshape(-1, 3),
        max_seqlen=max(len(row.tokens) for row in rows),
    )
