"""A Step: all that the device does in one forward pass, as plain data, so it can be logged, replayed, sent to ranks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a Step.

    tokens: the ids to consume; start: tokens consumed before them; pages: KV pages of the whole sequence in order, 64
    tokens each; read_slot, write_slot: state slots, equal for an update in place; kv_tokens: stores of tokens below
    this count are skipped, their pages hold them already; snapshots: (token count, slot) pairs with
    start < count <= start + len(tokens), prefill only; logits: how many of the last tokens need logits.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    read_slot: int
    write_slot: int
    kv_tokens: int = 0
    snapshots: tuple[tuple[int, int], ...] = ()
    logits: int = 1


@dataclass(frozen=True, slots=True)
class Step:
    """decode: rows of exactly one token, consumed by the recurrent kernels; prefill: rows consumed in chunks."""

    decode: tuple[Row, ...] = ()
    prefill: tuple[Row, ...] = ()
