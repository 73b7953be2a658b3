"""Claims about the product of e4m3 activations and weights: the right scale of every row and block, tails, clusters."""

import pytest
import torch
from torch import Tensor

from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.kernels.test_linear_fp8 import by_hand, draw_weight
from tests.ops.backends import Backend, relative_error, same_bits
from tests.ops.reference import exact

pytest_plugins = ["tests.kernels.schedules"]


def by_groups(x: Tensor, scale: Tensor) -> Tensor:
    """Activations in double precision."""
    column = torch.arange(x.shape[1]) // 128
    return x.cpu().double() * scale.cpu().double()[:, column]


def arguments(backend: Backend, rows: int, outputs: int, inputs: int) -> list:
    """Rows, and the groups of a row, differ in size by up to 16 times."""
    x = torch.randn(rows, inputs) * 2 ** (4 * torch.rand(rows, -(-inputs // 128))).repeat_interleave(128, 1)[:, :inputs]
    x, x_scale = torch.ops.tokenspeed.quantise_groups(x)
    weight, scale = draw_weight(backend, outputs, inputs)
    return [x.to(backend.device), x_scale.to(backend.device), weight, scale, torch.float32]


def run(backend: Backend, values: list) -> Tensor:
    results = []
    assert torch_served(lambda: results.append(backend.op("linear_fp8")(*values))) == []
    return results[0]


def error(backend: Backend, values: list) -> float:
    """A card's matrix unit keeps about 14 bits of a sum over 128 columns."""
    return relative_error(run(backend, values), by_groups(*values[:2]) @ by_hand(*values[2:4]).T)


def tolerance(backend: Backend) -> float:
    return 1e-5 if backend.emulated is not None else 3e-4


@pytest.mark.parametrize("rows", [1, 17, 63, 64, 65, 127, 128, 129, 191, 256, 257, 400])
def test_every_way_to_fill_tiles_and_clusters(backend, rows):
    assert error(backend, arguments(backend, rows, 136, 256)) < tolerance(backend)


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("outputs", [1, 8, 127, 129, 255, 256, 257, 520])
def test_outputs_need_not_fill_tiles(backend, rows, outputs):
    values = arguments(backend, rows, outputs, 144)
    assert error(backend, values) < tolerance(backend)
    rounded = run(backend, [*values[:4], torch.bfloat16])
    assert same_bits(rounded, run(backend, values).bfloat16())


@pytest.mark.parametrize("inputs", [16, 112, 128, 144, 496, 640, 1040])
def test_inputs_need_not_fill_blocks_and_wrap_the_ring(backend, inputs):
    for rows in (5, 140):
        assert error(backend, arguments(backend, rows, 72, inputs)) < tolerance(backend)


@pytest.mark.parametrize("rows", [70, 200])
def test_every_schedule_gives_the_same_bits(scheduled, rows):
    torch.manual_seed(rows)
    values = arguments(scheduled, rows, 300, 656)
    result = run(scheduled, values)
    assert relative_error(result, by_groups(*values[:2]) @ by_hand(*values[2:4]).T) < tolerance(scheduled)
    if scheduled.emulated is not None:
        emulator().emulator_seed(0)
    assert same_bits(run(scheduled, values), result)


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 5])
def test_every_way_to_share_the_tiles_gives_the_same_bits(backend, multiprocessors):
    """Two tiles of rows a cluster, more bands of them than one, and blocks that take several tiles in turn."""
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    values = arguments(backend, 17 * 128 + 3, 264, 32)
    before, device = run(backend, values), emulator()
    assert relative_error(before, by_groups(*values[:2]) @ by_hand(*values[2:4]).T) < 1e-5
    device.emulator_multiprocessors(multiprocessors)
    try:
        assert same_bits(run(backend, values), before)
    finally:
        device.emulator_multiprocessors(4)


def test_a_row_of_nan_stays_in_its_row(backend):
    values = arguments(backend, 150, 40, 256)
    clean = run(backend, values)
    values[1][131] = torch.nan
    spoiled = run(backend, values)
    assert spoiled[131].isnan().all()
    others = [row for row in range(150) if row != 131]
    assert same_bits(spoiled[others], clean[others])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [20, 140])
def test_a_kernel_that_starts_early_waits_for_the_one_before(backend, rows, seed):
    """A copy that brings x or its scales may not have begun when the product starts; and `linear` of many rows, whose
    product takes what the quantising kernel before it writes."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    ops, device = torch.ops.tokenspeed_emulated, emulator()
    values = arguments(backend, rows, 72, 272)
    expected, x = run(backend, values), backend.randn(rows, 272)
    of_bf16 = backend.op("linear")(x, *values[2:4])
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])
    for position in range(2):
        given = list(values)
        given[position], arena = behind_a_copy(values[position])

        def copied_and_called(given=given, arena=arena):
            ops.copy_states(arena, from_slot, to_slot)
            return ops.linear_fp8(*given), ops.linear(x, *values[2:4])

        result, quantised = queued(device, seed, copied_and_called)
        assert same_bits(result, expected), f"argument {position}"
        assert same_bits(quantised, of_bf16)


@pytest.mark.parametrize("rows", [17, 150])
def test_linear_of_many_rows_multiplies_their_groups(backend, rows):
    x, (weight, scale) = backend.randn(rows, 400)[:, 8:376], draw_weight(backend, 136, 368)
    results = []
    assert torch_served(lambda: results.append(backend.op("linear")(x, weight, scale))) == []
    values, scales = torch.ops.tokenspeed.quantise_groups(x)
    expected = by_groups(values, scales) @ by_hand(weight, scale).T
    assert relative_error(results[0], expected) < 4e-3
    # Against x as it is: e4m3 has three bits behind the point, half of the last is 2^-5 / sqrt(3) on average at most.
    assert relative_error(results[0], exact(x) @ by_hand(weight, scale).T) < 4e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [8, 120, 128, 136, 1032])
def test_groups_have_the_same_bits_as_in_torch(backend, columns, dtype):
    x = (torch.randn(37, columns + 16) * 2 ** (60 * torch.rand(37, 1) - 30)).to(dtype).to(backend.device)[:, 8:-8]
    x[3] = 0
    results = []
    assert torch_served(lambda: results.extend(backend.op("quantise_groups")(x))) == []
    for result, expected in zip(results, torch.ops.tokenspeed.quantise_groups(x.cpu()), strict=True):
        assert same_bits(result.cpu(), expected)


def test_what_no_kernel_serves_goes_to_torch(backend):
    """Rows of inputs that are no multiple of 16 bytes."""
    values = arguments(backend, 4, 30, 200)
    results = []
    served = torch_served(lambda: results.append(backend.op("linear_fp8")(*values)))
    assert served == ["tokenspeed_torch::linear_fp8"]
    assert relative_error(results[0], by_groups(*values[:2]) @ by_hand(*values[2:4]).T) < 1e-5
