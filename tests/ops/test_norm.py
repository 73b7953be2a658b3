"""Claims about the norms and the gated sums: `rms_norm`, `add_rms_norm`, `gated_rms_norm`, `silu_mul`,
`add_sigmoid_gated`."""

import pytest
import torch

from tokenspeed import ops
from tokenspeed.ops.norm import constant

from . import reference
from .backends import same_bits

EPS = 1e-6
ROWS = [0, 1, 3, 17]


def widths(backend):
    return [1024] if backend.kernels else [1024, 37]


@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_has_a_zero_centred_weight(backend, rows):
    for width in widths(backend):
        x, weight = 3 * backend.randn(rows, width), backend.randn(width)
        backend.assert_close(backend.op("rms_norm")(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def test_rms_norm_takes_any_leading_shape_and_row_stride(backend):
    fused, weight = backend.randn(5, 3, 1024), backend.randn(256)
    heads = fused.unflatten(2, (2, 512))[..., :256]  # the queries of a projection that also holds their gates
    out = backend.op("rms_norm")(heads, weight, EPS)
    assert out.is_contiguous()
    backend.assert_close(out.flatten(0, -2), reference.rms_norm(heads, weight, EPS).flatten(0, -2))


def test_rms_norm_of_tiny_huge_and_zero_rows(backend):
    x = backend.randn(3, 1024) * backend.tensor([[1e-5], [1e4], [0.0]], backend.dtype)
    out = backend.op("rms_norm")(x, weight := backend.randn(1024), EPS)
    for row in range(3):
        backend.assert_close(out[row], reference.rms_norm(x, weight, EPS)[row])


@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm_normalises_the_rounded_sum(backend, rows):
    for width in widths(backend):
        x, residual, weight = backend.randn(rows, width), 2 * backend.randn(rows, width), backend.randn(width)
        total = (reference.exact(x) + reference.exact(residual)).to(backend.dtype)
        out, summed = backend.op("add_rms_norm")(x, residual, weight, EPS)
        assert same_bits(summed.cpu(), total)
        backend.assert_close(out, reference.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("rows", ROWS)
def test_gated_rms_norm_gates_after_the_norm(backend, rows):
    for heads, width in [(2, 128)] if backend.kernels else [(2, 128), (3, 7)]:
        x, weight = backend.randn(rows, heads, width), backend.randn(width)
        gate = backend.randn(rows, 2 * heads * width)[:, heads * width :].unflatten(1, (heads, width))
        out = backend.op("gated_rms_norm")(x, gate, weight, EPS)
        assert out.is_contiguous()
        backend.assert_close(out.flatten(1), reference.gated_rms_norm(x, gate, weight, EPS).flatten(1))


@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul_has_the_gate_first(backend, rows):
    for width in [512] if backend.kernels else [512, 3]:
        x = backend.randn(rows, 2 * width)
        gate, up = reference.exact(x).chunk(2, dim=1)
        backend.assert_close(backend.op("silu_mul")(x), reference.silu(gate) * up)


@pytest.mark.parametrize("rows", ROWS)
def test_add_sigmoid_gated_adds_in_place(backend, rows):
    for width in widths(backend):
        y, x, gate = backend.randn(rows, width), backend.randn(rows, width), 3 * backend.randn(rows, 1)
        expected = reference.exact(y) + reference.sigmoid(gate) * reference.exact(x)
        assert backend.op("add_sigmoid_gated")(y, x, gate) is None
        backend.assert_close(y, expected)


def test_saturated_gates_neither_overflow_nor_leak(backend):
    gate = backend.tensor([[-1e4], [1e4]], backend.dtype)
    y, x = backend.randn(2, 1024), backend.randn(2, 1024)
    before = y.clone()
    backend.op("add_sigmoid_gated")(y, x, gate)
    assert same_bits(y[0], before[0])
    backend.assert_close(y[1], reference.exact(before[1]) + reference.exact(x[1]))
    out = backend.op("silu_mul")(torch.cat([gate.expand(2, 512), x[:, :512]], dim=1))
    assert not out[0].any()
    backend.assert_close(out[1], 1e4 * reference.exact(x[1, :512]))


def test_a_default_device_elsewhere_changes_nothing():
    """Also not for those that call behind it: numbers are made once."""
    x, weight = torch.randn(3, 64), torch.randn(64)
    expected = ops.rms_norm(x, weight, EPS)
    constant.cache_clear()
    with torch.device("meta"):
        within = ops.rms_norm.__wrapped__(x, weight, EPS)
    assert same_bits(within, expected) and same_bits(ops.rms_norm(x, weight, EPS), expected)
