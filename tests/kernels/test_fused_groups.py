"""Claims about the operators in front of a product of e4m3: they write the groups that `quantise_groups` makes of their
rounded results, so that the product has the bits of the operators one by one."""

import pytest
import torch
from torch import Tensor

from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.kernels.test_linear_fp8 import draw_weight
from tests.kernels.test_moe_block_kernel import Layer
from tests.ops.backends import Backend, same_bits

pytest_plugins = ["tests.kernels.schedules"]

EPS = 1e-6
OUTPUTS = 40


def uneven(backend: Backend, *shape: int) -> Tensor:
    """Rows, and the columns of a row, differ in size by up to 2^10 times."""
    return (
        torch.randn(shape) * 2 ** (10 * torch.rand(shape)) * 2 ** (10 * torch.rand(shape[0], *[1] * (len(shape) - 1)))
    ).to(backend.device, backend.dtype)


def fused(backend: Backend, name: str, *args):
    """The operator's results, by its own kernels: a card's product may be cuBLAS's, which torch calls."""
    results = []
    served = torch_served(lambda: results.append(backend.op(name)(*args)))
    assert f"tokenspeed_torch::{name}" not in served
    return results[0]


def norm_arguments(backend: Backend, rows: int, width: int) -> tuple:
    """The last row's sum is zero, and so is the first group of the one before."""
    x = uneven(backend, rows, width + 16)[:, 8 : 8 + width]
    residual = uneven(backend, rows, width)
    residual[-1] = -x[-1]
    residual[-2, :128] = -x[-2, :128]
    return x, residual, backend.randn(width), EPS, *draw_weight(backend, OUTPUTS, width)


def norm_one_by_one(backend: Backend, x, residual, norm, eps, weight, scale) -> tuple[Tensor, Tensor, Tensor]:
    normed, total = backend.op("add_rms_norm")(x, residual, norm, eps)
    return backend.op("linear")(normed, weight, scale), normed, total


@pytest.mark.parametrize("rows", [17, 70])
@pytest.mark.parametrize("width", [16, 112, 128, 144, 272, 528, 1040, 2048])
def test_a_norm_of_any_width_writes_its_groups(backend, width, rows):
    """A last group cut short, rows of fewer threads than a warp's and of several warps, blocks of several rows."""
    args = norm_arguments(backend, rows, width)
    for result, expected in zip(
        fused(backend, "add_rms_norm_linear", *args), norm_one_by_one(backend, *args), strict=True
    ):
        assert same_bits(result, expected)


def gated_by_one(backend: Backend, x, weight, scale) -> Tensor:
    return backend.op("linear")(backend.op("silu_mul")(x), weight, scale)


@pytest.mark.parametrize("rows", [17, 70])
@pytest.mark.parametrize("width", [128, 384, 640])
def test_swiglu_writes_its_groups(backend, width, rows):
    x, weight = uneven(backend, rows, 2 * width + 16)[:, 8:-8], draw_weight(backend, OUTPUTS, width)
    expected = gated_by_one(backend, x, *weight)
    assert same_bits(fused(backend, "silu_mul_linear", x, *weight), expected)
    y, gate = backend.randn(rows, OUTPUTS + 8)[:, :OUTPUTS], backend.randn(rows, 3)[:, 1:2]
    added = y.clone()
    backend.op("add_sigmoid_gated")(added, expected, gate)
    fused(backend, "add_gated_silu_mul_linear", y, x, weight[0], gate, weight[1])
    assert same_bits(y, added)


def head_arguments(backend: Backend, tokens: int, heads: int, above: int | None) -> tuple:
    x = uneven(backend, tokens, 2 * heads, 128)[:, ::2]
    gate = backend.randn(heads, tokens, 256)[..., 128:].transpose(0, 1)
    done = None if above is None else uneven(backend, above, heads * 128 + 8)[:, 8:]
    return x, gate, backend.randn(128), EPS, *draw_weight(backend, OUTPUTS, heads * 128), done


def heads_one_by_one(backend: Backend, x, gate, norm, eps, weight, scale, above) -> Tensor:
    normed = backend.op("gated_rms_norm")(x, gate, norm, eps).flatten(1)
    return backend.op("linear")(normed if above is None else torch.cat([above, normed]), weight, scale)


@pytest.mark.parametrize(
    ("tokens", "heads", "above"), [(17, 1, None), (70, 3, None), (16, 2, 1), (1, 3, 16), (30, 5, 0)]
)
def test_gated_heads_write_their_groups_below_rows_that_are_done(backend, tokens, heads, above):
    args = head_arguments(backend, tokens, heads, above)
    assert same_bits(fused(backend, "gated_rms_norm_linear", *args), heads_one_by_one(backend, *args))


@pytest.mark.parametrize("held", [slice(None), slice(3, 130)], ids=["all", "a part"])
@pytest.mark.parametrize("tokens", [20, 66])
def test_a_mixture_quantises_its_norm_once(backend, tokens, held):
    """Experts of few tokens take the norm in bf16, those of many take the groups that the shared expert takes."""
    layer = Layer(backend, tokens, 256, fp8=True)
    layer.contexts = [0, -1] * (tokens // 2)
    x, residual, norm, eps, in_proj, experts, top_k, gate_up, down, shared_down, _, first, *rest = layer.arguments(held)
    router, in_scale, gate_up_scale, down_scale, shared_scale, contexts = rest
    shared, normed, total = backend.op("add_rms_norm_linear")(x, residual, norm, eps, in_proj, in_scale)
    logits = torch.ops.tokenspeed.linear(normed, router)
    weights, chosen, order, offsets = torch.ops.tokenspeed.moe_route(logits[:, :experts], top_k, contexts)
    offsets = offsets[first : first + len(down) + 1]
    routed = (weights, chosen, order, offsets.clone())
    y = backend.op("moe_experts")(normed, *routed, gate_up, down, first, gate_up_scale, down_scale)
    gate = logits[:, experts : experts + 1]
    backend.op("add_gated_silu_mul_linear")(y, shared, shared_down, gate, shared_scale)
    out, summed = fused(backend, "moe_block", *layer.arguments(held))
    assert out.isfinite().all()
    assert same_bits(out, y)
    assert same_bits(summed, total)
    short = layer.arguments(held)
    short[10] = short[10][:-1].clone()
    with pytest.raises(RuntimeError, match=f"scratch has {len(short[10])} elements"):
        backend.op("moe_block")(*short)


@pytest.mark.parametrize("seed", range(3))
def test_kernels_that_start_early_wait_for_the_ones_before(backend, seed):
    """Each tensor that is no weight comes from a copy that may not have begun; the product starts before its operand's
    kernel does, and that one before the kernel of the rows above."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    ops, device = torch.ops.tokenspeed_emulated, emulator()
    norm, heads = norm_arguments(backend, 20, 272), head_arguments(backend, 19, 2, 3)
    gate_up, down = uneven(backend, 20, 512), draw_weight(backend, OUTPUTS, 256)
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])
    for name, args, positions in (
        ("add_rms_norm_linear", norm, (0, 1, 2)),
        ("gated_rms_norm_linear", heads, (6,)),
        ("gated_rms_norm_linear", (*heads[:-1], None), (0, 1, 2)),
        ("silu_mul_linear", (gate_up, *down), (0,)),
    ):
        expected = backend.op(name)(*args)
        for position in positions:
            given = list(args)
            given[position], arena = behind_a_copy(args[position])

            def copied_and_called(name=name, given=given, arena=arena):
                ops.copy_states(arena, from_slot, to_slot)
                return getattr(ops, name)(*given)

            result = queued(device, seed, copied_and_called)
            for now, then in zip(
                *([each] if isinstance(each, Tensor) else each for each in (result, expected)), strict=True
            ):
                assert same_bits(now, then), f"{name}, argument {position}"


@pytest.mark.parametrize("rows", [17, 40])
def test_every_schedule_gives_the_same_bits(scheduled, rows):
    torch.manual_seed(rows)
    norm, heads = norm_arguments(scheduled, rows, 656), head_arguments(scheduled, rows, 3, 2)
    gate_up, down = uneven(scheduled, rows, 512), draw_weight(scheduled, OUTPUTS, 256)
    assert same_bits(fused(scheduled, "add_rms_norm_linear", *norm)[0], norm_one_by_one(scheduled, *norm)[0])
    assert same_bits(fused(scheduled, "gated_rms_norm_linear", *heads), heads_one_by_one(scheduled, *heads))
    assert same_bits(fused(scheduled, "silu_mul_linear", gate_up, *down), gated_by_one(scheduled, gate_up, *down))


def test_what_writes_no_groups_is_made_of_operators(backend):
    """Columns of SwiGLU that end inside a group, few rows, and weights without a scale."""
    for name, args in (
        ("silu_mul_linear", (backend.randn(20, 2 * 144), *draw_weight(backend, OUTPUTS, 144))),
        ("gated_rms_norm_linear", head_arguments(backend, 14, 2, 2)),
        ("gated_rms_norm_linear", (*head_arguments(backend, 20, 2, None)[:4], backend.randn(OUTPUTS, 256))),
    ):
        results = []
        served = torch_served(lambda name=name, args=args, results=results: results.append(backend.op(name)(*args)))
        assert f"tokenspeed_torch::{name}" in served
        assert results[0].isfinite().all()
