"""Claims about the attention prologue's kernel: every head count, rotary width and page, and padding."""

import pytest
import torch

from tests.kernels.launches import emulator, torch_served
from tests.ops import reference
from tests.ops.backends import same_bits
from tokenspeed.ops.fp8 import FP8, to_fp8

pytest_plugins = ["tests.kernels.schedules"]

EPS = 1e-6
D = 256


def check(backend, tokens, q_heads, kv_heads, rotary=64, page_size=64, slots=None, pages=3, dtype=None, factor=1):
    """One call on a poisoned arena of three layers, against the formulas; rows that are not named stay as they were.
    dtype: of the arena; factor: of the values and of what the keys' norm multiplies by."""
    arena = torch.full((pages, 3, 2, kv_heads, page_size, D), torch.nan, device=backend.device)
    arena = arena.to(dtype or backend.dtype)
    kv, before = arena[:, 1], arena.clone()
    slots = torch.randperm(pages * page_size)[:tokens].tolist() if slots is None else slots
    wide = backend.randn(tokens, 2 * (q_heads + kv_heads) * D + 64)
    qkv = wide[:, : 2 * (q_heads + kv_heads) * D]
    qkv[:, (2 * q_heads + kv_heads) * D :] *= factor
    angles = backend.randn(tokens, rotary // 2, dtype=torch.float32) * 10
    cos_sin = torch.cat([angles.double().cos(), angles.double().sin()], dim=1).float()
    weights, results = (backend.randn(D), backend.randn(D) * factor), []
    numbers = backend.tensor(slots, torch.int64)
    served = torch_served(
        lambda: results.append(backend.op("attention_prologue")(qkv, *weights, cos_sin, kv, numbers, EPS))
    )
    assert served == []

    q = qkv[:, : 2 * q_heads * D].unflatten(1, (q_heads, 2, D))[:, :, 0]
    k, v = qkv[:, 2 * q_heads * D :].unflatten(1, (2, kv_heads, D)).unbind(1)
    expected_q = reference.rope(reference.rms_norm(q, weights[0], EPS), angles)
    expected_k = reference.rope(reference.rms_norm(k, weights[1], EPS), angles)
    backend.assert_close(results[0].flatten(1), expected_q.flatten(1))
    for token, slot in enumerate(slots):
        if slot >= 0:
            page, row = divmod(slot, page_size)
            if dtype is FP8:
                assert_nearest(kv[page, 0, :, row], expected_k[token])
                assert same_bits(kv[page, 1, :, row].float(), to_fp8(v[token]).float())
            else:
                backend.assert_close(kv[page, 0, :, row], expected_k[token])
                assert same_bits(kv[page, 1, :, row], v[token])
            before[page, 1, :, :, row] = arena[page, 1, :, :, row]
    assert same_bits(arena, before)


def assert_nearest(actual, expected):
    """e4m3 numbers, no further from the exact ones than half a step (2^-4 of them, or 2^-10) and the error of fp32."""
    actual, expected = actual.double().cpu(), expected.double().cpu().clamp(-448, 448)
    assert ((actual - expected).abs() <= (expected.abs() / 16).clamp(min=2**-10) + 1e-4 * expected.abs().amax()).all()


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (16, 2), (16, 4), (24, 4), (32, 2), (1, 1), (0, 2)])
def test_every_head_count(scheduled, q_heads, kv_heads):
    check(scheduled, 3, q_heads, kv_heads)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (24, 4), (1, 1), (0, 2)])
@pytest.mark.parametrize("factor", [1, 200, 2**-12])
def test_pages_in_e4m3_get_the_nearest_numbers_and_at_most_448(scheduled, q_heads, kv_heads, factor):
    check(scheduled, 3, q_heads, kv_heads, slots=[70, -1, 3], dtype=FP8, factor=factor)


@pytest.mark.parametrize("rotary", [16, 32, 64, 128, 256])
def test_every_rotary_width_that_pairs_lanes(backend, rotary):
    check(backend, 2, 2, 1, rotary=rotary)


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_pages_of_any_size(backend, page_size):
    check(backend, 3, 1, 2, page_size=page_size)


def test_padding_rows_store_nothing_and_last_rows_are_reached(scheduled):
    check(scheduled, 5, 2, 2, slots=[-1, 0, 63, -7, 3 * 64 - 1])


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9])
def test_token_counts_that_do_not_fill_the_blocks(backend, tokens):
    check(backend, tokens, 1, 1)


def test_many_tokens_take_four_heads_a_warp(backend):
    if backend.emulated is None:
        for dtype in (None, FP8):
            check(backend, 1500, 8, 2, pages=24, dtype=dtype)  # enough to fill a card of 132 multiprocessors
        return
    library = emulator()
    library.emulator_multiprocessors(1)
    for q_heads, kv_heads in ((4, 2), (6, 1), (0, 2)):  # groups of four that hold queries, keys and values together
        for dtype in (None, FP8):
            check(backend, 21, q_heads, kv_heads, slots=[*range(60, 80), -1], dtype=dtype)
    library.emulator_multiprocessors(4)
