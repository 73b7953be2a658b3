"""Claims about `linear` and the operators that lead into it."""

import pytest

from . import reference
from .backends import Backend, relative_error, same_bits
from .reference import exact

EPS = 1e-6
ROWS = [0, 1, 2, 7, 8, 9, 17]


def shapes(backend: Backend) -> list[tuple[int, int]]:
    return [(512, 96), (1056, 40)] if backend.kernels else [(512, 96), (7, 5)]


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17])
def test_linear_is_x_times_the_transposed_weight(backend, rows):
    for inputs, outputs in [(512, 96)] if backend.kernels else [(512, 96), (7, 5)]:
        x, weight = backend.randn(rows, inputs), backend.randn(outputs, inputs)
        backend.assert_close(backend.op("linear")(x, weight), exact(x) @ exact(weight).T)


def test_linear_accumulates_in_fp32(backend):
    """4096 equal products: a bf16 accumulator would stop growing at 256."""
    x = backend.randn(1, 4096).fill_(1)
    out = backend.op("linear")(x, x.clone())
    assert relative_error(out, exact(x) @ exact(x).T) < 1e-6


@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm_linear_gives_the_product_of_the_norm_of_the_rounded_sum(backend, rows):
    for inputs, outputs in shapes(backend):
        x, residual, norm_weight = backend.randn(rows, inputs), 3 * backend.randn(rows, inputs), backend.randn(inputs)
        weight = backend.randn(outputs, inputs)
        out, normed, total = backend.op("add_rms_norm_linear")(x, residual, norm_weight, EPS, weight)
        assert same_bits(total.cpu(), (exact(x) + exact(residual)).to(backend.dtype))
        backend.assert_close(normed, reference.rms_norm(total, norm_weight, EPS))
        backend.assert_close(out, exact(normed) @ exact(weight).T)


@pytest.mark.parametrize("rows", ROWS)
def test_silu_mul_linear_gives_the_product_of_the_gated_half(backend, rows):
    for inputs, outputs in shapes(backend):
        x, weight = backend.randn(rows, 2 * inputs), backend.randn(outputs, inputs)
        gate, up = exact(x).chunk(2, dim=1)
        backend.assert_close(backend.op("silu_mul_linear")(x, weight), (reference.silu(gate) * up) @ exact(weight).T)


@pytest.mark.parametrize("rows", ROWS)
def test_add_gated_silu_mul_linear_adds_the_gated_product(backend, rows):
    for inputs, outputs in shapes(backend):
        x, weight = backend.randn(rows, 2 * inputs), backend.randn(outputs, inputs)
        y, gate = 9 * backend.randn(rows, outputs), backend.randn(rows, 1)
        first, second = exact(x).chunk(2, dim=1)
        product = (reference.silu(first) * second) @ exact(weight).T
        expected = exact(y) + reference.sigmoid(gate) * product
        backend.op("add_gated_silu_mul_linear")(y, x, weight, gate)
        backend.assert_close(y, expected)
