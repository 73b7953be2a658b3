"""Claims about the norm and gated-sum kernels at their edges: vector tails, both tilings, strides, every schedule."""

import pytest
import torch

from tests.kernels.launches import torch_served
from tests.ops import reference
from tests.ops.backends import same_bits

pytest_plugins = ["tests.kernels.schedules"]

EPS = 1e-6


@pytest.mark.parametrize("width", [8, 248, 256, 264, 1032, 8192])
def test_rows_of_any_number_of_vectors(scheduled, width):
    x, weight = scheduled.randn(3, width), scheduled.randn(width)
    results = []
    assert torch_served(lambda: results.append(scheduled.op("rms_norm")(x, weight, EPS))) == []
    scheduled.assert_close(results[0], reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("width", [8, 1032, 4104])
def test_many_rows_take_more_vectors_a_thread(backend, width):
    rows = 1025 if width == 8 else 1024
    x, weight = backend.randn(rows, width), backend.randn(width)
    out = backend.op("rms_norm")(x, weight, EPS)
    backend.assert_close(out, reference.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("width", [8, 1032])
def test_many_rows_share_blocks(backend, width):
    rows = 1025 if width == 8 else 1024  # a last block with one row of four
    x, residual, weight = backend.randn(rows, width), backend.randn(rows, width), backend.randn(width)
    total = (reference.exact(x) + reference.exact(residual)).to(backend.dtype)
    out, summed = backend.op("add_rms_norm")(x, residual, weight, EPS)
    assert same_bits(summed.cpu(), total)
    backend.assert_close(out, reference.rms_norm(total, weight, EPS))


def test_rows_a_stride_apart(scheduled):
    wide, weight = scheduled.randn(5, 3 * 264), scheduled.randn(264)
    x, residual = wide[:, 264:528], scheduled.randn(5, 264)
    total = (reference.exact(x) + reference.exact(residual)).to(scheduled.dtype)
    scheduled.assert_close(scheduled.op("rms_norm")(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    out, summed = scheduled.op("add_rms_norm")(x, residual, weight, EPS)
    assert same_bits(summed.cpu(), total.cpu())
    scheduled.assert_close(out, reference.rms_norm(total, weight, EPS))


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 16), (11, 3), (2, 48)])
def test_gated_heads_by_any_strides(scheduled, tokens, heads):
    x = scheduled.randn(tokens, 2 * heads, 128)[:, ::2]
    gate = scheduled.randn(heads, tokens, 256)[..., 128:].transpose(0, 1)
    weight, results = scheduled.randn(128), []
    assert torch_served(lambda: results.append(scheduled.op("gated_rms_norm")(x, gate, weight, EPS))) == []
    expected = reference.gated_rms_norm(x, gate, weight, EPS)
    scheduled.assert_close(results[0].flatten(1), expected.flatten(1))


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 5608), (129, 32)])
def test_sums_that_do_not_fill_their_blocks(scheduled, rows, width):
    x = scheduled.randn(rows, 2 * width + 8)[:, : 2 * width]
    gate, up = reference.exact(x).chunk(2, dim=1)
    scheduled.assert_close(scheduled.op("silu_mul")(x), reference.silu(gate) * up)
    y, x = scheduled.randn(rows, width + 8)[:, :width], x[:, :width]
    weight = scheduled.randn(rows, 3)[:, 1:2]
    expected = reference.exact(y) + reference.sigmoid(weight) * reference.exact(x)
    scheduled.op("add_sigmoid_gated")(y, x, weight)
    scheduled.assert_close(y, expected)


def test_equal_rows_give_equal_bits_wherever_they_stand(backend):
    row, weight = backend.randn(1, 1024), backend.randn(1024)
    alone = backend.op("rms_norm")(row, weight, EPS)
    for rows in (2, 7):
        assert same_bits(backend.op("rms_norm")(row.expand(rows, -1), weight, EPS), alone.expand(rows, -1))
    gate = torch.zeros_like(row).view(1, 8, 128)
    assert not backend.op("gated_rms_norm")(row.view(1, 8, 128), gate, weight[:128].contiguous(), EPS).any()
