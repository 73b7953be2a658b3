"""Claims about the kernel that is a decode layer's whole mixer: sizes, sharing, slots, schedules, early start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenspeed.ops
from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import Backend, bounded, relative_error, same_bits
from tests.ops.gdn import Heads, Layer, Mixer, Sequence, columns, published
from tokenspeed.ops.gdn_block import GDN_BLOCK_ROWS, gdn_block_scratch

pytest_plugins = ["tests.kernels.schedules"]

EPS = 1e-6
TOLERANCE = 1e-2  # norm, projections, convolution, heads and output are rounded to bf16
PUBLISHED = [(1024, 16), (2048, 16), (2048, 32), (4096, 64)]  # hidden, value heads; 16 key heads


class Block(Layer):
    """A layer's slots and weights, with the projections around the delta rule."""

    def __init__(
        self, backend: Backend, heads: Heads, slots: int, hidden: int = 128, padding: int | None = None, **record
    ):
        """padding: rows of in_proj that stand for nothing; by default those that the operators apart want."""
        super().__init__(backend, heads, slots, **record)
        padding = -2 * heads.nv % 8 if padding is None else padding
        self.hidden, self.values = hidden, heads.nv * heads.dv
        self.in_proj = backend.randn(heads.channels + self.values + 2 * heads.nv + padding, hidden) * hidden**-0.5
        self.out_proj = backend.randn(hidden, self.values) * self.values**-0.5
        self.stream_norm = backend.randn(hidden) * 0.1
        self.scratch = backend.tensor([0] * gdn_block_scratch(len(self.in_proj), self.values))

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        return self.backend.randn(count, self.hidden), self.backend.randn(count, self.hidden)

    def arguments(self, stream: tuple[Tensor, Tensor], sequences: list[Sequence]) -> list:
        _, *where = columns(self.backend, sequences)
        weights = (self.in_proj, self.conv_weight, self.a_log, self.dt_bias, self.norm_weight)
        record = (self.state, self.ring, self.cursor, self.window)
        return [*stream, self.stream_norm, EPS, *weights, *record, *where, self.out_proj, self.scratch]

    def run(self, stream: tuple[Tensor, Tensor], sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """By the kernel, and by nothing else."""
        results, args = [], self.arguments(stream, sequences)
        assert torch_served(lambda: results.append(self.backend.op("gdn_block")(*args))) == []
        assert same_bits(results[0][1].cpu(), (stream[0] + stream[1]).cpu())
        return results[0]

    def projections(self, stream: tuple[Tensor, Tensor]) -> list[Tensor]:
        """qkv, z, a and b of the reference, rounded to bf16."""
        heads = self.heads
        normed = reference.rms_norm(stream[0] + stream[1], self.stream_norm, EPS).bfloat16()
        projected = (reference.exact(normed) @ reference.exact(self.in_proj).T).bfloat16()
        widths = [heads.channels, self.values, heads.nv, heads.nv]
        qkv, z, b, a = projected[:, : sum(widths)].split(widths, dim=1)
        return [qkv, z, a, b]

    def product(self, heads: Tensor) -> Tensor:
        return reference.exact(heads.bfloat16()) @ reference.exact(self.out_proj).T

    def apart(self, stream: tuple[Tensor, Tensor], sequences: list[Sequence]) -> Tensor:
        """By the kernels of the three operators."""
        op, heads = self.backend.op, self.heads
        assert len(self.in_proj) % 8 == 0  # or torch would serve the delta rule
        projected = op("add_rms_norm_linear")(*stream, self.stream_norm, EPS, self.in_proj)[0]
        widths = [heads.channels, self.values, heads.nv, heads.nv]
        qkv, z, b, a = projected[:, : sum(widths)].split(widths, dim=1)
        weights = (self.conv_weight, self.a_log, self.dt_bias, self.norm_weight, EPS)
        record, (_, *where) = (self.state, self.ring, self.cursor, self.window), columns(self.backend, sequences)
        return op("linear")(op("gated_delta_rule_decode")(qkv, z, a, b, *weights, *record, *where), self.out_proj)


def mixer_of(block: Block, sequence: Sequence) -> Mixer:
    state = block.prepare(sequence.read, sequence.context, sequence.pending)
    return Mixer(block, state, block.history(sequence.read, sequence.context), EPS)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 1), (4, 2)])
def test_every_count_of_rows_under_every_schedule(scheduled, batch, tokens):
    """A sequence that starts, one with a full ring, one with a short past, one that is copied on write."""
    block = Block(scheduled, published(2), slots=5, ring_rows=8, window=7)
    every = [Sequence(30, tokens, 1, 1, 8), Sequence(0, tokens, 0, 0), Sequence(2, tokens, 2, 2, 2)]
    every.append(Sequence(19, tokens, 4, 3, 3))
    sequences, stream = every[:batch], block.tokens(batch * tokens)
    mixers = [mixer_of(block, sequence) for sequence in sequences]
    before = block.arena.clone()
    y, _ = block.run(stream, sequences)
    projections = block.projections(stream)
    for i, (sequence, mixer) in enumerate(zip(sequences, mixers, strict=True)):
        rows = slice(i * tokens, (i + 1) * tokens)
        mine = [x[rows] for x in projections]
        expected, states = mixer.run(*mine)
        assert relative_error(y[rows], block.product(expected)) < TOLERANCE
        end = sequence.context + tokens
        assert relative_error(block.fold(sequence.write, end), states[tokens]) < TOLERANCE
    written = {sequence.write for sequence in sequences}
    assert block.untouched(before, written, ("state", "ring", "cursor", "window"))


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_the_bits_are_those_of_the_operators_apart(backend, ratio, tokens):
    """Outputs and slots, in a fold and in an append, with padding between."""
    block = Block(backend, published(ratio), slots=4, ring_rows=8, window=7)
    block.prepare(1, 30, pending=7)
    block.prepare(2, 11, pending=3)
    sequences = [Sequence(30, tokens, 1, 1), Sequence(11, tokens, 2, 2)]
    if tokens < 4:
        sequences.insert(1, Sequence(-1, tokens, -1, -1))
    stream, before = block.tokens(len(sequences) * tokens), block.arena.clone()
    expected = block.apart(stream, sequences)
    arena = block.arena.clone()
    block.arena.copy_(before)
    y, _ = block.run(stream, sequences)
    assert same_bits(y, expected)
    assert same_bits(block.arena, arena)


@pytest.mark.parametrize(("nk", "nv", "ring_rows"), [(1, 1, 8), (2, 4, 7), (1, 3, 5)])
def test_a_run_of_drafts_of_changing_length_equals_the_accepted_tokens_one_by_one(backend, nk, nv, ring_rows):
    """The ring wraps several times; steps propose 1 to 4 tokens and a random number of them counts."""
    block = Block(backend, Heads(nk, nv), slots=5, ring_rows=ring_rows, window=8)
    slots, contexts = [3], [6]
    mixers = [mixer_of(block, Sequence(c, 1, s, s)) for c, s in zip(contexts, slots, strict=True)]
    for step in range(12):
        tokens = int(torch.randint(1, 5, ()))
        sequences = [Sequence(contexts[0], tokens, slots[0], slots[0])]
        sequences.insert(step % 2, Sequence(3, tokens, 2, -1))
        stream = block.tokens(2 * tokens)
        y, _ = block.run(stream, sequences)
        projections = block.projections(stream)
        for sequence, first in zip(sequences, range(0, 2 * tokens, tokens), strict=True):
            rows = slice(first, first + tokens)
            if sequence.write < 0:
                assert not y[rows].any()
                continue
            mine = [x[rows] for x in projections]
            expected, states = mixers[0].run(*mine)
            assert relative_error(y[rows], block.product(expected)) < 2 * TOLERANCE
            accepted = int(torch.randint(1, tokens + 1, ()))
            mixers[0].accept(mine[0], states, accepted)
            contexts[0] += accepted
    assert relative_error(block.fold(slots[0], contexts[0]), mixers[0].state) < 2 * TOLERANCE


@pytest.mark.parametrize(
    ("nk", "nv", "hidden", "padding"), [(1, 1, 64, 0), (1, 2, 192, 12), (3, 3, 576, 2), (1, 3, 1088, 40), (2, 8, 64, 8)]
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_sizes_need_not_fill_stages_and_tiles(backend, nk, nv, hidden, padding, tokens):
    """Stages of 512 of depth that end early; a last tile of in_proj with rows to spare, and padding; no tile for some
    blocks."""
    block = Block(backend, Heads(nk, nv), slots=2, hidden=hidden, padding=padding, ring_rows=8, window=6)
    sequence = Sequence(9, tokens, 1, 1, 2)
    mixer, stream = mixer_of(block, sequence), block.tokens(tokens)
    y, _ = block.run(stream, [sequence])
    expected, _ = mixer.run(*block.projections(stream))
    assert relative_error(y, block.product(expected)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 4])
def test_every_way_to_share_the_work_gives_the_same_bits(backend, tokens):
    """By 2 to 40 blocks: a key head's rows split 1 to 8 ways, blocks without a tile, and blocks without anything."""
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    block, device = Block(backend, Heads(2, 4), slots=2, hidden=192, ring_rows=8, window=6), emulator()
    block.prepare(1, 30, pending=6)
    stream, before, results = block.tokens(tokens), block.arena.clone(), []
    try:
        for multiprocessors in (2, 4, 7, 9, 16, 40, 3):
            device.emulator_multiprocessors(multiprocessors)
            block.arena.copy_(before)
            results.append((*block.run(stream, [Sequence(30, tokens, 1, 1)]), block.arena.clone()))
    finally:
        device.emulator_multiprocessors(4)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("multiprocessors", [4, 24])
def test_no_order_of_threads_changes_a_bit(backend, multiprocessors):
    """The window holds no entry more than a step wants, so that a block that stores too early spoils another's past."""
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    block, device = Block(backend, published(2), slots=4, ring_rows=3, window=5), emulator()
    block.prepare(1, 30, pending=2)
    block.prepare(2, 3, pending=0)
    sequences = [Sequence(30, 2, 1, 1), Sequence(0, 2, 0, 0), Sequence(3, 2, 2, 3)]
    stream, before, results = block.tokens(6), block.arena.clone(), []
    device.emulator_multiprocessors(multiprocessors)
    try:
        for seed in range(8):
            device.emulator_seed(seed)
            block.arena.copy_(before)
            results.append((*block.run(stream, sequences), block.arena.clone()))
    finally:
        device.emulator_seed(0)
        device.emulator_multiprocessors(4)
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("seed", range(8, 34))
def test_no_block_stores_what_another_has_not_read(backend, seed):
    """A fold moves the cursor, and four new inputs take the place of the last that the convolution reads: a block that
    stores before all of its group have read spoils their past. Under some of these schedules it would."""
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    torch.manual_seed(1)
    block, device = Block(backend, published(1), slots=2, hidden=64, ring_rows=3, window=6), emulator()
    block.prepare(1, 30, pending=3)
    stream, before = block.tokens(4), block.arena.clone()
    expected, arena = block.run(stream, [Sequence(30, 4, 1, 1)]), block.arena.clone()
    block.arena.copy_(before)
    device.emulator_multiprocessors(17)
    device.emulator_seed(seed)
    try:
        results = block.run(stream, [Sequence(30, 4, 1, 1)])
    finally:
        device.emulator_seed(0)
        device.emulator_multiprocessors(4)
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    assert same_bits(block.arena, arena)


@bounded
@given(st.data())
def test_any_batch_under_any_schedule(backend, data):
    tokens = data.draw(st.integers(1, 4), "tokens")
    batch = data.draw(st.integers(1, min(4, GDN_BLOCK_ROWS // tokens)), "batch")
    ring_rows = data.draw(st.sampled_from([3, 5, 8]), "ring rows")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    torch.manual_seed(seed)
    block = Block(backend, published(data.draw(st.sampled_from([1, 2, 4]), "ratio")), 8, ring_rows=ring_rows, window=7)
    sequences = []
    for i in range(batch):
        context = data.draw(st.sampled_from([-1, 0, 1, 2, 17, 40]), "context")
        copies = data.draw(st.booleans(), "copy on write")
        pending = data.draw(st.integers(0, min(max(context, 0), ring_rows)), "pending")
        write = -1 if context < 0 else 4 + i if copies else i
        sequences.append(Sequence(context, tokens, -1 if context < 0 else i, write, pending))
        if context > 0:
            block.prepare(i, context, pending)
    stream, before = block.tokens(batch * tokens), block.arena.clone()
    expected = block.apart(stream, sequences)
    arena = block.arena.clone()
    block.arena.copy_(before)
    device = emulator() if backend.emulated is not None else None
    if device:
        device.emulator_seed(seed)
        device.emulator_multiprocessors(data.draw(st.sampled_from([4, 7, 9, 33]), "multiprocessors"))
    try:
        y, _ = block.run(stream, sequences)
    finally:
        if device:
            device.emulator_seed(0)
            device.emulator_multiprocessors(4)
    assert same_bits(y, expected)
    assert same_bits(block.arena, arena)


@pytest.mark.parametrize("others", [[(1, 1)], [(2, 4), (3, 1)], [(9, 1), (1, 4)]])
def test_calls_of_all_sizes_pass_the_scratch_on(scheduled, others):
    """Whatever the last call left, a kernel's or torch's (nine rows), the next takes nothing for its own."""
    block = Block(scheduled, published(2), slots=10, hidden=192)
    block.prepare(1, 30, pending=2)
    stream, before = block.tokens(1), block.arena.clone()
    first, _ = block.run(stream, [Sequence(30, 1, 1, 1)])
    for batch, tokens in others:
        other = Block(scheduled, published(1), slots=10, hidden=64, window=7)
        other.scratch = block.scratch
        sequences = [Sequence(0, tokens, slot, slot) for slot in range(batch)]
        scheduled.op("gdn_block")(*other.arguments(other.tokens(batch * tokens), sequences))
        block.arena.copy_(before)
        assert same_bits(block.run(stream, [Sequence(30, 1, 1, 1)])[0], first)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens", [1, 4])
def test_steps_that_start_early_wait_for_the_step_before(backend, tokens, seed):
    """Three steps in a row on one slot, each of which may run up to its wait before the one ahead has begun."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    block = Block(backend, published(2), slots=2, hidden=64, ring_rows=5, window=7)
    block.prepare(1, 9, pending=1)
    streams, before = [block.tokens(tokens) for _ in range(3)], block.arena.clone()
    calls = [block.arguments(stream, [Sequence(9 + i, tokens, 1, 1)]) for i, stream in enumerate(streams)]

    def run() -> list[tuple[Tensor, Tensor]]:
        return [backend.op("gdn_block")(*call) for call in calls]

    expected, arena = run(), block.arena.clone()
    block.arena.copy_(before)
    for result, wanted in zip(queued(emulator(), seed, run), expected, strict=True):
        assert all(same_bits(a, b) for a, b in zip(result, wanted, strict=True))
    assert same_bits(block.arena, arena)


@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_that_starts_early_waits_for_the_one_before(backend, seed):
    """A copy brings one of the arguments; what are weights may be read before the wait."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    block, device = Block(backend, published(1), slots=2, hidden=64, ring_rows=5, window=6), emulator()
    block.prepare(1, 9, pending=1)
    stream, before = block.tokens(2), block.arena.clone()
    expected = block.run(stream, [Sequence(9, 2, 1, 1)])
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])
    for position in (0, 1, 13, 14, 15, 17):  # x, residual, contexts, slots, scratch
        block.arena.copy_(before)
        given = block.arguments(stream, [Sequence(9, 2, 1, 1)])
        given[position], arena = behind_a_copy(given[position])
        device.emulator_seed(seed)
        device.emulator_defer(1)
        try:
            torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
            result = torch.ops.tokenspeed_emulated.gdn_block(*given)
            assert device.emulator_synchronize() == 0
        finally:
            device.emulator_defer(0)
            device.emulator_seed(0)
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True)), f"argument {position}"


@pytest.mark.parametrize("poison", [0, 1])
def test_a_row_of_nan_stays_in_its_sequence(backend, poison):
    block = Block(backend, published(2), slots=4)
    for slot in range(3):
        block.prepare(slot, 5)
    stream, sequences, before = block.tokens(3), [Sequence(5, 1, slot, slot) for slot in range(3)], block.arena.clone()
    clean = block.run(stream, sequences)
    block.arena.copy_(before)
    stream[poison][1] = torch.nan
    spoiled = block.backend.op("gdn_block")(*block.arguments(stream, sequences))
    assert all(part[1].isnan().all() for part in spoiled)
    assert all(same_bits(a[[0, 2]], b[[0, 2]]) for a, b in zip(spoiled, clean, strict=True))


def test_an_fp32_norm_weight_and_a_row_stride_are_fine(backend):
    block = Block(backend, published(1), slots=1)
    block.norm_weight = block.norm_weight.float() + 1e-3
    wide = backend.randn(2, 256)
    stream = (wide[:, 8:136], block.tokens(2)[1])
    mixer = mixer_of(block, Sequence(0, 2, 0, 0))
    expected, _ = mixer.run(*block.projections(stream))
    assert relative_error(block.run(stream, [Sequence(0, 2, 0, 0)])[0], block.product(expected)) < TOLERANCE


@pytest.mark.parametrize(("batch", "tokens", "hidden"), [(9, 1, 128), (1, 5, 128), (2, 1, 96)])
def test_what_no_kernel_serves_goes_to_torch_and_is_right(backend, batch, tokens, hidden):
    block = Block(backend, published(2), slots=batch, hidden=hidden, ring_rows=8, window=8)
    sequences, stream, results = [Sequence(0, tokens, i, i) for i in range(batch)], block.tokens(batch * tokens), []
    args = block.arguments(stream, sequences)
    served = torch_served(lambda: results.append(backend.op("gdn_block")(*args)))
    assert "tokenspeed_torch::gdn_block" in served
    projections = block.projections(stream)
    for i, sequence in enumerate(sequences):
        mixer, rows = mixer_of(block, sequence), slice(i * tokens, (i + 1) * tokens)
        expected, _ = mixer.run(*(x[rows] for x in projections))
        assert relative_error(results[0][0][rows], block.product(expected)) < 2e-2


def test_a_scratch_that_is_too_short_is_refused(backend):
    block = Block(backend, published(1), slots=1)
    args = block.arguments(block.tokens(1), [Sequence(0, 1, 0, 0)])
    args[-1] = args[-1][:-1]
    with pytest.raises((RuntimeError, ValueError), match="scratch has"):
        backend.op("gdn_block")(*args)


@pytest.fixture
def card(backend) -> Backend:
    if backend.device != "cuda":
        pytest.skip("too much work for the emulated device")
    return backend


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize(("hidden", "heads"), PUBLISHED)
def test_the_published_models_on_a_card(card, hidden, heads, batch, tokens):
    """Twenty steps beside the three operators: outputs within rounding, the slots too."""
    block = Block(card, Heads(16, heads), slots=batch, hidden=hidden, ring_rows=8, window=7)
    for slot in range(batch):
        block.prepare(slot, 40 + slot, pending=slot % 8)
    for step in range(20):
        sequences = [Sequence(40 + slot + step, tokens, slot, slot) for slot in range(batch)]
        stream, before = block.tokens(batch * tokens), block.arena.clone()
        expected = block.apart(stream, sequences)
        folded = [block.fold(slot, 40 + slot + step + tokens) for slot in range(batch)]
        block.arena.copy_(before)
        y, _ = block.run(stream, sequences)
        assert relative_error(y, expected) < TOLERANCE
        for slot in range(batch):
            assert relative_error(block.fold(slot, 40 + slot + step + tokens), folded[slot]) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_thousand_runs_on_a_card_give_the_same_bits(card, tokens):
    block = Block(card, Heads(16, 32), slots=1, hidden=512, ring_rows=8, window=7)
    block.prepare(0, 40, pending=8)  # a fold in each
    args, before = block.arguments(block.tokens(tokens), [Sequence(40, tokens, 0, 0)]), block.arena.clone()
    expected, arena = torch.ops.tokenspeed.gdn_block(*args)[0], block.arena.clone()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        block.arena.copy_(before)
        different += (torch.ops.tokenspeed.gdn_block(*args)[0] != expected).sum() + (block.arena != arena).sum()
    assert different.item() == 0


def test_a_graph_replays_on_a_card(card):
    """Three steps a replay, which go on where the last replay left the slot."""
    block = Block(card, Heads(16, 32), slots=1, hidden=2048, ring_rows=8, window=7)
    block.prepare(0, 40, pending=3)
    args, before = block.arguments(block.tokens(1), [Sequence(40, 1, 0, 0)]), block.arena.clone()
    context = args[13]

    def steps() -> list[Tensor]:
        results = []
        for _ in range(3):
            results.append(torch.ops.tokenspeed.gdn_block(*args)[0])
            context.add_(1)
        return results

    expected = [result.clone() for _ in range(20) for result in steps()]
    arena = block.arena.clone()
    block.arena.copy_(before), context.fill_(40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = steps()
    for replay in range(20):
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(results, expected[3 * replay : 3 * replay + 3], strict=True))
    assert same_bits(block.arena, arena)


def test_the_operator_is_the_composition(backend):
    block = Block(backend, published(2), slots=2)
    args = block.arguments(block.tokens(2), [Sequence(0, 2, 1, 1)])
    before = block.arena.clone()
    y, _ = block.backend.op("gdn_block")(*args)
    block.arena.copy_(before)
    expected, _ = tokenspeed.ops.gdn_block.__wrapped__(*args)
    assert relative_error(y, expected) < TOLERANCE
