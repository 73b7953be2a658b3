"""Claims about the kernel that is a dense decode layer's whole feed-forward: sizes, sharing, schedules, early start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenspeed.ops
from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import Backend, bounded, relative_error, same_bits
from tokenspeed.ops.ffn_block import ffn_block_scratch

pytest_plugins = ["tests.kernels.schedules"]

TOLERANCE = 1e-2  # norm, both halves, activations and output are rounded to bf16
EPS = 1e-6
PUBLISHED = [(1024, 3584), (2048, 6144), (2560, 9216), (4096, 12288)]  # hidden, width


class Layer:
    """Weights of one layer, and the tokens."""

    def __init__(self, backend: Backend, tokens: int, hidden: int = 128, width: int = 192):
        self.backend = backend
        self.x, self.residual = backend.randn(tokens, hidden), backend.randn(tokens, hidden)
        self.norm_weight = backend.randn(hidden) * 0.1
        self.gate_up = backend.randn(2 * width, hidden) * hidden**-0.5
        self.down = backend.randn(hidden, width) * width**-0.5
        self.scratch = backend.tensor([0] * ffn_block_scratch(width))

    def sum(self) -> Tensor:
        return self.x + self.residual

    def arguments(self) -> list:
        weights = (self.norm_weight, EPS, self.gate_up, self.down)
        return [self.x, self.residual, *weights, self.scratch]

    def expected(self) -> Tensor:
        """In double precision."""
        normed = reference.rms_norm(self.sum(), self.norm_weight, EPS)
        gate, up = (normed @ reference.exact(self.gate_up).T).chunk(2, dim=1)
        return (reference.silu(gate) * up) @ reference.exact(self.down).T

    def check(self) -> tuple[Tensor, Tensor]:
        results = []
        args = self.arguments()
        assert torch_served(lambda: results.append(self.backend.op("ffn_block")(*args))) == []
        y, total = results[0]
        assert same_bits(total.cpu(), self.sum().cpu())
        assert relative_error(y, self.expected()) < TOLERANCE
        return y, total


@pytest.mark.parametrize("tokens", range(1, 9))
def test_every_count_of_tokens_under_every_schedule(scheduled, tokens):
    Layer(scheduled, tokens).check()


@bounded
@given(st.data())
def test_any_sizes_under_any_schedule(backend, data):
    tokens = data.draw(st.integers(1, 8), "tokens")
    hidden, width = (64 * data.draw(st.integers(1, 20), name) for name in ("hidden", "width"))
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    torch.manual_seed(seed)
    layer = Layer(backend, tokens, hidden, width)
    if backend.emulated is None:
        layer.check()
        return
    device = emulator()
    device.emulator_seed(seed)
    device.emulator_multiprocessors(data.draw(st.sampled_from([1, 3, 4, 7, 13]), "multiprocessors"))
    try:
        layer.check()
    finally:
        device.emulator_seed(0)
        device.emulator_multiprocessors(4)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (960, 1088), (1088, 960), (2112, 64), (64, 3648)])
def test_sizes_need_not_fill_stages(backend, tokens, hidden, width):
    """Depths of half a warp's share and of a little more than one or two stages: zeros, or nothing, for the rest."""
    Layer(backend, tokens, hidden, width).check()


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_published_depths_of_the_smallest_model(backend, tokens):
    """The ring wraps many times, and every warp brings its activations in several batches."""
    Layer(backend, tokens, 1024, 3584).check()


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 13, 60])
@pytest.mark.parametrize("tokens", [1, 7])
def test_every_way_to_share_the_work_gives_the_same_bits(backend, tokens, multiprocessors):
    """60: more blocks than tiles of either product, too; those that have none count all the same."""
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    layer, device = Layer(backend, tokens), emulator()
    expected = layer.check()
    device.emulator_multiprocessors(multiprocessors)
    try:
        results = layer.check()
    finally:
        device.emulator_multiprocessors(4)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("multiprocessors", [4, 30])
@pytest.mark.parametrize("tokens", [1, 6])
def test_no_order_of_threads_changes_a_bit(backend, tokens, multiprocessors):
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    layer, device = Layer(backend, tokens), emulator()
    expected = layer.check()
    device.emulator_multiprocessors(multiprocessors)
    try:
        for seed in range(1, 7):
            device.emulator_seed(seed)
            assert all(same_bits(a, b) for a, b in zip(layer.check(), expected, strict=True))
    finally:
        device.emulator_seed(0)
        device.emulator_multiprocessors(4)


@pytest.mark.parametrize("tokens", range(2, 9))
def test_a_token_has_the_same_bits_in_every_batch_of_several(backend, tokens):
    whole = Layer(backend, 8)
    y, _ = whole.check()
    few = Layer(backend, tokens)
    vars(few).update(vars(whole) | {"x": whole.x[:tokens], "residual": whole.residual[:tokens]})
    assert same_bits(few.check()[0], y[:tokens])


@pytest.mark.parametrize("others", [[1], [8, 3], [2, 9, 1]])
def test_calls_of_all_sizes_pass_the_scratch_on(scheduled, others):
    """Whatever the last call left, a kernel's or torch's (nine tokens), the next takes nothing for its own."""
    layer = Layer(scheduled, 5, hidden=192)
    first = layer.check()
    for tokens in others:
        other = Layer(scheduled, tokens, hidden=64 * tokens % 256 or 64, width=64 * (tokens % 3 + 1))
        other.scratch = layer.scratch
        scheduled.op("ffn_block")(*other.arguments())
        assert all(same_bits(a, b) for a, b in zip(layer.check(), first, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_kernel_that_starts_early_waits_for_the_one_before(backend, tokens, seed):
    """A copy brings one of the arguments; what are weights may be read before the wait. Three calls in a row, so that
    one may start while the one before counts, and both sets of counters are used again."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    layer, device = Layer(backend, tokens), emulator()
    expected = layer.check()
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])
    for position in (0, 1, 6):  # x, residual, scratch
        given = layer.arguments()
        given[position], arena = behind_a_copy(given[position])

        def copied_and_called(given=given, arena=arena):
            torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
            return [torch.ops.tokenspeed_emulated.ffn_block(*given) for _ in range(3)]

        for result in queued(device, seed, copied_and_called):
            assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True)), f"argument {position}"


@pytest.mark.parametrize("seed", range(3))
def test_what_follows_early_waits_for_the_output(backend, seed):
    """A chain of layers, each fed by the one before, as in a decode step."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    layers, device = [Layer(backend, 3) for _ in range(4)], emulator()

    def chain() -> list[Tensor]:
        x, residual = layers[0].x, layers[0].residual
        kept = []
        for layer in layers:
            weights = (layer.norm_weight, EPS, layer.gate_up, layer.down)
            x, residual = torch.ops.tokenspeed_emulated.ffn_block(x, residual, *weights, layers[0].scratch)
            kept += [x, residual]
        return kept

    expected = [each.clone() for each in chain()]
    results = queued(device, seed, chain)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("poison", ["x", "residual"])
def test_a_row_of_nan_stays_in_its_row(backend, poison):
    layer = Layer(backend, 5)
    clean = backend.op("ffn_block")(*layer.arguments())
    getattr(layer, poison)[3] = torch.nan
    spoiled = backend.op("ffn_block")(*layer.arguments())
    others = [0, 1, 2, 4]
    assert all(part[3].isnan().all() for part in spoiled)
    assert all(same_bits(a[others], b[others]) for a, b in zip(spoiled, clean, strict=True))


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_row_stride_is_fine(backend, tokens):
    layer = Layer(backend, tokens)
    wide = backend.randn(tokens, 256)
    wide[:, 8:136] = layer.x
    layer.x = wide[:, 8:136]
    layer.check()


def test_what_no_kernel_serves_goes_to_torch_and_is_right(backend):
    many, odd, large = Layer(backend, 9), Layer(backend, 2, width=96), Layer(backend, 8, 64, 12288)
    for layer in (many, odd, large):
        results, args = [], layer.arguments()
        served = torch_served(lambda args=args, results=results: results.append(backend.op("ffn_block")(*args)))
        assert "tokenspeed_torch::ffn_block" in served
        assert relative_error(results[0][0], layer.expected()) < 2e-2
        assert same_bits(results[0][1], layer.sum())


def test_scratch_that_is_too_short_is_refused(backend):
    layer = Layer(backend, 2)
    layer.scratch = layer.scratch[:-1].clone()
    with pytest.raises((ValueError, RuntimeError), match=f"scratch has {len(layer.scratch)} elements; 192 columns"):
        backend.op("ffn_block")(*layer.arguments())


@pytest.fixture
def card(backend) -> Backend:
    if backend.device != "cuda":
        pytest.skip("too much work for the emulated device")
    return backend


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("hidden", "width"), PUBLISHED)
def test_the_published_models_on_a_card(card, hidden, width, tokens):
    """Beside the composition of operators, and beside the truth no worse than that is."""
    layer, results = Layer(card, tokens, hidden, width), []
    fits = tokens * (hidden + width) * 2 < 150_000  # beside the ring
    served = torch_served(lambda: results.append(torch.ops.tokenspeed.ffn_block(*layer.arguments())))
    assert (served == []) == fits
    y, total = results[0]
    expected, expected_total = tokenspeed.ops.ffn_block.__wrapped__(*layer.arguments())
    assert same_bits(total, expected_total)
    assert relative_error(y, expected) < TOLERANCE
    assert relative_error(y, layer.expected()) < 1.1 * relative_error(expected, layer.expected())


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_thousand_runs_on_a_card_give_the_same_bits(card, tokens):
    layer = Layer(card, tokens, 1024, 3584)
    expected, _ = torch.ops.tokenspeed.ffn_block(*layer.arguments())
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (torch.ops.tokenspeed.ffn_block(*layer.arguments())[0] != expected).sum()
    assert different.item() == 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_graph_of_a_chain_replays_on_a_card(card, tokens):
    layer = Layer(card, tokens, 1024, 3584)

    def chain() -> list[Tensor]:
        x, residual, kept = layer.x, layer.residual, []
        for _ in range(5):
            x, residual = torch.ops.tokenspeed.ffn_block(x, residual, *layer.arguments()[2:])
            kept.append(x)
        return kept

    expected = [each.clone() for each in chain()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain()
    for _ in range(50):
        for result in results:
            result.zero_()
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
