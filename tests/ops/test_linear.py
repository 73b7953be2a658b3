"""Claims about `linear`."""

import pytest

from .backends import relative_error
from .reference import exact


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
