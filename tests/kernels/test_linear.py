"""Claims about the small-batch products beyond their operators' contracts: tails, tiles, clusters, the schedule."""

import ctypes

import pytest
import torch

from tests.kernels.launches import queued, torch_served
from tests.ops.backends import Backend, make_backend, relative_error, same_bits
from tests.ops.reference import exact
from tokenspeed.ops.strict import LINEAR_STAGED_ROWS


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def backend(request) -> Backend:
    return make_backend(request.param)


@pytest.fixture
def emulator():
    """The emulated device's controls, back at their defaults afterwards."""
    make_backend("emulated")
    from tests.ops.emulated import build_library

    library = ctypes.CDLL(str(build_library()))
    library.emulator_seed.argtypes = [ctypes.c_uint64]
    yield library
    library.emulator_seed(0)
    library.emulator_multiprocessors(4)
    library.emulator_defer(0)


# The operators whose operand is made in shared memory, by rows, outputs and inputs.
STAGED = ("add_rms_norm_linear", "silu_mul_linear", "add_gated_silu_mul_linear")


def staged_arguments(backend: Backend, name: str, rows: int, outputs: int, inputs: int) -> list[torch.Tensor | float]:
    weight = backend.randn(outputs, inputs)
    if name == "add_rms_norm_linear":
        return [backend.randn(rows, inputs), backend.randn(rows, inputs), backend.randn(inputs), 1e-6, weight]
    x = backend.randn(rows, 2 * inputs)
    gated = name == "add_gated_silu_mul_linear"
    return [backend.randn(rows, outputs), x, weight, backend.randn(rows, 1)] if gated else [x, weight]


def run_staged(backend: Backend, name: str, arguments) -> tuple[torch.Tensor, ...]:
    """All that an operator writes, from copies of its arguments."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
    result = backend.op(name)(*copies)
    return (copies[0],) if result is None else result if isinstance(result, tuple) else (result,)


def staged_error(backend: Backend, name: str, rows: int, outputs: int, inputs: int) -> float:
    """The largest distance of an output from the operator's torch implementation, which rounds nothing in fp32."""
    arguments = staged_arguments(backend, name, rows, outputs, inputs)
    exactly = [value.float().cpu() if isinstance(value, torch.Tensor) else value for value in arguments]
    expected = run_staged(make_backend("torch-fp32"), name, exactly)
    actual = run_staged(backend, name, arguments)
    return max(relative_error(*pair) for pair in zip(actual, expected, strict=True))


def product_error(backend: Backend, rows: int, outputs: int, inputs: int) -> float:
    x, weight = backend.randn(rows, inputs), backend.randn(outputs, inputs)
    return relative_error(backend.op("linear")(x, weight), exact(x) @ exact(weight).T)


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_row_count(backend, rows):
    assert product_error(backend, rows, 48, 544) < 4e-3


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("name", STAGED)
def test_every_row_count_of_a_staged_operand(backend, name, rows):
    assert staged_error(backend, name, rows, 48, 544) < 1e-2


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", STAGED)
def test_a_staged_operand_need_not_fill_its_slabs(backend, name, rows):
    for outputs, inputs in [(17, 32), (100, 480), (5, 1056), (40, 2560)]:
        assert staged_error(backend, name, rows, outputs, inputs) < 1e-2


@pytest.mark.parametrize("name", STAGED)
def test_a_staged_operand_that_fills_shared_memory_goes_to_the_separate_operators(backend, name):
    """8 rows of 4096 columns need 64 KB for x: less than the ring leaves."""
    assert staged_error(backend, name, 8, 16 * 40, 4096) < 1e-2


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("inputs", [32, 480, 512, 1056, 2560])
def test_outputs_and_inputs_need_not_fill_tiles_and_slabs(backend, outputs, inputs):
    assert product_error(backend, 3, outputs, inputs) < 4e-3


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4096), (40, 2048), (336, 1024), (128, 512)])
def test_every_way_to_share_the_tiles_among_clusters(emulator, multiprocessors, outputs, inputs):
    emulator.emulator_multiprocessors(multiprocessors)
    for rows in (2, 13):
        assert product_error(make_backend("emulated"), rows, outputs, inputs) < 4e-3


@pytest.mark.thinned(2, "multiprocessors", "name")
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("name", STAGED)
def test_every_way_to_share_a_staged_operand_among_clusters(emulator, multiprocessors, name):
    emulator.emulator_multiprocessors(multiprocessors)
    for rows, outputs, inputs in [(1, 16, 4096), (2, 40, 2048), (1, 336, 1024), (5, 128, 512), (1, 1600, 512)]:
        assert staged_error(make_backend("emulated"), name, rows, outputs, inputs) < 1e-2


def test_a_row_stride_and_an_odd_output_address_are_fine(backend):
    wide, weight = backend.randn(5, 1048), backend.randn(33, 1024)
    x = wide[:, 8:1032]
    assert relative_error(backend.op("linear")(x, weight), exact(x) @ exact(weight).T) < 4e-3


def test_a_row_of_nan_stays_in_its_row(backend):
    x, weight = backend.randn(9, 512), backend.randn(40, 512)
    clean = backend.op("linear")(x, weight)
    x[4] = torch.nan
    spoiled = backend.op("linear")(x, weight)
    assert spoiled[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert same_bits(spoiled[others], clean[others])


@pytest.mark.parametrize("name", STAGED)
def test_a_row_of_nan_stays_in_its_row_of_a_staged_operand(backend, name):
    arguments = staged_arguments(backend, name, 8, 40, 544)
    clean = run_staged(backend, name, arguments)
    arguments[name == "add_gated_silu_mul_linear"][4] = torch.nan
    others = [0, 1, 2, 3, 5, 6, 7]
    for spoiled, before in zip(run_staged(backend, name, arguments), clean, strict=True):
        assert spoiled[4].isnan().all()
        assert same_bits(spoiled[others], before[others])


def test_a_row_has_the_same_bits_in_every_batch_of_one_size_class(backend):
    """1 row, 2 to 8 and 9 to 16 share tiles, and with them the order of sums, in three ways."""
    x, weight = backend.randn(16, 2048), backend.randn(64, 2048)
    for rows, fewer in ((8, 2), (16, 9)):
        whole = backend.op("linear")(x[:rows], weight)
        for i in range(rows - fewer + 1):
            assert same_bits(backend.op("linear")(x[i : i + fewer], weight), whole[i : i + fewer])


def test_no_order_of_threads_changes_a_bit(emulator):
    backend = make_backend("emulated")
    x, weight = backend.randn(11, 1536), backend.randn(100, 1536)
    results = []
    for seed in range(6):
        emulator.emulator_seed(seed)
        results.append(backend.op("linear")(x, weight))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("outputs", "inputs", "multiprocessors", "seeds"), [(170, 512, 1, 12), (170, 544, 1, 12), (96, 2048, 4, 4)]
)
def test_one_row_of_many_tiles_a_block(emulator, outputs, inputs, multiprocessors, seeds):
    """Their sums are added some tiles at a time: 11 by one block, 11 and 3 by clusters that share the columns."""
    emulator.emulator_multiprocessors(multiprocessors)
    backend, results = make_backend("emulated"), []
    x, weight = backend.randn(1, inputs), backend.randn(outputs, inputs)
    for seed in range(seeds):
        emulator.emulator_seed(seed)
        results.append(backend.op("linear")(x, weight))
    assert relative_error(results[0], exact(x) @ exact(weight).T) < 4e-3
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("name", STAGED)
def test_no_order_of_threads_changes_a_bit_of_a_staged_product(emulator, name):
    backend = make_backend("emulated")
    for rows in (1, 6):
        arguments = staged_arguments(backend, name, rows, 100, 1536)
        results = []
        for seed in range(4):
            emulator.emulator_seed(seed)
            results.append(run_staged(backend, name, arguments))
        for result in results:
            assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_chain_in_which_each_product_starts_early_equals_one_at_a_time(emulator):
    """Queued launches: a product fills its ring before the one it depends on has run."""
    backend = make_backend("emulated")
    x, weights = backend.randn(4, 512), [backend.randn(512, 512) * 0.05 for _ in range(4)]

    def run() -> list[torch.Tensor]:
        results = [x]
        for weight in weights:
            results.append(torch.ops.tokenspeed_emulated.linear(results[-1], weight))
        return results

    expected = run()
    for seed in range(4):
        results = queued(emulator, seed, run)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


def test_more_rows_and_other_types_go_to_torch(backend):
    assert product_error(backend, 17, 20, 64) < 4e-3
    assert product_error(backend, 2, 20, 50) < 4e-3
    x, weight = backend.randn(2, 64, dtype=torch.float32), backend.randn(5, 64, dtype=torch.float32)
    assert relative_error(backend.op("linear")(x, weight), exact(x) @ exact(weight).T) < 1e-5


@pytest.mark.parametrize("name", STAGED)
def test_a_staged_operand_is_served_up_to_as_many_rows_as_the_model_counts_on(name):
    backend = make_backend("emulated")
    for rows in (LINEAR_STAGED_ROWS, LINEAR_STAGED_ROWS + 1):
        arguments = staged_arguments(backend, name, rows, 64, 128)
        assert bool(torch_served(lambda arguments=arguments: backend.op(name)(*arguments))) == (
            rows > LINEAR_STAGED_ROWS
        )


def test_a_chain_of_blocks_in_which_each_launch_starts_early_equals_one_at_a_time(emulator):
    """Queued launches: sum, norm and product, then silu_mul and product, on what the launch before still writes."""
    backend = make_backend("emulated")
    ops, norm = torch.ops.tokenspeed_emulated, backend.randn(256) * 0.1
    x, residual = backend.randn(3, 256), backend.randn(3, 256)
    blocks = [(backend.randn(512, 256) * 0.05, backend.randn(256, 256) * 0.05) for _ in range(2)]

    def run() -> list[torch.Tensor]:
        results, y, stream = [], x, residual
        for gate_up, down in blocks:
            both, normed, stream = ops.add_rms_norm_linear(y, stream, norm, 1e-6, gate_up)
            y = ops.silu_mul_linear(both, down)
            ops.add_gated_silu_mul_linear(y, both, down, normed[:, :1])
            results += [both, normed, stream, y]
        return results

    expected = run()
    for seed in range(4):
        results = queued(emulator, seed, run)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
