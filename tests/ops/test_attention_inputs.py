"""Claims about what fills the pages: `rope`, `write_kv`, `attention_prologue`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.ops.fp8 import FP8

from . import reference
from .backends import bounded, same_bits
from .paging import PUBLISHED, KvHeads, Pages, layouts
from .reference import exact

EPS = 1e-6


def rotation(backend, tokens, dims):
    """Random angles [N, R / 2], and the cosines and sines the operators take, [N, R]."""
    angles = backend.randn(tokens, dims // 2, dtype=torch.float32) * 100
    return angles, torch.cat([angles.double().cos(), angles.double().sin()], dim=1).float()


def check_e4m3(backend, eight, plain, before, slots):
    """Rows that were stored hold the e4m3 number nearest to what a page of the model's type got, the largest for what
    exceeds it; the others what they held. Kernels need not round before they rotate, as torch does."""
    stored = torch.zeros(len(plain.arena) * plain.heads.page, dtype=torch.bool)
    stored[slots[slots >= 0].cpu()] = True
    stored = stored.view(len(plain.arena), 1, 1, plain.heads.page).to(slots.device)
    layer, wanted = eight.kv, plain.kv.float().clamp(-448, 448)
    rows = stored.expand(layer.shape[:-1])
    assert same_bits(layer.view(torch.uint8)[~rows], before[:, 1].view(torch.uint8)[~rows])
    assert same_bits(eight.arena[:, ::2], before[:, ::2])
    got, wanted = layer[rows].float(), wanted[rows]
    if backend.kernels:
        before_turning = wanted.abs().amax(-1, keepdim=True) / 64
        assert ((got - wanted).abs() <= wanted.abs() / 16 + before_turning + 2**-10).all()
    else:
        assert torch.equal(got, wanted.to(FP8).float())


@bounded
@given(st.data())
def test_e4m3_pages_get_the_nearest_number_to_what_others_would(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads = data.draw(st.sampled_from(layouts(backend, 4)), "heads")
    plain, eight = (Pages(backend, heads, 3, dtype) for dtype in (None, FP8))
    tokens, before = data.draw(st.integers(0, 9), "tokens"), eight.arena.clone()
    slots = backend.tensor(kv_slots(data, plain, tokens), torch.int64)
    qkv = backend.randn(tokens, 2 * (heads.query + heads.kv) * heads.dim) * 300  # values beyond 448
    weights, dims = [backend.randn(heads.dim) for _ in range(2)], 64 if heads.dim == 256 else 6
    rest = (*weights, rotation(backend, tokens, dims)[1])
    q, other_q = (backend.op("attention_prologue")(qkv, *rest, pages.kv, slots, EPS) for pages in (plain, eight))
    backend.assert_close(q, exact(other_q))
    check_e4m3(backend, eight, plain, before, slots)
    k, v = (300 * backend.randn(tokens, heads.kv, heads.dim) for _ in range(2))
    for pages in (plain, eight):
        torch.ops.tokenspeed.write_kv(k, v, pages.kv, slots)
    check_e4m3(backend, eight, plain, before, slots)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rope_turns_pairs_like_complex_numbers_and_passes_the_tail(backend, tokens):
    for dim, dims in [(256, 64)] if backend.kernels else [(256, 64), (10, 6), (8, 8), (5, 2)]:
        x = backend.randn(tokens, 3, dim)
        angles, cos_sin = rotation(backend, tokens, dims)
        out = backend.op("rope")(x, cos_sin)
        assert out.is_contiguous()
        backend.assert_close(out.flatten(1), reference.rope(x, angles).flatten(1))
        assert same_bits(out[..., dims:], x[..., dims:])


def test_rope_by_no_angle_changes_no_bit(backend):
    x, cos_sin = backend.randn(4, 2, 256), torch.cat([torch.ones(4, 32), torch.zeros(4, 32)], dim=1)
    assert same_bits(backend.op("rope")(x, cos_sin.to(backend.device)), x)


def kv_slots(data, pages, tokens):
    """Distinct rows of the arena in any order, some replaced by padding."""
    places = st.integers(0, pages.arena.shape[0] * pages.heads.page - 1)
    slots = data.draw(st.lists(places, min_size=tokens, max_size=tokens, unique=True), "kv_slots")
    return [data.draw(st.sampled_from([slot, slot, slot, -1, -5]), "slot or padding") for slot in slots]


def with_rows(pages, slots, k, v):
    """A copy of the arena in which the rows `slots` hold k and v, token by token."""
    arena, page = pages.arena.clone(), pages.heads.page
    for token, slot in enumerate(slots):
        if slot >= 0:
            arena[slot // page, 1, 0, :, slot % page] = k[token]
            arena[slot // page, 1, 1, :, slot % page] = v[token]
    return arena


@bounded
@given(st.data())
def test_write_kv_stores_rows_and_skips_negative_slots(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads = data.draw(st.sampled_from(layouts(backend, 4)), "heads")
    pages, tokens = Pages(backend, heads, 3), data.draw(st.integers(0, 9), "tokens")
    slots = kv_slots(data, pages, tokens)
    k, v = (backend.randn(tokens, heads.kv, heads.dim) for _ in range(2))
    wanted = with_rows(pages, slots, k, v)
    assert backend.op("write_kv")(k, v, pages.kv, backend.tensor(slots, torch.int64)) is None
    assert same_bits(pages.arena, wanted)


def prologue(pages, qkv, weights, cos_sin, slots):
    slots = pages.backend.tensor(slots, torch.int64)
    return pages.backend.op("attention_prologue")(qkv, *weights, cos_sin, pages.kv, slots, EPS)


def split(qkv, heads):
    """The raw q, k and v of a projection, one head at a time: per query head D of q, then D of its gate."""
    q = torch.stack([qkv[:, 2 * h * heads.dim : (2 * h + 1) * heads.dim] for h in range(heads.query)], dim=1)
    k, v = qkv[:, 2 * heads.query * heads.dim :].chunk(2, dim=1)
    return q, k.unflatten(1, (heads.kv, heads.dim)), v.unflatten(1, (heads.kv, heads.dim))


@bounded
@given(st.data())
def test_the_prologue_is_norm_rope_and_store(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads = data.draw(
        st.sampled_from(layouts(backend, data.draw(st.sampled_from(sorted(PUBLISHED)), "group"))), "heads"
    )
    pages, tokens = Pages(backend, heads, 3), data.draw(st.integers(0, 5), "tokens")
    slots = kv_slots(data, pages, tokens)
    qkv = 2 * backend.randn(tokens, 2 * (heads.query + heads.kv) * heads.dim)
    q_weight, k_weight = backend.randn(heads.dim), backend.randn(heads.dim)
    angles, cos_sin = rotation(backend, tokens, heads.dim // 4 * 2)
    before = pages.arena.clone()
    out = prologue(pages, qkv, (q_weight, k_weight), cos_sin, slots)

    q, k, v = split(qkv, heads)
    backend.assert_close(out.flatten(1), reference.rope(reference.rms_norm(q, q_weight, EPS), angles).flatten(1))
    k = reference.rope(reference.rms_norm(k, k_weight, EPS), angles)
    stored = [(token, slot) for token, slot in enumerate(slots) if slot >= 0]
    rows = [pages.kv[slot // heads.page, 0, :, slot % heads.page].flatten() for _, slot in stored]
    if stored:
        backend.assert_close(torch.stack(rows), torch.stack([k[token].flatten() for token, _ in stored]))
    # Values are copies, and everything that has no slot stays: compare bits with the keys as they were stored.
    keys = torch.zeros_like(v)
    for (token, _), row in zip(stored, rows, strict=True):
        keys[token] = row.unflatten(0, (heads.kv, heads.dim))
    now = pages.arena.clone()
    pages.arena.copy_(before)
    assert same_bits(now, with_rows(pages, slots, keys, v))


def test_the_prologue_equals_the_operators_it_fuses(backend):
    heads = PUBLISHED[4]
    fused, apart = Pages(backend, heads, 2), Pages(backend, heads, 2)
    qkv = backend.randn(4, 2 * (heads.query + heads.kv) * heads.dim)
    weights, (_, cos_sin), slots = (backend.randn(256), backend.randn(256)), rotation(backend, 4, 64), [70, -1, 0, 127]
    q, k, v = split(qkv, heads)
    norm, rope = backend.op("rms_norm"), backend.op("rope")
    backend.op("write_kv")(rope(norm(k, weights[1], EPS), cos_sin), v, apart.kv, backend.tensor(slots, torch.int64))
    wanted = rope(norm(q, weights[0], EPS), cos_sin)
    backend.assert_close(prologue(fused, qkv, weights, cos_sin, slots).flatten(1), wanted.flatten(1))
    assert torch.equal(fused.arena.isnan(), apart.arena.isnan())
    backend.assert_close(fused.arena.nan_to_num().flatten(), apart.arena.nan_to_num().flatten())


def test_one_kv_head_is_enough(fp32):
    heads = KvHeads(1, 1, dim=4, page=2)
    pages, weight = Pages(fp32, heads, 2), fp32.randn(4)
    angles, cos_sin = rotation(fp32, 1, 2)
    qkv = fp32.randn(1, 16)
    out = prologue(pages, qkv, (weight, weight), cos_sin, [3])
    fp32.assert_close(out[0], reference.rope(reference.rms_norm(qkv[:, None, :4], weight, EPS), angles)[0])
    assert same_bits(pages.kv[1, 1, 0, 1], qkv[0, 12:])
