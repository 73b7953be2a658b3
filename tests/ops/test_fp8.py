"""Claims about e4m3 weights, activations and pages: exact against what they stand for, however ragged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenspeed.ops.fp8 import BLOCK, FP8, dequantise, from_fp8, quantise_blocks, to_fp8

from . import reference
from .backends import bounded, same_bits
from .reference import exact

EPS = 1e-6
RAGGED = [(1, 1), (127, 129), (128, 128), (129, 127), (300, 520), (40, 1056), (512, 16)]


def stands_for(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight in double precision, element by element: each looks its block up."""
    row, column = (torch.arange(size) // BLOCK for size in weight.shape[-2:])
    return weight.cpu().double() * scale.cpu().double()[..., row[:, None], column]


def drawn(backend, *shape: int) -> tuple[Tensor, Tensor]:
    """A weight whose scales differ from block to block, powers of ten apart."""
    weight, scale = quantise_blocks(backend.randn(*shape))
    return weight, scale * 10 ** torch.rand_like(scale)


def multiplied(backend, x: Tensor) -> Tensor:
    """The operand that stands for x, in double precision: where a kernel serves many rows, what `quantise_groups` makes
    of it."""
    if len(x) <= 16 or not backend.kernels:
        return exact(x)
    values, scale = torch.ops.tokenspeed.quantise_groups(x)
    return values.cpu().double() * scale.cpu().double()[:, torch.arange(x.shape[1]) // BLOCK]


def e4m3_numbers() -> Tensor:
    """Every finite e4m3 number, rising, by definition: (-1)^s 2^(e - 7) (1 + m / 8), and without the 1 for e = 0."""
    sizes = [(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1]
    return torch.tensor(sorted({sign * size for size in sizes for sign in (-1, 1)}), dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """The e4m3 number nearest to each element, by search; of two as near, the one with an even last bit."""
    numbers = e4m3_numbers()
    x = exact(x).clamp(-448, 448)
    distance = (x[..., None] - numbers).abs()
    bits = numbers.float().to(FP8).view(torch.uint8) & 1
    tied = distance == distance.amin(-1, keepdim=True)
    return numbers[(tied.int() * 2 - bits.int() * tied).argmax(-1)]


@bounded
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=40))
def test_numbers_are_rounded_to_the_nearest_and_the_largest_is_never_exceeded(values):
    x = torch.tensor(values)
    assert torch.equal(to_fp8(x).double(), nearest(x))
    between = (e4m3_numbers()[1:] + e4m3_numbers()[:-1]) / 2  # ties
    assert torch.equal(to_fp8(between.float()).double(), nearest(between))
    assert to_fp8(torch.tensor([torch.inf, -torch.inf])).tolist() == [448, -448]
    assert to_fp8(torch.tensor([torch.nan])).isnan().all()


def test_every_bit_pattern_is_read_as_its_number():
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8)
    numbers = from_fp8(patterns)
    assert numbers.dtype == torch.float32 and same_bits(numbers.nan_to_num(), patterns.float().nan_to_num())
    assert numbers.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(numbers[~numbers.isnan()].double().unique(), e4m3_numbers())


@pytest.mark.parametrize("shape", [*RAGGED, (3, 130, 140)])
def test_a_blocks_scale_is_its_largest_magnitude_over_448(fp32, shape):
    x = fp32.randn(*shape)
    x[..., :BLOCK, :BLOCK] = 0
    weight, scale = quantise_blocks(x)
    assert weight.dtype == FP8 and weight.is_contiguous() and scale.dtype == torch.float32
    assert scale.shape == (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    assert (scale[..., 0, 0] == 1).all()
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            block = x[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            peak = block.abs().amax((-2, -1))
            assert torch.equal(torch.where(peak > 0, peak / 448, 1), scale[..., i, j])
    # A number lies within half a step of 2^-3 of itself, or of 2^-9 of the scale where e4m3 has no more exponents.
    error, bound = (stands_for(weight, scale) - exact(x)).abs(), exact(x).abs() / 16
    assert (error <= bound.maximum(stands_for(torch.ones_like(weight), scale) / 1024) * 1.001).all()


@pytest.mark.parametrize("shape", RAGGED)
def test_dequantising_looks_every_elements_block_up(fp32, shape):
    weight, scale = drawn(fp32, *shape)
    assert torch.equal(dequantise(weight, scale), stands_for(weight, scale).float())


@pytest.mark.parametrize("rows", [0, 1, 2, 9, 130])
def test_a_product_with_an_e4m3_weight_is_that_of_the_weight_it_stands_for(backend, rows):
    for outputs, inputs in [(96, 512), (136, 1056)] if backend.kernels else RAGGED:
        x, (weight, scale) = backend.randn(rows, inputs), drawn(backend, outputs, inputs)
        out = backend.op("linear")(x, weight, scale)
        assert out.dtype == backend.dtype
        if not backend.kernels:  # rounded once: equal to the exact product but for the order of fp32 sums
            precise = exact(x) @ stands_for(weight, scale).T
            bound = torch.finfo(backend.dtype).eps * precise.abs() / 2 + 1e-5 * (
                exact(x).abs() @ stands_for(weight, scale).T.abs()
            )
            assert ((exact(out) - precise).abs() <= bound).all()
        else:
            backend.assert_close(out, multiplied(backend, x) @ stands_for(weight, scale).T)


def test_every_e4m3_number_is_multiplied_exactly(backend):
    """256 weights with one bit pattern each, NaN aside, against the identity."""
    patterns = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FP8)
    patterns = torch.where(patterns.float().isnan(), torch.zeros((), dtype=torch.float32), patterns.float()).to(FP8)
    weight = patterns.view(1, 256).expand(16, 256).contiguous().to(backend.device)
    scale = torch.ones(1, 2, device=backend.device)
    x = torch.eye(256, dtype=backend.dtype, device=backend.device)
    for rows in (x[:8], x):
        for first in range(0, 256, len(rows)):
            out = backend.op("linear")(x[first : first + len(rows)], weight, scale)
            assert torch.equal(out[:, 0].double().cpu(), exact(patterns[first : first + len(rows)].float()))


@pytest.mark.parametrize("rows", [0, 1, 5, 17])
def test_fused_products_take_e4m3_weights(backend, rows):
    for outputs, inputs in [(96, 512)] if backend.kernels else [(96, 512), (130, 72)]:
        weight, scale = drawn(backend, outputs, inputs)
        whole = stands_for(weight, scale)
        x, residual, norm = backend.randn(rows, inputs), backend.randn(rows, inputs), backend.randn(inputs)
        out, normed, total = backend.op("add_rms_norm_linear")(x, residual, norm, EPS, weight, scale)
        assert same_bits(total.cpu(), (exact(x) + exact(residual)).to(backend.dtype))
        backend.assert_close(normed, reference.rms_norm(total, norm, EPS))
        backend.assert_close(out, multiplied(backend, normed) @ whole.T)

        gate_up, gate = backend.randn(rows, 2 * inputs), backend.randn(rows, 1)
        first, second = exact(gate_up).chunk(2, dim=1)
        gated = (reference.silu(first) * second).to(backend.dtype).to(backend.device)
        expected = multiplied(backend, gated) @ whole.T
        backend.assert_close(backend.op("silu_mul_linear")(gate_up, weight, scale), expected)
        y = 9 * backend.randn(rows, outputs)
        expected = exact(y) + reference.sigmoid(gate) * expected
        backend.op("add_gated_silu_mul_linear")(y, gate_up, weight, gate, scale)
        backend.assert_close(y, expected)


@pytest.mark.parametrize("tokens", [0, 1, 9, 33])
def test_e4m3_experts_equal_the_sum_token_by_token(backend, tokens):
    for hidden, width in [(256, 128)] if backend.kernels else [(256, 128), (136, 72)]:
        gate, gate_scale = drawn(backend, 6, width, hidden)
        up, up_scale = drawn(backend, 6, width, hidden)
        down, down_scale = drawn(backend, 6, hidden, width)
        gate_up, scales = torch.cat([gate, up], 1), (torch.cat([gate_scale, up_scale], 1), down_scale)
        whole = torch.cat([stands_for(gate, gate_scale), stands_for(up, up_scale)], 1), stands_for(down, down_scale)
        logits, x = backend.randn(tokens, 6), backend.randn(tokens, hidden)
        routed = torch.ops.tokenspeed.moe_route(logits, 2)
        out = backend.op("moe_experts")(x, *routed, gate_up, down, 0, *scales)
        backend.assert_close(out, reference.mixture(x, routed[0], routed[1], *whole))
        held = (routed[3][2:6], gate_up[2:5], down[2:5], 2, *(scale[2:5] for scale in scales))
        here = (routed[1] >= 2) & (routed[1] < 5)
        out = backend.op("moe_experts")(x, *routed[:3], *held)
        backend.assert_close(out, reference.mixture(x, routed[0].masked_fill(~here, 0), routed[1], *whole))


@pytest.mark.parametrize(("rows", "columns"), [(0, 128), (1, 128), (3, 1024), (5, 300), (2, 7)])
def test_a_groups_scale_is_its_largest_magnitude_over_448_and_elements_are_rounded_to_nearest(backend, rows, columns):
    x = backend.randn(rows, columns)
    if rows > 1:
        x[0], x[1] = 0, 1e-38  # a group of zeros, and one too small for its scale's inverse
    values, scale = backend.op("quantise_groups")(x)
    assert (values.dtype, scale.dtype) == (FP8, torch.float32)
    assert (values.shape, scale.shape) == (x.shape, (rows, -(-columns // BLOCK)))
    for group in range(scale.shape[1]):
        part = slice(group * BLOCK, (group + 1) * BLOCK)
        rows_of_group = x[:, part].cpu().float()
        peak = rows_of_group.abs().amax(1).clamp(min=2.0**-100)
        largest = torch.full_like(peak, 448)  # torch divides by a number, or a number, with its reciprocal
        assert torch.equal(scale[:, group].cpu(), peak / largest)
        assert torch.equal(values[:, part].double().cpu(), nearest(rows_of_group * (largest / peak)[:, None]))


@pytest.mark.parametrize("rows", [0, 1, 9, 65])
def test_the_product_of_e4m3_activations_sums_in_fp32(backend, rows):
    for outputs, inputs in [(96, 512)] if backend.kernels else [(96, 512), (130, 200)]:
        x, x_scale = torch.ops.tokenspeed.quantise_groups(backend.randn(rows, inputs))
        weight, scale = drawn(backend, outputs, inputs)
        column = torch.arange(inputs) // BLOCK
        wide = x.cpu().double() * x_scale.cpu().double()[:, column]
        for dtype in (torch.float32, torch.bfloat16):
            out = backend.op("linear_fp8")(x, x_scale, weight, scale, dtype)
            assert out.dtype == dtype
            expected, sizes = wide @ stands_for(weight, scale).T, wide.abs() @ stands_for(weight, scale).T.abs()
            # A card's matrix unit keeps about 14 bits of the sum of a block.
            bound = (5e-4 if backend.name == "cuda" else 1e-5) * sizes + (
                2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
            )
            assert ((exact(out) - expected).abs() <= bound).all()
