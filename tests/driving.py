"""Forward passes of a runner on tokens that a test names, as if they had been sampled or drafted before."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenspeed.engine.executor.batch import Forwarded
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.schedule.step import DecodeRow, NewPages, PrefillRow, Step


class Move(NamedTuple):
    """A sequence's part of a forward pass. tokens: the ids it consumes; start: tokens before them; pages: of the whole
    sequence; the rest as in PrefillRow."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    read_slot: int
    write_slot: int
    index: int = 0
    kv_tokens: int = 0
    snapshots: tuple[tuple[int, int], ...] = ()
    logits: int = 1

    @property
    def row(self) -> PrefillRow:
        return PrefillRow(
            self.tokens,
            self.start,
            self.read_slot,
            self.write_slot,
            self.index,
            self.kv_tokens,
            self.snapshots,
            self.logits,
        )


def step_of(decode: tuple[Move, ...] = (), prefill: tuple[Move, ...] = ()) -> Step:
    """The Step of these moves; those that decode have equally many tokens."""
    width = len(decode[0].tokens) if decode else 1
    assert all(len(move.tokens) == width for move in decode)
    return Step(
        decode=tuple(DecodeRow(move.index, move.read_slot, move.write_slot) for move in decode),
        width=width,
        prefill=tuple(move.row for move in prefill),
        pages=tuple(NewPages(move.index, 0, move.pages) for move in (*decode, *prefill)),
    )


def place(runner: Runner, decode: tuple[Move, ...]) -> None:
    """Let the tables say that these tokens come next. Mutates them."""
    tables = runner.tables
    for move in decode:
        if tables.ids.shape[1] < len(move.tokens):
            more = tables.ids.new_zeros(len(tables.ids), len(move.tokens))
            more[:, : tables.ids.shape[1]] = tables.ids
            tables.ids = more
        tables.length[move.index], tables.left[move.index] = move.start, 1000
        tables.ids[move.index, : len(move.tokens)] = torch.tensor(move.tokens)


def forward(runner: Runner, decode: tuple[Move, ...] = (), prefill: tuple[Move, ...] = ()) -> Forwarded:
    place(runner, decode)
    return runner.forward(step_of(decode, prefill))


def logits_of(runner: Runner, decode: tuple[Move, ...] = (), prefill: tuple[Move, ...] = ()) -> Tensor:
    return forward(runner, decode, prefill).logits
