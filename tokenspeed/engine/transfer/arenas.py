"""The two arenas as bytes, to be read for a peer and written from one."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..executor.memory import Memory
from .messages import KV, SLOTS, Part


class Move(NamedTuple):
    """Bytes from a peer's arena into the same arena here."""

    part: Part
    offset: int


class Arenas:
    """Flat views of both. On a GPU everything happens on a stream beside the engine's own."""

    def __init__(self, memory: Memory):
        self.flat = (memory.kv.view(torch.uint8).flatten(), memory.slots.flatten())
        self.row_bytes = (memory.layout.page_bytes, memory.layout.slot_bytes)
        self.device = memory.kv.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def rows(self, arena: int, numbers: Sequence[int]) -> tuple[Part, ...]:
        """Where pages or slots lie, neighbours put together, in their order."""
        size, parts = self.row_bytes[arena], []
        for number in numbers:
            last = parts[-1] if parts else None
            if last and last.offset + last.length == number * size:
                parts[-1] = Part(arena, last.offset, last.length + size)
            else:
                parts.append(Part(arena, number * size, size))
        return tuple(parts)

    def page(self, number: int) -> int:
        """Where a page begins."""
        return number * self.row_bytes[KV]

    def slot(self, number: int) -> int:
        """Where a slot begins."""
        return number * self.row_bytes[SLOTS]

    @torch.inference_mode()
    def read(self, parts: Sequence[Part]) -> bytes:
        """Their bytes, one part after the other."""
        pieces = [self.flat[part.arena][part.offset : part.offset + part.length] for part in parts]
        if self._stream is None:
            return b"".join(memoryview(piece.numpy()) for piece in pieces)
        with self._beside():
            return torch.cat(pieces).cpu().numpy().tobytes()

    @torch.inference_mode()
    def write(self, moves: Sequence[Move], data: bytes) -> None:
        """What a peer sent for the parts of these moves. Returns when it is there."""
        self.place(moves, torch.frombuffer(bytearray(data), dtype=torch.uint8))

    @torch.inference_mode()
    def place(self, moves: Sequence[Move], found: Tensor) -> None:
        """The same from memory of this process."""
        at = 0
        with self._beside():
            for part, offset in moves:
                self.flat[part.arena][offset : offset + part.length].copy_(found[at : at + part.length])
                at += part.length
        self._settle()

    @torch.inference_mode()
    def copy(self, moves: Sequence[Move], source: Sequence[Tensor]) -> None:
        """The same from a peer's arenas that this process can read. Returns when it is there."""
        with self._beside():
            for part, offset in moves:
                piece = source[part.arena][part.offset : part.offset + part.length]
                self.flat[part.arena][offset : offset + part.length].copy_(piece, non_blocking=True)
        self._settle()

    def _beside(self):
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
