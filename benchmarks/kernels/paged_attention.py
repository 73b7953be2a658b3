"""Gated attention over paged KV: decode of one or a few tokens, and prefill with and without a cached prefix."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tokenspeed.ops.fp8 import to_fp8

from ..cases import Case, Inputs, Sizes, optional_peer, torch_implementation, without_last

DIM, PAGE, SCALE = 256, 64, 1 / 16
WORKSPACE = 128 << 20
_flashinfer_decode = optional_peer("flashinfer", "BatchDecodeWithPagedKVCacheWrapper")
_flashinfer_prefill = optional_peer("flashinfer", "BatchPrefillWithPagedKVCacheWrapper")


class Shape(NamedTuple):
    """`batch` sequences of `context` cached and `tokens` new tokens each; e4m3: the pages, else bf16."""

    q_heads: int
    kv_heads: int
    batch: int
    context: int
    tokens: int = 1
    e4m3: bool = False

    @property
    def length(self) -> int:
        return self.context + self.tokens

    @property
    def pages(self) -> int:
        return -(-self.length // PAGE)

    @property
    def bytes(self) -> int:
        """Keys and values once; queries, gates and outputs."""
        kv = 2 * self.batch * self.length * self.kv_heads * DIM * (1 if self.e4m3 else 2)
        return kv + 3 * self.batch * self.tokens * self.q_heads * DIM * 2

    @property
    def flops(self) -> int:
        """Of the pairs of a token and a key that it sees: the two products."""
        pairs = self.tokens * self.context + self.tokens * (self.tokens + 1) // 2
        return 4 * DIM * self.q_heads * self.batch * pairs


class Peers(NamedTuple):
    """What peers get besides the operator's arguments: pages in bf16, contiguous k and v [B, heads, L, D], a planned
    wrapper."""

    kv: Tensor
    k: Tensor
    v: Tensor
    flashinfer: object | None


def _draw(draw: Inputs, shape: Shape, prefill: bool) -> tuple:
    heads = shape.q_heads
    kv = draw.randn(shape.batch * shape.pages, 2, shape.kv_heads, PAGE, DIM)
    order = torch.randperm(len(kv), device=draw.device, dtype=torch.int32)
    q = draw.randn(shape.batch * shape.tokens, heads, DIM)
    gate = draw.randn(shape.batch * shape.tokens, heads, 2 * DIM)[..., DIM:]
    contexts = draw.integers([shape.context] * shape.batch)
    table = order.view(shape.batch, shape.pages)
    k, v = (
        kv[table.long(), part].transpose(1, 2).flatten(2, 3)[:, :, : shape.length].contiguous() for part in range(2)
    )
    starts = [i * shape.tokens for i in range(shape.batch + 1)]
    ragged = (draw.integers(starts), contexts, shape.tokens) if prefill else (contexts,)
    peers = Peers(kv, k, v, _planned(shape, table, kv.device, prefill))
    return q, gate, to_fp8(kv) if shape.e4m3 else kv, table, *ragged, SCALE, peers


def _planned(shape: Shape, table: Tensor, device: torch.device, prefill: bool):
    """FlashInfer's wrapper with its plan for this batch, made outside the timed calls."""
    wanted = _flashinfer_prefill if prefill else _flashinfer_decode
    if wanted is None or device.type != "cuda":
        return None
    pages = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.pages
    last = torch.full((shape.batch,), shape.length - (shape.pages - 1) * PAGE, dtype=torch.int32)
    heads = (shape.q_heads, shape.kv_heads, DIM, PAGE)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    try:
        if prefill:
            wrapper = wanted(workspace, "HND")
            starts = torch.arange(shape.batch + 1, dtype=torch.int32) * shape.tokens
            wrapper.plan(starts, pages, table.flatten(), last, *heads, causal=True, q_data_type=torch.bfloat16)
        else:
            wrapper = wanted(workspace, "HND", use_tensor_cores=True)
            options = {"q_data_type": torch.bfloat16, "q_len_per_req": shape.tokens}
            wrapper.plan(pages, table.flatten(), last, *heads, **options)
    except Exception as error:  # the row then says what a call of the peer says
        return error
    return wrapper


def _flashinfer(q: Tensor, gate: Tensor, kv: Tensor, *rest) -> Tensor:
    """Without the output gate."""
    wrapper = rest[-1].flashinfer
    if isinstance(wrapper, Exception):
        raise wrapper
    return wrapper.run(q, rest[-1].kv)


def _sdpa(backend: SDPBackend, shape: Shape) -> Callable:
    """torch's SDPA on contiguous keys and values, without the output gate."""

    def attend(q: Tensor, *rest) -> Tensor:
        k, v = rest[-1].k, rest[-1].v
        q = q.view(shape.batch, shape.tokens, shape.q_heads, DIM).transpose(1, 2)
        options: dict = {"scale": SCALE, "enable_gqa": True}
        if shape.context == 0:
            options["is_causal"] = True
        elif shape.tokens > 1:
            options["attn_mask"] = causal_lower_right(shape.tokens, shape.length)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attend


def _bf16_pages(function: Callable) -> Callable:
    return lambda q, gate, kv, *rest: function(q, gate, rest[-1].kv, *rest[:-1])


def _case(shape: Shape, prefill: bool) -> Case:
    kernel = "paged_attention_prefill" if prefill else "paged_attention_decode"
    installed = _flashinfer_prefill if prefill else _flashinfer_decode
    peers = {
        "SDPA flash, contiguous": _sdpa(SDPBackend.FLASH_ATTENTION, shape),
        "SDPA cuDNN, contiguous": _sdpa(SDPBackend.CUDNN_ATTENTION, shape),
        "FlashInfer": _flashinfer if installed else None,
    }
    if shape.batch * shape.tokens * shape.length <= 1 << 20:  # its mask and its gathered KV are in memory
        peers["torch"] = without_last(torch_implementation(kernel))
    what = f"{shape.batch} x {shape.tokens} after {shape.context}"
    operator = getattr(torch.ops.tokenspeed, kernel).default
    if not prefill:
        operator = partial(operator, settled=True)  # the launch ahead is the same operator's, or none
    if shape.e4m3:
        peers["the same, bf16 pages"] = _bf16_pages(operator)
        what += ", e4m3 pages"
    return Case(
        kernel,
        f"{shape.q_heads}:{shape.kv_heads} heads, {what}",
        shape.bytes,
        lambda draw: _draw(draw, shape, prefill),
        without_last(operator),
        flops=shape.flops,
        peers=peers,
        ceiling="matmul" if prefill else "read",
    )


def cases(sizes: Sizes) -> Iterator[Case]:
    """Head counts of the published models; decode at its goals' lengths, prefill as first chunk and as a later one."""
    if len(sizes.decode) == 1:
        yield _case(Shape(8, 2, 1, 255), prefill=False)
        yield _case(Shape(8, 2, 1, 255, e4m3=True), prefill=False)
        yield _case(Shape(8, 2, 1, 100, 28), prefill=True)
        return
    decodes = [
        Shape(16, 2, 64, 8191),
        Shape(16, 2, 1, 32767),
        Shape(16, 2, 1, 1023),
        Shape(16, 2, 8, 8191),
        Shape(8, 2, 8, 8191),
        Shape(32, 2, 64, 8191),
        Shape(16, 2, 8, 8188, tokens=4),
        Shape(32, 2, 8, 8188, tokens=4),
        Shape(16, 2, 256, 500),
        Shape(16, 2, 64, 8191, e4m3=True),
        Shape(16, 2, 1, 50175, e4m3=True),
        Shape(16, 2, 8, 50175, e4m3=True),
        Shape(32, 2, 8, 8188, tokens=4, e4m3=True),
    ]
    prefills = [
        Shape(16, 2, 1, 0, tokens=8192),
        Shape(16, 2, 1, 0, tokens=16384),
        Shape(16, 2, 1, 8192, tokens=4096),
        Shape(16, 2, 1, 30720, tokens=2048),
        Shape(16, 2, 1, 30720, tokens=8),
        Shape(16, 2, 1, 30720, tokens=128),
        Shape(16, 2, 1, 30720, tokens=512),
        Shape(16, 2, 1, 0, tokens=8192, e4m3=True),
        Shape(16, 2, 1, 30720, tokens=512, e4m3=True),
        Shape(16, 2, 1, 30720, tokens=1024),
        Shape(16, 2, 1, 131072, tokens=256),
        Shape(16, 2, 4, 16384, tokens=128),
        Shape(32, 2, 1, 0, tokens=8192),
        Shape(24, 4, 1, 0, tokens=8192),
        Shape(8, 2, 1, 0, tokens=8192),
        Shape(16, 2, 16, 0, tokens=1024),
    ]
    yield from (_case(shape, prefill=False) for shape in decodes)
    yield from (_case(shape, prefill=True) for shape in prefills)
