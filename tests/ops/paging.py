"""A poisoned KV arena and sequences laid out in it, for the tests of the attention operators."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Backend


class KvHeads(NamedTuple):
    """Heads of one attention layer: `group` query heads to a KV head, `dim` wide, pages of `page` tokens."""

    kv: int
    group: int
    dim: int = 256
    page: int = 64

    @property
    def query(self) -> int:
        return self.kv * self.group


# Published models: 4 query heads to a KV head (0.8B to 9B), 6 (27B), 8 (35B), 16 (122B, 397B).
PUBLISHED = {4: KvHeads(2, 4), 6: KvHeads(4, 6), 8: KvHeads(2, 8), 16: KvHeads(2, 16)}


def layouts(backend: Backend, group: int) -> list[KvHeads]:
    return [PUBLISHED[group]] if backend.kernels else [PUBLISHED[group], KvHeads(3, group, dim=10, page=16)]


class Pages:
    """The second of three layers of an arena that is NaN wherever no token was stored."""

    def __init__(self, backend: Backend, heads: KvHeads, pages: int, dtype: torch.dtype | None = None):
        """dtype: of the arena, None for the model's."""
        self.backend, self.heads = backend, heads
        shape = (pages, 3, 2, heads.kv, heads.page, heads.dim)
        self.arena = torch.full(shape, torch.nan, device=backend.device).to(dtype or backend.dtype)
        self.kv = self.arena[:, 1]
        self.free = random.Random(torch.randint(2**31, ()).item()).sample(range(1, pages), pages - 1)
        self.poisoned = 0  # a valid page that no sequence owns

    def slot(self, pages: list[int], token: int) -> int:
        return pages[token // self.heads.page] * self.heads.page + token % self.heads.page

    def store(self, length: int, prefix: list[int] | None = None) -> tuple[list[int], Tensor, Tensor]:
        """Lay `length` tokens out in free pages, after the full pages of `prefix`: its pages, and k, v
        [length, kv_heads, D]."""
        heads, pages = self.heads, list(prefix or [])
        shared = len(pages) * heads.page
        while len(pages) * heads.page < length:
            pages.append(self.free.pop())
        for token in range(shared, length):
            page, row = pages[token // heads.page], token % heads.page
            self.kv[page, :, :, row] = self.backend.randn(2, heads.kv, heads.dim)
        tokens = torch.arange(length, device=self.kv.device)
        page = torch.tensor(pages, device=self.kv.device)[tokens // heads.page] if pages else tokens
        k, v = self.kv[page, :, :, tokens % heads.page].unbind(1)
        return pages, k, v

    def table(self, rows: list[list[int]], spare: int = 2) -> Tensor:
        """The page table [B, P]; behind the end of a sequence stand -1 and a page full of NaN by turns."""
        width = max((len(row) for row in rows), default=0) + spare
        padded = [row + [(-1, self.poisoned)[i % 2] for i in range(width - len(row))] for row in rows]
        return self.backend.tensor(padded).reshape(len(rows), width)

    def queries(self, tokens: int) -> tuple[Tensor, Tensor]:
        """q, and gates that are a strided view of one projection with the raw queries: both [N, q_heads, D]."""
        heads = self.heads
        fused = self.backend.randn(tokens, heads.query, 2 * heads.dim)
        return self.backend.randn(tokens, heads.query, heads.dim), fused[..., heads.dim :]
