"""Norm, rope and page write of full attention."""

from collections.abc import Iterator

import torch

from ..cases import Case, Inputs, Sizes, operator_case

HEAD_DIM, ROTARY, PAGE = 256, 64, 64


def cases(sizes: Sizes) -> Iterator[Case]:
    """The head counts of every published model at a prefill, 16:2 also at decode."""
    shapes = [(16, 2, tokens) for tokens in sizes.decode]
    shapes += [(q_heads, kv_heads, sizes.prefill) for q_heads, kv_heads in ((8, 2), (16, 2), (24, 4), (32, 2))]
    for q_heads, kv_heads, tokens in shapes:

        def projection(draw: Inputs, q_heads=q_heads, kv_heads=kv_heads, tokens=tokens) -> tuple:
            pages = -(-tokens // PAGE)
            kv = draw.randn(pages, 2, kv_heads, PAGE, HEAD_DIM)
            slots = torch.randperm(pages * PAGE)[:tokens] if tokens < PAGE else torch.arange(tokens)
            angles = draw.randn(tokens, ROTARY, dtype=torch.float32)
            qkv = draw.randn(tokens, 2 * (q_heads + kv_heads) * HEAD_DIM)
            return qkv, draw.randn(HEAD_DIM), draw.randn(HEAD_DIM), angles, kv, slots.to(qkv.device), 1e-6

        size = tokens * (4 * (q_heads + 2 * kv_heads) * HEAD_DIM + 4 * ROTARY + 8)
        yield operator_case("attention_prologue", f"{tokens} tokens, {q_heads}:{kv_heads} heads", size, projection)
