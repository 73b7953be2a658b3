"""Arenas, weights and sequences for the tests of a Gated DeltaNet layer's operators."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backends import Backend

POISON = 0xFF  # every byte of a slot: NaN as fp32 and as bf16, -1 as int32


@dataclass(frozen=True)
class Heads:
    """Heads of one layer: nk key heads of dk, nv value heads of dv, a convolution of `taps`."""

    nk: int
    nv: int
    dk: int = 128
    dv: int = 128
    taps: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.nk * self.dk + self.nv * self.dv

    @property
    def ring_row(self) -> int:
        return self.nk * self.dk + self.nv * self.dv + self.nv


class Sequence(NamedTuple):
    """One sequence of a call: tokens before it, tokens of it, its slots, and how many updates wait in its ring."""

    context: int
    length: int
    read: int
    write: int
    pending: int = 0


def published(nv_per_nk: int) -> Heads:
    return Heads(1, nv_per_nk)


def odd(nv_per_nk: int) -> Heads:
    return Heads(2, 2 * nv_per_nk, dk=20, dv=12, taps=3)


def every_head_layout(backend: Backend, nv_per_nk: int) -> list[Heads]:
    return [published(nv_per_nk)] if backend.kernels else [published(nv_per_nk), odd(nv_per_nk)]


class Layer:
    """The second of three layers in a poisoned arena of state slots, with random weights."""

    def __init__(self, backend: Backend, heads: Heads, slots: int, ring_rows: int = 3, window: int | None = None):
        self.backend, self.heads = backend, heads
        window = heads.taps if window is None else window
        sections = {
            "state": (torch.float32, (heads.nv, heads.dv, heads.dk)),
            "ring": (torch.float32, (ring_rows, heads.ring_row)),
            "cursor": (torch.int32, (heads.nv,)),
            "window": (backend.dtype, (window, heads.channels)),
        }
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in sections.items()}
        padded = {name: -(-size // 16) * 16 for name, size in sizes.items()}
        layer_bytes = sum(padded.values())
        self.arena = torch.full((slots, 3 * layer_bytes), POISON, dtype=torch.uint8, device=backend.device)
        offset = layer_bytes
        for name, (dtype, shape) in sections.items():
            view = self.arena[:, offset : offset + sizes[name]].view(dtype).unflatten(1, shape)
            setattr(self, name, view)
            offset += padded[name]
        self.conv_weight = backend.randn(heads.channels, heads.taps) * 0.5
        self.a_log = backend.randn(heads.nv, dtype=torch.float32) * 0.5 - 1
        self.dt_bias = backend.randn(heads.nv, dtype=torch.float32) * 0.5
        self.norm_weight = 1 + 0.1 * backend.randn(heads.dv)

    def decay_fast(self) -> None:
        """Decays of about e^-20 a token: over a chunk, exp of a plain cumulative sum is 0 and its inverse infinite."""
        self.a_log.fill_(3.0)
        self.dt_bias.fill_(1.0)

    def projections(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw qkv, z, b and a of `tokens` tokens, as the strided slices of one fused projection."""
        heads = self.heads
        widths = [heads.channels, heads.nv * heads.dv, heads.nv, heads.nv]
        # Kernels load 16 bytes at a time, which every published width allows; torch also takes odd strides.
        spare = -sum(widths) % 8 if self.backend.kernels else 1
        fused = self.backend.randn(tokens, sum(widths) + spare)
        return fused.split([*widths, spare], dim=1)[:4]

    def prepare(self, slot: int, context: int, pending: int = 0) -> Tensor:
        """Give a slot the record of a sequence of `context` tokens, its last `pending` updates still in the ring.

        Returns the state it stands for, [nv, dv, dk] fp64. A sequence without tokens leaves the poison where it is.
        """
        heads = self.heads
        if context == 0:
            return torch.zeros(heads.nv, heads.dv, heads.dk, dtype=torch.float64)
        randn, fp32 = self.backend.randn, torch.float32
        self.state[slot] = randn(heads.nv, heads.dv, heads.dk, dtype=fp32) * 0.2
        self.cursor[slot] = context - pending
        for token in range(context - pending, context):
            key = reference.unit(randn(heads.nk, heads.dk, dtype=fp32)).flatten()
            update, decay = randn(heads.nv * heads.dv, dtype=fp32), -randn(heads.nv, dtype=fp32).abs()
            self.ring[slot, token % self.ring.shape[1]] = torch.cat([key, update, decay])
        for token in range(max(0, context - self.window.shape[1]), context):
            self.window[slot, token % self.window.shape[1]] = randn(heads.channels)
        return reference.fold(self.state[slot], self.ring[slot], self.cursor[slot], context)

    def history(self, slot: int, context: int) -> Tensor:
        """The `taps - 1` inputs before token `context`, zero before the first: [taps - 1, channels]."""
        rows = torch.zeros(self.heads.taps - 1, self.heads.channels, dtype=torch.float64)
        for i, token in enumerate(range(context - self.heads.taps + 1, context)):
            if token >= 0:
                rows[i] = reference.exact(self.window[slot, token % self.window.shape[1]])
        return rows

    def fold(self, slot: int, context: int) -> Tensor:
        return reference.fold(self.state[slot], self.ring[slot], self.cursor[slot], context)

    def untouched(self, before: Tensor, written: set[int], views: tuple[str, ...]) -> bool:
        """Whether the arena is bit for bit `before`, but for these views of this layer in the `written` slots."""
        after, slots = self.arena.clone(), sorted(written)
        now = {name: getattr(self, name)[slots].clone() for name in views}
        self.arena.copy_(before)
        for name in views:
            getattr(self, name)[slots] = now[name]
        same = torch.equal(self.arena, after)
        self.arena.copy_(after)
        return same


class Mixer:
    """The whole mixer of one sequence by the reference: raw projections in, gated and normalised outputs out."""

    def __init__(self, layer: Layer, state: Tensor, history: Tensor, eps: float = 1e-6):
        self.layer, self.state, self.history, self.eps = layer, state, history, eps

    def run(self, qkv: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [T, nv dv] of T tokens and the states after 0 .. T of them. Changes nothing: see `accept`.

        The outputs of the convolution and of the delta rule are rounded as those of the separate operators are.
        """
        layer, heads = self.layer, self.layer.heads
        mixed = reference.causal_conv(qkv, layer.conv_weight, self.history).to(qkv.dtype)
        out, states = reference.delta_rule(mixed, a, b, layer.a_log, layer.dt_bias, self.state)
        gate = z.reshape(-1, heads.nv, heads.dv)
        return reference.gated_rms_norm(out.to(qkv.dtype), gate, layer.norm_weight, self.eps).flatten(1), states

    def accept(self, qkv: Tensor, states: Tensor, tokens: int) -> None:
        """Advance by the first `tokens` tokens of a run."""
        self.state = states[tokens]
        self.history = torch.cat([self.history, reference.exact(qkv[:tokens])])[-self.history.shape[0] :]


def cu_seqlens(backend: Backend, lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(backend.device)


def columns(backend: Backend, sequences: list[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cu_seqlens, context_lens, read_slot and write_slot of a batch."""
    picked = ([s.context for s in sequences], [s.read for s in sequences], [s.write for s in sequences])
    return cu_seqlens(backend, [s.length for s in sequences]), *(backend.tensor(values) for values in picked)


def snapshot_rows(backend: Backend, rows: list[tuple[int, int, int]]) -> Tensor:
    return backend.tensor(rows).reshape(-1, 3)
