"""Claims about the expert product with e4m3 weights: the right scale for every block, in every share of the work."""

import pytest
import torch
from torch import Tensor

from tests.kernels.launches import emulator, queued, torch_served
from tests.kernels.test_linear_fp8 import by_hand, draw_weight
from tests.kernels.test_linear_fp8_kernel import by_groups
from tests.kernels.test_moe_experts_kernel import DECODE_TOKENS, launches_in_clusters, random_choice, routed
from tests.ops import reference
from tests.ops.backends import Backend, relative_error, same_bits
from tests.ops.reference import exact

pytest_plugins = ["tests.kernels.schedules"]

TOLERANCE = 6e-3  # of the activation and of the output to bf16, as with bf16 weights
# A prefill rounds activations to e4m3 too: an activation that a card computes one bit apart may round to the neighbour.
PREFILL_TOLERANCE = 1.2e-2
BLOCK_CHOICES = 144  # a prefill of more than these an expert, on average, shares weights in clusters


def draw_experts(backend: Backend, experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    drawn = [draw_weight(backend, rows, columns) for _ in range(experts)]
    return torch.stack([weight for weight, _ in drawn]), torch.stack([scale for _, scale in drawn]) * 0.2


def inputs(backend: Backend, chosen: Tensor, experts: int, hidden: int, width: int) -> tuple:
    """Arguments of `moe_experts`; the scales of experts without tokens are NaN."""
    gate_up, gate_up_scale = draw_experts(backend, experts, 2 * width, hidden)
    down, down_scale = draw_experts(backend, experts, hidden, width)
    unused = torch.ones(experts, dtype=torch.bool, device=backend.device)
    unused[chosen.flatten()] = False
    gate_up_scale[unused], down_scale[unused] = torch.nan, torch.nan
    x = backend.randn(len(chosen), hidden)
    return x, *routed(backend, chosen, experts), gate_up, down, 0, gate_up_scale, down_scale


def mixture_of_groups(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What a prefill computes, in double precision but for both products' operands, which are rounded to e4m3."""
    quantise = torch.ops.tokenspeed.quantise_groups
    x, weights, out = by_groups(*quantise(x.cpu())), exact(weights), torch.zeros(x.shape, dtype=torch.float64)
    for expert in experts.unique().tolist():
        token, rank = (experts.cpu() == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=1)
        rows = by_groups(*quantise((reference.silu(gate) * up).float())) @ down[expert].T
        out.index_add_(0, token, rows * weights[token, rank][:, None])
    return out


def expected(args: tuple, here: Tensor | None = None) -> Tensor:
    x, weights, experts, _, _, gate_up, down, first, gate_up_scale, down_scale = args
    weights = weights if here is None else weights.masked_fill(~here, 0)
    wide = [
        torch.stack([by_hand(*pair) for pair in zip(*of, strict=True)])
        for of in ((gate_up, gate_up_scale), (down, down_scale))
    ]
    mixture = reference.mixture if len(x) <= DECODE_TOKENS else mixture_of_groups
    return mixture(x, weights, (experts - first).clamp(0, len(gate_up) - 1), *wide)


def run(backend: Backend, args: tuple) -> Tensor:
    results = []
    assert torch_served(lambda: results.append(backend.op("moe_experts")(*args))) == []
    return results[0]


def assert_close(backend: Backend, args: tuple) -> None:
    tolerance = TOLERANCE if len(args[0]) <= DECODE_TOKENS else PREFILL_TOLERANCE
    assert relative_error(run(backend, args), expected(args)) < tolerance


@pytest.mark.parametrize("tokens", [1, 2, 8, 17, 64, 65])
def test_few_tokens_and_many_under_every_schedule(scheduled, tokens):
    chosen = random_choice(scheduled, tokens, 4, 2)
    assert_close(scheduled, inputs(scheduled, chosen, 4, 256, 128))


@pytest.mark.parametrize("tokens", [65, 80, 81, 97, 113, 128, 129, 144, 145, 161, 257, 321, 432])
def test_all_tokens_on_one_expert(backend, tokens):
    """One to three tiles of up to 144, a product of every number of columns; the last holds one choice or many."""
    chosen = torch.full((tokens, 1), 1, device=backend.device)
    assert_close(backend, inputs(backend, chosen, 3, 128, 128))


@pytest.mark.parametrize("tokens", [145, 161, 193, 225, 257, 288, 289, 577])
def test_one_expert_in_clusters(backend, tokens):
    """One to three tiles of two blocks, of which the second has less, or next to nothing."""
    chosen = torch.zeros(tokens, 1, dtype=torch.int64, device=backend.device)
    assert_close(backend, inputs(backend, chosen, 1, 128, 256))


@pytest.mark.parametrize("width", [128, 640])
@pytest.mark.parametrize("counts", [[0, 1, 17, 65, 289, 640, 0], [0, 890, 0, 0]])
def test_ragged_groups_in_clusters(scheduled, counts, width):
    """A choice of the first block alone; experts without any, and one with all. Tiles of a single stage, which the ring
    holds several of, and of five."""
    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    chosen = chosen[torch.randperm(len(chosen))][:, None].to(scheduled.device)
    assert len(chosen) > BLOCK_CHOICES * len(counts)
    assert_close(scheduled, inputs(scheduled, chosen, len(counts), 128, width))


def test_a_share_of_the_experts_works_alone_where_all_of_them_would(backend):
    """292 choices of four experts are 73 of each, but they would be 146 of each of the two at hand."""
    if backend.emulated is None:
        pytest.skip("a card does not count launches")
    chosen = random_choice(backend, 146, 4, 2)
    *routing, offsets, gate_up, down, _, gate_up_scale, down_scale = inputs(backend, chosen, 4, 128, 128)
    shares = [part[1:3].clone() for part in (gate_up, down, gate_up_scale, down_scale)]
    held = (*routing, offsets[1:4], *shares[:2], 1, *shares[2:])
    product = backend.op("moe_experts")
    assert launches_in_clusters(lambda: product(*held, 4)) == 0
    assert launches_in_clusters(lambda: product(*held)) == 2
    assert same_bits(product(*held, 4), product(*held))


@pytest.mark.parametrize(("hidden", "width"), [(128, 128), (384, 640), (640, 256)])
def test_clusters_give_the_bits_of_blocks_alone(backend, hidden, width):
    """Experts that nobody chooses take a call below the choices an expert from which blocks share weights."""
    chosen = random_choice(backend, 300, 3, 2)
    shared, alone = (list(inputs(backend, chosen, experts, hidden, width)) for experts in (3, 5))
    for position in (5, 6, 8, 9):
        alone[position][:3] = shared[position]
    for position in (0, 1):
        alone[position].copy_(shared[position])
    assert same_bits(run(backend, tuple(shared)), run(backend, tuple(alone)))


@pytest.mark.parametrize("counts", [[0, 1, 0, 0, 7, 8, 9, 0, 15, 17, 0], [0, 1, 63, 0, 64, 65, 127, 129, 0]])
def test_ragged_groups_with_empty_experts_between(scheduled, counts):
    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    chosen = chosen[torch.randperm(len(chosen))][:, None].to(scheduled.device)
    assert_close(scheduled, inputs(scheduled, chosen, len(counts), 128, 128))


@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize(("hidden", "width"), [(128, 128), (384, 640), (640, 384), (896, 256)])
def test_sizes_need_not_fill_stages_and_tiles(backend, hidden, width, tokens):
    """A stage of few tokens is 512 of depth in the first product, 256 in the second; five stages wrap the ring of many;
    384 and 640 outputs end inside a tile of 256."""
    chosen = random_choice(backend, tokens, 2, 1)
    assert_close(backend, inputs(backend, chosen, 2, hidden, width))


@pytest.mark.parametrize("tokens", [3, 65])
def test_the_sizes_of_a_published_model(backend, tokens):
    chosen = torch.zeros(tokens, 1, dtype=torch.int64, device=backend.device)
    assert_close(backend, inputs(backend, chosen, 1, 2048, 512))


@pytest.mark.parametrize(("hidden", "width"), [(4480, 128), (128, 2176)])
def test_the_longest_depth(backend, hidden, width):
    """What the rows of x and of activations leave room for."""
    chosen = torch.zeros(1, 1, dtype=torch.int64, device=backend.device)
    assert_close(backend, inputs(backend, chosen, 1, hidden, width))


@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 13])
def test_every_way_to_share_the_work_gives_the_same_bits(backend, multiprocessors, tokens):
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    args = inputs(backend, random_choice(backend, tokens, 6, 2), 6, 256, 128)
    before, device = run(backend, args), emulator()
    device.emulator_multiprocessors(multiprocessors)
    try:
        assert same_bits(run(backend, args), before)
    finally:
        device.emulator_multiprocessors(4)


@pytest.mark.parametrize("held", [(0, 2), (2, 3), (5, 6)])
@pytest.mark.parametrize("tokens", [1, 9, 66])
def test_a_share_of_the_experts_adds_its_choices_and_no_other(backend, tokens, held):
    chosen = random_choice(backend, tokens, 5, 2)  # nobody chooses the last
    x, weights, experts, order, offsets, gate_up, down, _, *scales = inputs(backend, chosen, 6, 128, 128)
    first, last = held
    share = [part[first:last].clone() for part in (gate_up, down, *scales)]
    args = (x, weights, experts, order, offsets[first : last + 1], *share[:2], first, *share[2:])
    here = (experts >= first) & (experts < last)
    out = run(backend, args)
    if not here.any():
        assert not out.any()
    else:
        for scale in share[2:]:
            scale.nan_to_num_()
        assert relative_error(out, expected(args, here)) < PREFILL_TOLERANCE


@pytest.mark.parametrize("tokens", [5, 66])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_that_start_early_wait_for_the_ones_before(backend, seed, tokens):
    """Of two calls, the second of which takes what the first returns."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    args = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 128, 128)
    call = torch.ops.tokenspeed_emulated.moe_experts

    def chain() -> list[Tensor]:
        first = call(*args)
        return [first, call(first, *args[1:])]

    before = chain()
    for result, alone in zip(queued(emulator(), seed, chain), before, strict=True):
        assert same_bits(result, alone)


def test_sizes_that_cut_blocks_go_to_torch_and_are_right(backend):
    """A width of 64: the gate half ends inside a block, and the up half begins with one of its own."""
    experts, hidden, width = 2, 128, 64
    chosen = random_choice(backend, 3, experts, 1)
    halves = [draw_experts(backend, experts, width, hidden) for _ in range(2)]
    gate_up, gate_up_scale = (torch.cat(parts, 1) for parts in zip(*halves, strict=True))
    down, down_scale = draw_experts(backend, experts, hidden, width)
    args = (backend.randn(3, hidden), *routed(backend, chosen, experts), gate_up, down, 0, gate_up_scale, down_scale)
    results = []
    served = torch_served(lambda: results.append(backend.op("moe_experts")(*args)))
    assert served == ["tokenspeed_torch::moe_experts"]
    wide = torch.stack([torch.cat([by_hand(w[e], s[e]) for w, s in halves]) for e in range(experts)])
    wide_down = torch.stack([by_hand(down[e], down_scale[e]) for e in range(experts)])
    assert relative_error(results[0], reference.mixture(*args[:3], wide, wide_down)) < 2e-2


@pytest.mark.parametrize("tokens", [9, 66])
def test_a_row_of_nan_stays_in_its_row(backend, tokens):
    args = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 128, 128)
    clean = run(backend, args)
    args[0][4] = torch.nan
    spoiled = run(backend, args)
    others = [row for row in range(tokens) if row != 4]
    assert spoiled[4].isnan().all()
    assert same_bits(spoiled[others], clean[others])


@pytest.mark.parametrize("tokens", [3, 99])
def test_rows_of_padding_add_nothing_to_themselves_and_others(backend, tokens):
    """They chose the expert behind the last, as `moe_route` says."""
    x, _, chosen, _, _, *rest = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 128, 128)
    padding = torch.arange(tokens, device=backend.device) % 3 == 1
    chosen[padding] = 4
    weights, chosen, order, offsets = routed(backend, chosen.long(), 4)
    x[padding], weights[padding] = torch.nan, 0
    out = run(backend, (x, weights, chosen, order, offsets, *rest))
    kept = [part[~padding] for part in (x, weights, chosen)]
    assert not out[padding].any()
    assert relative_error(out[~padding], expected((*kept, order, offsets, *rest))) < PREFILL_TOLERANCE
