"""One small valid call of every operator, for the claims that hold for all of them."""

from collections.abc import Callable

import torch

from tokenspeed.ops.ffn_block import ffn_block_scratch
from tokenspeed.ops.fp8 import quantise_blocks
from tokenspeed.ops.moe_block import moe_block_scratch

from .backends import Backend
from .gdn import Layer, cu_seqlens, published
from .paging import PUBLISHED, Pages

EPS = 1e-6


def _gdn(backend: Backend):
    """A layer with two sequences under way, a start and a padding row: (layer, ragged columns, decode columns)."""
    layer = Layer(backend, published(2), slots=5, window=6)
    layer.arena.zero_()  # comparisons of the dispatcher's own checks do not know that NaN equals itself
    layer.prepare(3, 20, pending=2)
    layer.prepare(0, 70)
    return layer


def _prefill_columns(backend: Backend):
    contexts, reads, writes = backend.tensor([20, 0, 70]), backend.tensor([3, 1, 0]), backend.tensor([3, 1, 4])
    return cu_seqlens(backend, [5, 4, 0]), contexts, reads, writes, backend.tensor([[0, 22, 2], [1, 4, -1]])


def causal_conv1d(backend: Backend):
    layer = _gdn(backend)
    return layer.projections(9)[0], layer.conv_weight, layer.window, *_prefill_columns(backend)


def gated_delta_rule_prefill(backend: Backend):
    layer = _gdn(backend)
    qkv, _, a, b = layer.projections(9)
    record = (layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor)
    return qkv.contiguous(), a, b, *record, *_prefill_columns(backend), 5


def gated_delta_rule_decode(backend: Backend):
    layer = _gdn(backend)
    weights = (layer.conv_weight, layer.a_log, layer.dt_bias, layer.norm_weight, EPS)
    columns = (backend.tensor(values) for values in ([20, -1, 70], [3, -1, 0], [3, -1, 4]))
    return *layer.projections(6), *weights, layer.state, layer.ring, layer.cursor, layer.window, *columns


def _attention(backend: Backend, contexts: list[int], stored: list[int]):
    pages = Pages(backend, PUBLISHED[4], 7)
    pages.arena.zero_()
    table = pages.table([pages.store(tokens)[0] for tokens in stored])
    return pages, table, backend.tensor(contexts)


def paged_attention_prefill(backend: Backend):
    pages, table, contexts = _attention(backend, [60, 0], [65, 3])
    return *pages.queries(8), pages.kv, table, cu_seqlens(backend, [5, 3]), contexts, 5, 1 / 16


def paged_attention_decode(backend: Backend):
    pages, table, contexts = _attention(backend, [63, -1, 3], [65, 0, 5])
    return *pages.queries(6), pages.kv, table, contexts, 1 / 16, 2


def attention_prologue(backend: Backend):
    heads, pages = PUBLISHED[4], Pages(backend, PUBLISHED[4], 3)
    pages.arena.zero_()
    qkv = backend.randn(4, 2 * (heads.query + heads.kv) * heads.dim)
    cos_sin = backend.randn(4, 64, dtype=torch.float32)
    slots = backend.tensor([130, -1, 0, 64], torch.int64)
    return qkv, backend.randn(256), backend.randn(256), cos_sin, pages.kv, slots, EPS


def write_kv(backend: Backend):
    pages = Pages(backend, PUBLISHED[4], 3)
    pages.arena.zero_()
    return backend.randn(3, 2, 256), backend.randn(3, 2, 256), pages.kv, backend.tensor([130, -1, 0], torch.int64)


def rope(backend: Backend):
    return backend.randn(3, 2, 256), backend.randn(3, 64, dtype=torch.float32)


def moe_route(backend: Backend):
    return backend.randn(6, 256), 8, backend.tensor([3, -1, 0])


def moe_experts(backend: Backend):
    routed = torch.ops.tokenspeed.moe_route(backend.randn(5, 8), 2)
    return backend.randn(5, 128), *routed, backend.randn(8, 128, 128), backend.randn(8, 128, 64)


def moe_block(backend: Backend):
    x, residual, norm = backend.randn(3, 128), backend.randn(3, 128), backend.randn(128) * 0.1
    in_proj, shared_down = backend.randn(2 * 64 + 256 + 8, 128) * 0.1, backend.randn(128, 64) * 0.1
    gate_up, down = backend.randn(256, 128, 128) * 0.1, backend.randn(256, 128, 64) * 0.1
    scratch = backend.tensor([0] * moe_block_scratch(256, 8, 128))
    return x, residual, norm, EPS, in_proj, 256, 8, gate_up, down, shared_down, scratch


def ffn_block(backend: Backend):
    x, residual, norm = backend.randn(3, 128), backend.randn(3, 128), backend.randn(128) * 0.1
    weights = (backend.randn(2 * 192, 128) * 0.1, backend.randn(128, 192) * 0.1)
    return x, residual, norm, EPS, *weights, backend.tensor([0] * ffn_block_scratch(192))


def linear(backend: Backend):
    return backend.randn(3, 512), backend.randn(96, 512)


def linear_fp8(backend: Backend):
    x, x_scale = torch.ops.tokenspeed.quantise_groups(backend.randn(3, 512))
    return x, x_scale, *quantise_blocks(backend.randn(96, 512)), backend.dtype


def quantise_groups(backend: Backend):
    return (backend.randn(3, 1024),)


def add_rms_norm_linear(backend: Backend):
    return backend.randn(3, 1024), backend.randn(3, 1024), backend.randn(1024), EPS, backend.randn(96, 1024)


def silu_mul_linear(backend: Backend):
    return backend.randn(3, 1024), backend.randn(96, 512)


def add_gated_silu_mul_linear(backend: Backend):
    return backend.randn(3, 96), backend.randn(3, 1024), backend.randn(96, 512), backend.randn(3, 1)


def gated_rms_norm_linear(backend: Backend):
    heads = (backend.randn(15, 2, 128), backend.randn(15, 2, 128), backend.randn(128))
    return *heads, EPS, *quantise_blocks(backend.randn(96, 256)), backend.randn(2, 256)


def rms_norm(backend: Backend):
    return backend.randn(3, 1024), backend.randn(1024), EPS


def add_rms_norm(backend: Backend):
    return backend.randn(3, 1024), backend.randn(3, 1024), backend.randn(1024), EPS


def gated_rms_norm(backend: Backend):
    return backend.randn(3, 2, 128), backend.randn(3, 2, 128), backend.randn(128), EPS


def silu_mul(backend: Backend):
    return (backend.randn(3, 1024),)


def add_sigmoid_gated(backend: Backend):
    return backend.randn(3, 1024), backend.randn(3, 1024), backend.randn(3, 1)


def sample(backend: Backend):
    columns = [backend.tensor([0.0, 0.7, 1.3], torch.float32), backend.tensor([0, 20, 0])]
    columns += [backend.tensor(values, torch.float32) for values in ([1.0, 0.9, 0.8], [0.0, 0.05, 0.0])]
    return backend.randn(3, 4096), *columns, *(backend.tensor(values, torch.int64) for values in ([1, 2, 3], [0, 5, 9]))


def copy_states(backend: Backend):
    slots = torch.randint(0, 256, (6, 4096), dtype=torch.uint8).to(backend.device)
    return slots, backend.tensor([3, -1, 3, 1]), backend.tensor([0, 2, 5, -1])


def copy_pages(backend: Backend):
    pages = backend.randn(5, 2, 2, 2, 64, 256)
    return pages, backend.tensor([3, -1, 3]), backend.tensor([0, 2, 4]), backend.tensor([64, 5, 1])


def _progress(backend: Backend):
    """Two sequences that go on and a row of padding: (length, left, prompt, ids) of three indices."""
    numbers = [backend.tensor(values) for values in ([70, 5, 0], [9, 1, 0], [64, 5, 0])]
    return *numbers, backend.tensor([[3, 4, 5], [6, 7, 8], [0, 0, 0]], torch.int64)


def decode_rows(backend: Backend):
    packed, inv_freq = backend.tensor([[1, 0, 2], [3, 4, -1], [3, 4, -1]]), torch.tensor([1.0, 0.01])
    pages, capacity = backend.tensor([[5, 2], [1, 3], [0, 0]]), backend.tensor([128, 64, 0])
    return packed, *_progress(backend), pages, capacity, inv_freq.to(backend.device), 2, 1.0, 64


def paged_rows(backend: Backend):
    pages, capacity = backend.tensor([[5, 2], [1, 3], [0, 0]]), backend.tensor([128, 64, 0])
    index, inv_freq = backend.tensor([1, 0, 2], torch.int64), torch.tensor([1.0, 0.01], device=backend.device)
    return index, backend.tensor([5, 70, -1]), pages, capacity, inv_freq, 2, 1.0, -1, 64


def draft_rows(backend: Backend):
    _, _, prompt, ids = _progress(backend)
    index, context = backend.tensor([1, 0, 2], torch.int64), backend.tensor([63, 70, -1])
    return index, context, backend.tensor([128, 64, 0]), prompt, ids, 3


def accept_tokens(backend: Backend):
    length, left, _, ids = _progress(backend)
    chosen, tokens = (backend.tensor(x, torch.int64) for x in ([[7, 1], [4, 2], [0, 0]], [[6, 7], [3, 9], [0, 0]]))
    outputs = backend.tensor([[1, 2], [7, 8], [0, 1]], torch.int64)
    index, stops = backend.tensor([1, 0, 2], torch.int64), backend.tensor([[-1], [2], [-1]], torch.int64)
    contexts, min_tokens = backend.tensor([5, 70, -1]), backend.tensor([0, 0, 0])
    return chosen, tokens, outputs, contexts, index, min_tokens, stops, length, left, ids


SAMPLES: dict[str, Callable] = {
    call.__name__: call
    for call in (
        accept_tokens,
        add_gated_silu_mul_linear,
        add_rms_norm,
        add_rms_norm_linear,
        add_sigmoid_gated,
        attention_prologue,
        causal_conv1d,
        copy_pages,
        copy_states,
        decode_rows,
        draft_rows,
        ffn_block,
        gated_delta_rule_decode,
        gated_delta_rule_prefill,
        gated_rms_norm,
        gated_rms_norm_linear,
        linear,
        linear_fp8,
        moe_block,
        moe_experts,
        moe_route,
        paged_attention_decode,
        paged_attention_prefill,
        paged_rows,
        quantise_groups,
        rms_norm,
        rope,
        sample,
        silu_mul,
        silu_mul_linear,
        write_kv,
    )
}
