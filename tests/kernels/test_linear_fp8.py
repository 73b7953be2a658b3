"""Claims about the small-batch products with e4m3 weights: exact weights, the right scale for every block, tails."""

import pytest
import torch

from tests.kernels.launches import emulator, queued, torch_served
from tests.ops.backends import Backend, make_backend, relative_error, same_bits
from tests.ops.reference import exact
from tokenspeed.ops.fp8 import FP8, quantise_blocks

pytest_plugins = ["tests.kernels.schedules"]

NAMES = ("linear", "add_rms_norm_linear", "silu_mul_linear", "add_gated_silu_mul_linear")
STAGED = NAMES[1:]  # up to eight rows; the others' kernel takes sixteen


def draw_weight(backend: Backend, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scales that differ from block to block by up to 16 times, so that none stands for another."""
    weight, scale = quantise_blocks(torch.randn(outputs, inputs))
    scale *= 2 ** (4 * torch.rand(scale.shape) - 2)
    return weight.to(backend.device), scale.to(backend.device)


def by_hand(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight in double precision, block by block."""
    values = weight.cpu().to(torch.float64)
    for i, row in enumerate(scale.tolist()):
        for j, factor in enumerate(row):
            values[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= factor
    return values


def arguments(backend: Backend, name: str, rows: int, outputs: int, inputs: int) -> list:
    weight, scale = draw_weight(backend, outputs, inputs)
    if name == "add_rms_norm_linear":
        return [backend.randn(rows, inputs), backend.randn(rows, inputs), backend.randn(inputs), 1e-6, weight, scale]
    x = backend.randn(rows, inputs if name == "linear" else 2 * inputs)
    if name == "add_gated_silu_mul_linear":
        return [backend.randn(rows, outputs), x, weight, backend.randn(rows, 1), scale]
    return [x, weight, scale]


def run(backend: Backend, name: str, values: list) -> tuple[torch.Tensor, ...]:
    """All that an operator writes, from copies of its arguments; its kernel must serve the call."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
    results = []
    assert torch_served(lambda: results.append(backend.op(name)(*copies))) == []
    result = results[0]
    return (copies[0],) if result is None else result if isinstance(result, tuple) else (result,)


def error(backend: Backend, name: str, rows: int, outputs: int, inputs: int) -> float:
    """The largest distance of an output from the composition in double precision, but for bf16 between operators."""
    values = arguments(backend, name, rows, outputs, inputs)
    at = next(i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and value.dtype == FP8)
    weight, scale = values[at], values[-1]
    exactly = [exact(value).float() if isinstance(value, torch.Tensor) else value for value in values[:-1]]
    exactly[at] = by_hand(weight, scale).float()
    expected = list(run_in_fp32(name, exactly))
    if name == "linear":
        expected[0] = exact(values[0]) @ by_hand(weight, scale).T
    return max(relative_error(*pair) for pair in zip(run(backend, name, values), expected, strict=True))


def run_in_fp32(name: str, values: list) -> tuple[torch.Tensor, ...]:
    result = getattr(torch.ops.tokenspeed, name).default(*values)
    return (values[0],) if result is None else result if isinstance(result, tuple) else (result,)


def tolerance(name: str) -> float:
    return 4e-3 if name == "linear" else 1e-2


# More rows than eight go from the joined operators to the separate ones.
@pytest.mark.parametrize(
    ("name", "rows"), [(name, n) for name in NAMES for n in range(1, 17 if name == "linear" else 9)]
)
def test_every_row_count(backend, name, rows):
    assert error(backend, name, rows, 48, 1056) < tolerance(name)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_inputs_need_not_fill_tiles_slabs_and_blocks(backend, name, rows):
    fewest = 1 if name == "linear" else 24  # one sum that cancels would magnify the rounding of the operand
    for outputs, inputs in [(fewest, 32), (17, 96), (129, 128), (100, 480), (fewest, 1056), (300, 2208), (16, 3072)]:
        assert error(backend, name, rows, outputs, inputs) < tolerance(name)


@pytest.mark.thinned(2, "multiprocessors", "name")
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_share_the_tiles_among_clusters(backend, name, multiprocessors):
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    device = emulator()
    device.emulator_multiprocessors(multiprocessors)
    try:
        for rows, outputs, inputs in [(1, 16, 8192), (2, 40, 4096), (1, 336, 2048), (8, 128, 1024), (1, 1600, 1024)]:
            if name == "linear" or rows < 8:
                assert error(backend, name, rows, outputs, inputs) < tolerance(name)
        if name == "linear":
            assert error(backend, name, 13, 336, 2048) < tolerance(name)
    finally:
        device.emulator_multiprocessors(4)


def tail_error(backend: Backend, name: str, rows: int, outputs: int, tail: int, inputs: int) -> float:
    """The largest distance of the product of an e4m3 weight and of rows of bf16 below it, one launch, from that in
    double precision."""
    values, below = arguments(backend, name, rows, outputs, inputs), backend.randn(tail, inputs)
    out = run(backend, name, [*values, below])[0]
    weight, scale = values[-2:]
    x = values[0]
    if name == "add_rms_norm_linear":
        x = torch.ops.tokenspeed.add_rms_norm(*(value.cpu() for value in values[:3]), values[3])[0]
    joined = torch.cat([by_hand(weight, scale), exact(below)])
    assert out.shape == (rows, outputs + tail)
    return relative_error(out, exact(x) @ joined.T)


@pytest.mark.parametrize(("name", "rows"), [("linear", n) for n in range(1, 17)] + [(NAMES[1], n) for n in range(1, 9)])
def test_rows_of_bf16_below_the_weight_are_the_same_launch(backend, name, rows):
    assert tail_error(backend, name, rows, 48, 24, 1056) < 1e-2


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_tail_of_any_size_below_a_weight_of_any_size(backend, name, rows):
    for outputs, tail, inputs in [(24, 1, 96), (17, 33, 480), (129, 16, 128), (300, 70, 2208), (16, 264, 1024)]:
        assert tail_error(backend, name, rows, outputs, tail, inputs) < 1e-2


@pytest.mark.thinned(2, "multiprocessors")
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8, 16])
def test_a_tail_beside_every_number_of_clusters(backend, multiprocessors):
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    device = emulator()
    device.emulator_multiprocessors(multiprocessors)
    try:
        for rows, outputs, tail, inputs in [
            (1, 16, 16, 8192),
            (2, 40, 5, 4096),
            (1, 336, 64, 2048),
            (8, 128, 40, 1024),
        ]:
            for name in NAMES[:2]:
                if name == "linear" or rows < 8:
                    assert tail_error(backend, name, rows, outputs, tail, inputs) < 1e-2
        assert tail_error(backend, "linear", 13, 336, 40, 2048) < 1e-2
    finally:
        device.emulator_multiprocessors(4)


@pytest.mark.parametrize("rows", [1, 11])
def test_a_tail_gives_the_same_bits_by_every_schedule(scheduled, rows):
    torch.manual_seed(rows)
    values = [*arguments(scheduled, "linear", rows, 100, 2080), scheduled.randn(40, 2080)]
    result = run(scheduled, "linear", values)[0]
    if scheduled.emulated is not None:
        emulator().emulator_seed(0)
    assert same_bits(run(scheduled, "linear", values)[0], result)


def test_a_tail_below_a_bf16_weight_and_one_of_other_inputs_go_to_torch(backend):
    x, below = backend.randn(2, 64), backend.randn(8, 64)
    weight = backend.randn(24, 64)
    results = []
    served = torch_served(lambda: results.append(backend.op("linear")(x, weight, None, below)))
    assert served == ["tokenspeed_torch::linear"]
    assert relative_error(results[0], exact(x) @ exact(torch.cat([weight, below])).T) < 4e-3


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_every_e4m3_number_is_multiplied_exactly(backend, rows):
    """Subnormal ones too, and beside the smallest and largest x that bf16 products of weights leave normal."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[(bits & 127) != 127].view(FP8)
    weight = numbers[torch.arange(254 * 16) % 254].reshape(16, 254).repeat(1, 5)[:, :1024].contiguous()
    scale = torch.full((1, 8), 0.5)
    for power in (-100.0, -14.0, 0.0, 100.0):
        x = torch.zeros(rows, 1024, dtype=torch.bfloat16)
        column = torch.arange(rows) * 61 + 7
        x[torch.arange(rows), column] = 2.0**power
        out = backend.op("linear")(x.to(backend.device), weight.to(backend.device), scale.to(backend.device))
        expected = weight.double()[:, column].T * 2.0 ** (power - 1)
        assert torch.equal(out.cpu().double(), expected)


@pytest.mark.parametrize("rows", [2, 11])
def test_every_schedule_gives_the_same_bits(scheduled, rows):
    torch.manual_seed(rows)
    values = arguments(scheduled, "linear", rows, 100, 2080)
    device = emulator() if scheduled.emulated is not None else None
    result = run(scheduled, "linear", values)[0]
    if device is not None:
        device.emulator_seed(0)
    assert same_bits(run(scheduled, "linear", values)[0], result)


@pytest.mark.parametrize("name", STAGED)
def test_a_row_of_nan_stays_in_its_row(backend, name):
    values = arguments(backend, name, 6, 40, 1056)
    clean = run(backend, name, values)
    values[name == "add_gated_silu_mul_linear"][4] = torch.nan
    for spoiled, before in zip(run(backend, name, values), clean, strict=True):
        assert spoiled[4].isnan().all()
        assert same_bits(spoiled[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])


def test_a_scale_is_read_from_any_address_and_no_further(backend):
    """What lies beside the scales is poison."""
    weight, scale = draw_weight(backend, 130, 1184)
    around = torch.full((scale.numel() + 4,), torch.nan, device=backend.device)
    inner = around[1 : 1 + scale.numel()].view(scale.shape)
    inner.copy_(scale)
    x = backend.randn(3, 1184)
    out = run(backend, "linear", [x, weight, inner])[0]
    assert relative_error(out, exact(x) @ by_hand(weight, scale).T) < 4e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_in_which_each_launch_starts_early_equals_one_at_a_time(backend, seed):
    """Weights and scales are read before the wait, x and what is made of it after."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    ops, norm = torch.ops.tokenspeed_emulated, backend.randn(256) * 0.1
    x, residual = backend.randn(3, 256), backend.randn(3, 256)
    gate_up, down, below = draw_weight(backend, 512, 256), draw_weight(backend, 256, 256), backend.randn(24, 256)

    def chain() -> list[torch.Tensor]:
        both, normed, stream = ops.add_rms_norm_linear(x, residual, norm, 1e-6, *gate_up)
        y = ops.silu_mul_linear(both, *down)
        z = ops.linear(y, *down)
        ops.add_gated_silu_mul_linear(z, both, down[0], normed[:, :1], down[1])
        joined = ops.add_rms_norm_linear(z, stream, norm, 1e-6, *gate_up, below)
        return [both, normed, stream, y, z, *joined, ops.linear(joined[1], *down, below)]

    expected = chain()
    for result, before in zip(queued(emulator(), seed, chain), expected, strict=True):
        assert same_bits(result, before)


def test_scales_of_other_shapes_and_other_types_go_to_torch(backend):
    """Inputs that are no multiple of 32, and fp32 activations."""
    linear = backend.op("linear")
    for inputs, dtype in ((48, torch.bfloat16), (64, torch.float32)):
        weight, scale = draw_weight(backend, 20, inputs)
        x = backend.randn(2, inputs, dtype=dtype)
        results = []
        served = torch_served(lambda results=results, args=(x, weight, scale): results.append(linear(*args)))
        assert served == ["tokenspeed_torch::linear"]
        assert relative_error(results[0], exact(x) @ by_hand(weight, scale).T) < 4e-3


@pytest.mark.parametrize(("rows", "inputs"), [(8, 8192), (16, 5120), (7, 17408)])
def test_rows_that_fit_no_shared_memory_go_in_parts(backend, rows, inputs):
    """With a shorter ring, with half of the rows, and with half of the half."""
    x, (weight, scale) = backend.randn(rows, inputs), draw_weight(backend, 24, inputs)
    out = run(backend, "linear", [x, weight, scale])[0]
    assert relative_error(out, exact(x) @ by_hand(weight, scale).T) < 4e-3


def test_the_largest_operand_that_shared_memory_holds(backend):
    """One row of 17408 columns is staged; eight of 8192 go to the separate operators."""
    assert error(backend, "silu_mul_linear", 1, 20, 17408) < 1e-2
    values = arguments(make_backend("torch-bf16"), "silu_mul_linear", 8, 640, 8192)
    values = [value.to(backend.device) for value in values]
    gate, up = exact(values[0]).chunk(2, dim=1)
    expected = (gate * torch.sigmoid(gate) * up) @ by_hand(*values[1:]).T
    assert relative_error(backend.op("silu_mul_linear")(*values), expected) < 1e-2
