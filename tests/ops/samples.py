"""One small valid call of every operator, for the claims that hold for all of them."""

from collections.abc import Callable

import torch

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
    return *pages.queries(6), pages.kv, table, contexts, 1 / 16


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
    return backend.randn(5, 256), 8


def moe_experts(backend: Backend):
    routed = torch.ops.tokenspeed.moe_route(backend.randn(5, 8), 2)
    return backend.randn(5, 128), *routed, backend.randn(8, 128, 128), backend.randn(8, 128, 64)


def moe_block(backend: Backend):
    x, residual, norm = backend.randn(3, 128), backend.randn(3, 128), backend.randn(128) * 0.1
    in_proj, shared_down = backend.randn(2 * 64 + 256 + 8, 128) * 0.1, backend.randn(128, 64) * 0.1
    gate_up, down = backend.randn(256, 128, 128) * 0.1, backend.randn(256, 128, 64) * 0.1
    scratch = backend.tensor([0] * moe_block_scratch(256, 8, 128))
    return x, residual, norm, EPS, in_proj, 256, 8, gate_up, down, shared_down, scratch


def linear(backend: Backend):
    return backend.randn(3, 512), backend.randn(96, 512)


def add_rms_norm_linear(backend: Backend):
    return backend.randn(3, 1024), backend.randn(3, 1024), backend.randn(1024), EPS, backend.randn(96, 1024)


def silu_mul_linear(backend: Backend):
    return backend.randn(3, 1024), backend.randn(96, 512)


def add_gated_silu_mul_linear(backend: Backend):
    return backend.randn(3, 96), backend.randn(3, 1024), backend.randn(96, 512), backend.randn(3, 1)


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


SAMPLES: dict[str, Callable] = {
    call.__name__: call
    for call in (
        add_gated_silu_mul_linear,
        add_rms_norm,
        add_rms_norm_linear,
        add_sigmoid_gated,
        attention_prologue,
        causal_conv1d,
        copy_pages,
        copy_states,
        gated_delta_rule_decode,
        gated_delta_rule_prefill,
        gated_rms_norm,
        linear,
        moe_block,
        moe_experts,
        moe_route,
        paged_attention_decode,
        paged_attention_prefill,
        rms_norm,
        rope,
        sample,
        silu_mul,
        silu_mul_linear,
        write_kv,
    )
}
