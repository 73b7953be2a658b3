"""What one forward pass reads: rows of sequences as tensors, and each layer's part of the memory. Values alone."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class StateViews(NamedTuple):
    """One Gated DeltaNet layer of every slot; the operators' arguments of the same names."""

    state: Tensor  # [slots, value_heads, value_dim, key_dim] fp32
    ring: Tensor  # [slots, R, update width] fp32
    cursor: Tensor  # [slots, value_heads] int32
    window: Tensor  # [slots, W, conv_channels] model dtype


@dataclass(frozen=True, slots=True)
class Rows:
    """What every kind of row has, B of them."""

    page_table: Tensor  # [B, P] int32
    context_lens: Tensor  # [B] int32: tokens before this step; negative for padding
    read_slot: Tensor  # [B] int32
    write_slot: Tensor  # [B] int32


@dataclass(frozen=True, slots=True)
class DecodeRows(Rows):
    """Rows of T tokens, the id chosen last and drafts behind it."""

    index: Tensor  # [B] int64: of the sequence
    tokens: Tensor  # [B, T] int64
    outputs: Tensor  # [B, T] int64: the number of the output that is chosen behind each


@dataclass(frozen=True, slots=True)
class PrefillRows(Rows):
    """Rows of any length, packed."""

    index: Tensor  # [N] int64: of each token's sequence
    stored: Tensor  # [N] int32: the row of the sequence's pages that a token is stored in, -1 for one that is there
    cu_seqlens: Tensor  # [B + 1] int32
    snapshots: Tensor  # [M, 3] int32: row, token count, slot
    max_seqlen: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: the decode rows' tokens first, then the prefill rows', N in all."""

    layers: list[Tensor | StateViews]  # of each layer its pages, [pages, 2, heads, 64, head_dim], or its slots
    tokens: Tensor  # [N] int64
    cos_sin: Tensor  # [N, R] fp32
    kv_slots: Tensor  # [N] int64: page * 64 + row of the arena; negative where nothing is stored
    logit_rows: Tensor | None  # [L] int64: the tokens whose logits are wanted; None: all of them
    decode: Rows | None
    decode_tokens: int
    prefill: PrefillRows | None = None
