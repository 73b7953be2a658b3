"""Norm, rope and page write of full attention."""

from collections.abc import Iterator

import torch

from tokenspeed.ops.fp8 import FP8

from ..cases import Case, Inputs, Sizes, operator_case

HEAD_DIM, ROTARY, PAGE = 256, 64, 64


def cases(sizes: Sizes) -> Iterator[Case]:
    """The head counts of every published model at a prefill, 16:2 also at decode and with e4m3 pages."""
    dtype = torch.bfloat16
    shapes = [(16, 2, tokens, dtype) for tokens in sizes.decode]
    shapes += [(q_heads, kv_heads, sizes.prefill, dtype) for q_heads, kv_heads in ((8, 2), (16, 2), (24, 4), (32, 2))]
    shapes += [(16, 2, sizes.prefill, FP8)]
    for q_heads, kv_heads, tokens, dtype in shapes:

        def projection(draw: Inputs, q_heads=q_heads, kv_heads=kv_heads, tokens=tokens, dtype=dtype) -> tuple:
            pages = -(-tokens // PAGE)
            kv = draw.randn(pages, 2, kv_heads, PAGE, HEAD_DIM).to(dtype)
            slots = torch.randperm(pages * PAGE)[:tokens] if tokens < PAGE else torch.arange(tokens)
            angles = draw.randn(tokens, ROTARY, dtype=torch.float32)
            qkv = draw.randn(tokens, 2 * (q_heads + kv_heads) * HEAD_DIM)
            return qkv, draw.randn(HEAD_DIM), draw.randn(HEAD_DIM), angles, kv, slots.to(qkv.device), 1e-6

        written = 2 * q_heads + 2 * kv_heads * dtype.itemsize
        size = tokens * ((2 * (q_heads + 2 * kv_heads) + written) * HEAD_DIM + 4 * ROTARY + 8)
        what = f"{tokens} tokens, {q_heads}:{kv_heads} heads" + (", e4m3 pages" if dtype is FP8 else "")
        yield operator_case("attention_prologue", what, size, projection)
