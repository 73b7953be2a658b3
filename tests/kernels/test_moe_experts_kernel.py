"""Claims about the expert product's kernels: entries, tiles and tails, both paths, every share of the work."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import Backend, bounded, relative_error, same_bits

pytest_plugins = ["tests.kernels.schedules"]

TOLERANCE = 6e-3  # two roundings to bf16 (activation and output), three in a prefill
DECODE_TOKENS = 64  # more take the prefill kernels
CLUSTER_CHOICES = 192  # a prefill of more than these an expert, on average, shares weights in clusters
PUBLISHED = [(256, 8, 2048, 512), (256, 8, 3072, 1024), (512, 10, 4096, 1024)]  # experts, top-k, hidden, width


def random_choice(backend: Backend, tokens: int, experts: int, top_k: int) -> Tensor:
    """Distinct experts of each token, in no order."""
    return torch.rand(tokens, experts).topk(top_k).indices.to(backend.device)


def routed(backend: Backend, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `moe_route` returns, for given experts [tokens, top_k]."""
    grouped, order = chosen.flatten().sort(stable=True)
    bounds = torch.arange(experts + 1, device=chosen.device)
    offsets = torch.searchsorted(grouped, bounds, out_int32=True)
    weights = torch.rand(chosen.shape).to(backend.device, backend.dtype)
    return weights, chosen.int(), order.int(), offsets


def inputs(backend: Backend, chosen: Tensor, experts: int, hidden: int, width: int) -> tuple[Tensor, ...]:
    """Arguments of `moe_experts`; the weights of experts without tokens are NaN."""
    gate_up, down = backend.randn(experts, 2 * width, hidden) * 0.2, backend.randn(experts, hidden, width) * 0.2
    unused = torch.ones(experts, dtype=torch.bool, device=backend.device)
    unused[chosen.flatten()] = False
    gate_up[unused], down[unused] = torch.nan, torch.nan
    return backend.randn(len(chosen), hidden), *routed(backend, chosen, experts), gate_up, down


def error(backend: Backend, args: tuple[Tensor, ...]) -> float:
    x, weights, experts, _, _, gate_up, down = args
    results = []
    assert torch_served(lambda: results.append(backend.op("moe_experts")(*args))) == []
    return relative_error(results[0], reference.mixture(x, weights, experts, gate_up, down))


@pytest.mark.parametrize("tokens", [1, 8, 17, 65])
def test_few_tokens_and_many_under_every_schedule(scheduled, tokens):
    chosen = random_choice(scheduled, tokens, 4, 2)
    assert error(scheduled, inputs(scheduled, chosen, 4, 128, 64)) < TOLERANCE


@pytest.mark.parametrize(
    "tokens",
    [16, 17, 33, DECODE_TOKENS, 65, 80, 81, 97, 113, 129, 145, 161, 177, 191, 192, 193, 257, 320, 321, 385, 600, 643],
)
def test_all_tokens_on_one_expert(backend, tokens):
    """Several entries of 16 choices; one to four tiles of up to 192, a product of every number of columns."""
    chosen = torch.full((tokens, 1), 3, device=backend.device)
    assert error(backend, inputs(backend, chosen, 5, 64, 64)) < TOLERANCE


@pytest.mark.parametrize("tokens", [193, 225, 257, 289, 320, 321, 600, 643])
def test_one_expert_in_clusters(backend, tokens):
    """One to three tiles of three to five groups of 64, whose last holds one choice or many."""
    chosen = torch.zeros(tokens, 1, dtype=torch.int64, device=backend.device)
    assert error(backend, inputs(backend, chosen, 1, 64, 1024)) < TOLERANCE


def launches_in_clusters(call: Callable[[], object]) -> int:
    before = emulator().emulator_cluster_launches()
    call()
    return emulator().emulator_cluster_launches() - before


def test_a_share_of_the_experts_works_alone_where_all_of_them_would(backend):
    """388 choices of four experts are 97 of each, but they would be 194 of each of the two at hand."""
    if backend.emulated is None:
        pytest.skip("a card does not count launches")
    chosen = random_choice(backend, 194, 4, 2)
    x, weights, experts, order, offsets, gate_up, down = inputs(backend, chosen, 4, 64, 64)
    held = (x, weights, experts, order, offsets[1:4], gate_up[1:3].clone(), down[1:3].clone(), 1, None, None)
    product = backend.op("moe_experts")
    assert launches_in_clusters(lambda: product(*held, 4)) == 0
    assert launches_in_clusters(lambda: product(*held)) == 2
    assert same_bits(product(*held, 4), product(*held))


@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("counts", [[0, 1, 63, 65, 129, 321, 1025, 0], [0, 890, 0, 0]])
def test_ragged_groups_in_clusters(scheduled, counts, width):
    """Tiles of one to five groups, one of a single choice; experts without any, and one with all. Tiles of a single
    stage, which the ring holds several of, and of sixteen."""
    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    chosen = chosen[torch.randperm(len(chosen))][:, None].to(scheduled.device)
    assert len(chosen) > CLUSTER_CHOICES * len(counts)
    assert error(scheduled, inputs(scheduled, chosen, len(counts), 64, width)) < TOLERANCE


@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (320, 192), (192, 1088)])
def test_clusters_give_the_bits_of_blocks_alone(backend, hidden, width):
    """Experts that nobody chooses take a call below the choices an expert from which blocks share weights."""
    chosen = random_choice(backend, 300, 3, 2)
    shared, alone = (inputs(backend, chosen, experts, hidden, width) for experts in (3, 5))
    alone[-2][:3], alone[-1][:3] = shared[-2], shared[-1]
    for position in (0, 1):
        alone[position].copy_(shared[position])
    assert same_bits(*(backend.op("moe_experts")(*args) for args in (shared, alone)))


@pytest.mark.parametrize(
    "counts", [[0, 1, 0, 0, 7, 8, 9, 0, 15, 17, 0], [0, 1, 63, 0, 64, 65, 127, 129, 0], [0, 191, 0, 192, 193, 1, 0]]
)
def test_ragged_groups_with_empty_experts_between(scheduled, counts):
    """Groups on both sides of 8, 16, 64, 128 and 192 choices, first and last expert empty."""
    chosen = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    chosen = chosen[torch.randperm(len(chosen))][:, None].to(scheduled.device)
    assert error(scheduled, inputs(scheduled, chosen, len(counts), 64, 64)) < TOLERANCE


@bounded
@given(st.data())
def test_any_routing_under_any_schedule(backend, data):
    experts = data.draw(st.integers(1, 12), "experts")
    top_k = data.draw(st.integers(1, min(experts, 4)), "top_k")
    tokens = data.draw(st.integers(1, 80), "tokens")
    skew = data.draw(st.sampled_from([0.0, 1.0, 6.0]), "skew")  # of the experts' popularity
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    torch.manual_seed(seed)
    chosen = (torch.randn(tokens, experts) + skew * torch.randn(experts)).topk(top_k).indices.to(backend.device)
    args = inputs(backend, chosen, experts, 64, 64)
    if backend.emulated is None:
        assert error(backend, args) < TOLERANCE
        return
    device = emulator()
    device.emulator_seed(seed)
    try:
        assert error(backend, args) < TOLERANCE
    finally:
        device.emulator_seed(0)


@pytest.mark.parametrize(("tokens", "top_k"), [(3, 16), (66, 1)])
def test_the_most_experts_and_the_most_choices(backend, tokens, top_k):
    """512 experts fill the prefill's table of tiles; its last expert has choices too."""
    chosen = random_choice(backend, tokens, 512, top_k)
    chosen[0] = torch.arange(512 - top_k, 512, device=backend.device)
    assert error(backend, inputs(backend, chosen, 512, 64, 64)) < TOLERANCE


@pytest.mark.parametrize("tokens", [5, 70, 400])
@pytest.mark.parametrize(("hidden", "width"), [(64, 64), (192, 320), (320, 192)])
def test_sizes_need_not_fill_stages_and_tiles(backend, tokens, hidden, width):
    """Five stages wrap the prefill's ring of four; 192 and 320 end inside a stage of 256, a tile of 128 and of 256. Of
    400 tokens experts have more choices than a block alone takes at once."""
    chosen = random_choice(backend, tokens, 2, 1)
    assert error(backend, inputs(backend, chosen, 2, hidden, width)) < TOLERANCE


@pytest.mark.parametrize(("hidden", "width"), [(2048, 512), (4096, 1024)])
def test_the_published_sizes_of_one_expert(backend, hidden, width):
    """The ring wraps many times, and the rows of x leave it its fewest stages."""
    chosen = torch.zeros(2, 1, dtype=torch.int64, device=backend.device)
    assert error(backend, inputs(backend, chosen, 1, hidden, width)) < TOLERANCE


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 13])
@pytest.mark.parametrize(("tokens", "width"), [(3, 128), (66, 128), (400, 192), (600, 64), (600, 1024)])
def test_every_way_to_share_the_work_gives_the_same_bits(backend, tokens, width, multiprocessors):
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    args = inputs(backend, random_choice(backend, tokens, 6, 2), 6, 128, width)
    expected, device = backend.op("moe_experts")(*args), emulator()
    device.emulator_multiprocessors(multiprocessors)
    try:
        assert same_bits(backend.op("moe_experts")(*args), expected)
    finally:
        device.emulator_multiprocessors(4)


@pytest.mark.parametrize(("tokens", "width"), [(11, 64), (70, 64), (300, 192), (400, 64), (400, 1024)])
def test_no_order_of_threads_changes_a_bit(backend, tokens, width):
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    args = inputs(backend, random_choice(backend, tokens, 6, 3), 6, 128, width)
    expected, device = backend.op("moe_experts")(*args), emulator()
    try:
        for seed in range(1, 6):
            device.emulator_seed(seed)
            assert same_bits(backend.op("moe_experts")(*args), expected)
    finally:
        device.emulator_seed(0)


@pytest.mark.parametrize(("tokens", "width"), [(5, 64), (67, 64), (301, 192), (401, 1024)])
def test_a_token_has_the_same_bits_whoever_shares_its_experts(backend, tokens, width):
    """Tokens of the same experts change places in the entry and the tile, but not their sums."""
    chosen = random_choice(backend, tokens, 4, 2)
    weights, *_ = routed(backend, chosen, 4)
    x, _, _, _, _, gate_up, down = inputs(backend, chosen, 4, 128, width)
    gate_up, down = gate_up.nan_to_num(), down.nan_to_num()

    def run(rows: Tensor) -> Tensor:
        _, experts, order, offsets = routed(backend, chosen[rows], 4)
        return backend.op("moe_experts")(x[rows], weights[rows], experts, order, offsets, gate_up, down)

    backwards = torch.arange(tokens - 1, -1, -1, device=backend.device)
    assert same_bits(run(backwards)[backwards], run(backwards.flip(0)))


@pytest.mark.parametrize("held", [(0, 2), (2, 3), (3, 6), (5, 6)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (9, 64), (66, 64), (250, 1024)])
def test_a_share_of_the_experts_adds_its_choices_and_no_other(scheduled, tokens, width, held):
    """Choices of experts elsewhere, in front and behind, and tokens (or all of them) that chose none of these."""
    chosen = random_choice(scheduled, tokens, 5, 2)  # nobody chooses the last
    x, weights, experts, order, offsets, gate_up, down = inputs(scheduled, chosen, 6, 64, width)
    first, last = held
    share = (gate_up[first:last].clone(), down[first:last].clone())
    here = (experts >= first) & (experts < last)
    weights = weights.masked_fill(~here, torch.nan)  # as rows, weights of choices elsewhere are not used
    results = []

    def run() -> None:
        args = (x, weights, experts, order, offsets[first : last + 1], *share, first)
        results.append(scheduled.op("moe_experts")(*args))

    assert torch_served(run) == []
    expected = reference.mixture(x, weights.masked_fill(~here, 0), experts, gate_up.nan_to_num(), down.nan_to_num())
    if not here.any():
        assert not results[0].any()
    else:
        assert relative_error(results[0], expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "width"), [(5, 64), (66, 64), (258, 192), (400, 1024)])
def test_a_kernel_that_starts_early_waits_for_the_one_before(backend, tokens, width, seed):
    """Queued, so that each kernel may run up to its wait before the one before it has begun: those of one call, and a
    copy that brings one of the arguments. `gate_up` and `down` are weights, which may be read before the wait."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    args = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 64, width)
    expected, device = backend.op("moe_experts")(*args), emulator()
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])
    for position in range(5):
        given = list(args)
        given[position], arena = behind_a_copy(args[position])

        def copied_and_called(given=given, arena=arena):
            torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
            return torch.ops.tokenspeed_emulated.moe_experts(*given)

        result = queued(device, seed, copied_and_called)
        assert same_bits(result, expected), f"argument {position}"


@pytest.mark.parametrize(("tokens", "width"), [(9, 64), (66, 64), (258, 192), (400, 1024)])
def test_a_row_of_nan_stays_in_its_row(backend, tokens, width):
    args = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 64, width)
    clean = backend.op("moe_experts")(*args)
    args[0][4] = torch.nan
    spoiled = backend.op("moe_experts")(*args)
    others = [row for row in range(tokens) if row != 4]
    assert spoiled[4].isnan().all()
    assert same_bits(spoiled[others], clean[others])


@pytest.mark.parametrize(("tokens", "width"), [(6, 64), (66, 64), (258, 192), (400, 1024)])
def test_a_row_stride_is_fine(backend, tokens, width):
    _, *rest = inputs(backend, random_choice(backend, tokens, 4, 2), 4, 128, width)
    assert error(backend, (backend.randn(tokens, 192)[:, 8:136], *rest)) < TOLERANCE


def test_what_no_kernel_serves_goes_to_torch_and_is_right(backend):
    odd = inputs(backend, random_choice(backend, 3, 4, 2), 4, 64, 32)
    fp32 = tuple(arg.float() if arg.dtype == backend.dtype else arg for arg in odd)
    experts = inputs(backend, random_choice(backend, 66, 513, 1), 513, 64, 64)
    for args, tolerance in ((odd, 2e-2), (fp32, 1e-5), (experts, 2e-2)):
        x, weights, experts, _, _, gate_up, down = args
        results = []
        served = torch_served(lambda args=args, results=results: results.append(backend.op("moe_experts")(*args)))
        assert served == ["tokenspeed_torch::moe_experts"]
        assert relative_error(results[0], reference.mixture(x, weights, experts, gate_up, down)) < tolerance


@pytest.fixture
def card(backend) -> Backend:
    if backend.device != "cuda":
        pytest.skip("too much work for the emulated device")
    return backend


def inputs_on_card(experts: int, top_k: int, hidden: int, width: int, tokens: int) -> tuple[Tensor, ...]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(scale)

    popular = torch.randn(experts, device="cuda") * 0.5  # loads that differ, as in a trained model
    logits = (draw(tokens, experts).float() + popular).bfloat16()
    routing = torch.ops.tokenspeed.moe_route(logits, top_k)
    gate_up, down = draw(experts, 2 * width, hidden, scale=hidden**-0.5), draw(experts, hidden, width, scale=0.05)
    return draw(tokens, hidden), *routing, gate_up, down


def mixture_by_expert(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`reference.mixture` in fp64, an expert at a time, on the card."""
    width, out = down.shape[2], torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in experts.unique().tolist():
        token, rank = (experts == expert).nonzero(as_tuple=True)
        hidden = x[token].double() @ gate_up[expert].double().T
        row = (torch.nn.functional.silu(hidden[:, :width]) * hidden[:, width:]) @ down[expert].double().T
        out.index_add_(0, token, row * weights[token, rank].double()[:, None])
    return out


@pytest.mark.parametrize("tokens", [1, 8, 64, 65, 4096, 8192])
@pytest.mark.parametrize(("experts", "top_k", "hidden", "width"), PUBLISHED)
def test_the_published_models_on_a_card(card, experts, top_k, hidden, width, tokens):
    x, weights, chosen, *rest = inputs_on_card(experts, top_k, hidden, width, tokens)
    results = []
    assert torch_served(lambda: results.append(torch.ops.tokenspeed.moe_experts(x, weights, chosen, *rest))) == []
    assert results[0].isfinite().all()
    rows = torch.randperm(tokens, device="cuda")[:12]  # fp64 takes a while
    expected = mixture_by_expert(x[rows], weights[rows], chosen[rows], *rest[2:])
    assert relative_error(results[0][rows], expected) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "experts", "width"),
    [(1, 256, 128), (9, 256, 128), (64, 256, 128), (300, 256, 128), (600, 16, 128), (600, 16, 1024)],
)
def test_a_thousand_runs_on_a_card_give_the_same_bits(card, tokens, experts, width):
    args = inputs_on_card(experts, 8, 512, width, tokens)
    expected = torch.ops.tokenspeed.moe_experts(*args)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (torch.ops.tokenspeed.moe_experts(*args) != expected).sum()
    assert different.item() == 0


@pytest.mark.parametrize(("tokens", "experts"), [(300, 256), (600, 16)])
def test_replays_of_a_graph_on_a_card_give_the_same_bits(card, tokens, experts):
    """Each replay finds in the workspace what the one before left."""
    args = inputs_on_card(experts, 8, 512, 128, tokens)
    expected = torch.ops.tokenspeed.moe_experts(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.ops.tokenspeed.moe_experts(*args)
    for _ in range(10):
        result.zero_()
        graph.replay()
        assert same_bits(result, expected)
