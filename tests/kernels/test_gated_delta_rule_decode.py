"""Claims about the delta rule's decode kernel beyond its operator's contract: the ring, the split, the schedule."""

import ctypes

import pytest
import torch

from tests.kernels.launches import queued
from tests.ops import reference
from tests.ops.backends import Backend, make_backend, relative_error, same_bits
from tests.ops.gdn import Layer, Mixer, Sequence, columns, published

EPS = 1e-6


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


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(hash(request.node.name) & 0xFFFF)


def decode(layer: Layer, projections, sequences, alive: list | None = None, settled: bool = False):
    """One step. `alive` keeps the index tensors, for launches that run later."""
    _, contexts, reads, writes = columns(layer.backend, sequences)
    if alive is not None:
        alive += [contexts, reads, writes]
    weights = (layer.conv_weight, layer.a_log, layer.dt_bias, layer.norm_weight, EPS)
    record = (layer.state, layer.ring, layer.cursor, layer.window)
    rows = (contexts, reads, writes)
    return layer.backend.op("gated_delta_rule_decode")(*projections, *weights, *record, *rows, settled)


def mixer_of(layer: Layer, sequence: Sequence) -> Mixer:
    state = layer.prepare(sequence.read, sequence.context, sequence.pending)
    return Mixer(layer, state, layer.history(sequence.read, sequence.context), EPS)


@pytest.mark.parametrize("ring_rows", [1, 3, 8])
def test_the_state_is_written_only_when_the_ring_is_full(backend, ring_rows):
    layer = Layer(backend, published(1), slots=2, ring_rows=ring_rows)
    mixer = mixer_of(layer, Sequence(20, 1, 1, 1))
    writes = []
    for step in range(3 * ring_rows + 3):
        before = layer.state.clone()
        projections = layer.projections(1)
        out = decode(layer, projections, [Sequence(20 + step, 1, 1, 1)])
        expected, states = mixer.run(*projections)
        backend.assert_close(out, expected)
        mixer.accept(projections[0], states, 1)
        if not same_bits(before, layer.state):
            writes.append(step)
            assert layer.cursor[1].tolist() == [20 + step + 1]
    assert writes == [ring_rows, 2 * ring_rows + 1, 3 * ring_rows + 2]


@pytest.mark.parametrize(("nk", "nv", "ring_rows"), [(1, 1, 8), (2, 4, 7), (1, 3, 5), (1, 4, 8)])
def test_a_long_run_of_drafts_of_changing_length_equals_the_accepted_tokens_one_by_one(backend, nk, nv, ring_rows):
    """The ring wraps several times; steps propose 1 to 6 tokens and a random number of them counts."""
    heads = type(published(1))(nk, nv)
    layer = Layer(backend, heads, slots=5, ring_rows=ring_rows, window=8)
    slots, contexts = [3, 0], [6, 0]
    mixers = [mixer_of(layer, Sequence(c, 1, s, s)) for c, s in zip(contexts, slots, strict=True)]
    for step in range(14):
        tokens = int(torch.randint(1, 7, ()))
        sequences = [Sequence(c, tokens, s, s) for c, s in zip(contexts, slots, strict=True)]
        sequences.insert(step % 3, Sequence(3, tokens, 2, -1))
        projections = layer.projections(3 * tokens)
        out = decode(layer, projections, sequences)
        for sequence, rows in zip(sequences, range(0, 3 * tokens, tokens), strict=True):
            mine = [x[rows : rows + tokens] for x in projections]
            if sequence.write < 0:
                assert not out[rows : rows + tokens].any()
                continue
            at = slots.index(sequence.write)
            expected, states = mixers[at].run(*mine)
            backend.assert_close(out[rows : rows + tokens], expected)
            accepted = int(torch.randint(1, tokens + 1, ()))
            mixers[at].accept(mine[0], states, accepted)
            contexts[at] += accepted
    for slot, context, mixer in zip(slots, contexts, mixers, strict=True):
        backend.assert_state_close(layer.fold(slot, context), mixer.state, tolerance=5e-3)


@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_every_split_of_a_head_gives_the_same_bits(emulator, ratio, tokens):
    backend = make_backend("emulated")
    layer = Layer(backend, published(ratio), slots=3, ring_rows=8, window=7)
    layer.prepare(1, 30, pending=4)
    projections, before = layer.projections(2 * tokens), layer.arena.clone()
    results = []
    for multiprocessors in (1, 4, 8, 16):  # two sequences: split 1, 2, 4, 8
        emulator.emulator_multiprocessors(multiprocessors)
        layer.arena.copy_(before)
        out = decode(layer, projections, [Sequence(30, tokens, 1, 1), Sequence(30, tokens, 1, 2)])
        results.append((out, layer.arena.clone()))
    for out, arena in results[1:]:
        assert same_bits(out, results[0][0])
        assert same_bits(arena, results[0][1])


@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_no_order_of_threads_changes_a_bit(emulator, multiprocessors):
    backend = make_backend("emulated")
    layer = Layer(backend, published(2), slots=4, ring_rows=3, window=5)
    layer.prepare(1, 30, pending=2)
    layer.prepare(2, 3, pending=0)
    projections, before = layer.projections(9), layer.arena.clone()
    emulator.emulator_multiprocessors(multiprocessors)
    results = []
    for seed in range(6):
        emulator.emulator_seed(seed)
        layer.arena.copy_(before)
        sequences = [Sequence(30, 3, 1, 1), Sequence(0, 3, 0, 0), Sequence(3, 3, 2, 3)]
        results.append((decode(layer, projections, sequences), layer.arena.clone()))
    for out, arena in results[1:]:
        assert same_bits(out, results[0][0])
        assert same_bits(arena, results[0][1])


def test_a_step_that_starts_early_waits_for_the_step_before(emulator):
    """Queued launches: the second step runs up to its wait before the first one starts."""
    backend = make_backend("emulated")
    layer = Layer(backend, published(2), slots=2, ring_rows=2, window=5)
    layer.prepare(1, 9, pending=1)
    steps, before = [layer.projections(1) for _ in range(4)], layer.arena.clone()

    alive: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        return [decode(layer, step, [Sequence(9 + i, 1, 1, 1)], alive) for i, step in enumerate(steps)]

    expected, state = run(), layer.arena.clone()
    for seed in range(4):
        layer.arena.copy_(before)
        outs = queued(emulator, seed, run)
        assert all(same_bits(a, b) for a, b in zip(outs, expected, strict=True))
        assert same_bits(layer.arena, state)


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("tokens", [1, 4])
def test_with_settled_records_a_step_waits_for_its_projection_alone(emulator, multiprocessors, tokens):
    """Queued launches: the step has read its records before the projection has begun, and padding stays zero."""
    backend = make_backend("emulated")
    layer = Layer(backend, published(2), slots=3, ring_rows=8, window=7)
    layer.prepare(1, 30, pending=5)
    emulator.emulator_multiprocessors(multiprocessors)
    widths = [part.shape[1] for part in layer.projections(1)]
    weight, x = backend.randn(-(-sum(widths) // 8) * 8, 64) / 8, backend.randn(2 * tokens, 64)
    before, alive = layer.arena.clone(), []

    def run(settled: bool) -> list[torch.Tensor]:
        fused = backend.op("linear")(x, weight)
        projections = fused.split([*widths, fused.shape[1] - sum(widths)], dim=1)[:4]
        sequences = [Sequence(30, tokens, 1, 2), Sequence(4, tokens, 0, -1)]
        alive.append(fused)
        return [decode(layer, projections, sequences, alive, settled), layer.arena]

    expected = [tensor.clone() for tensor in run(False)]
    assert expected[0][:tokens].any() and not expected[0][tokens:].any()
    for seed in range(4):
        layer.arena.copy_(before)
        found = queued(emulator, seed, lambda: run(True))
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_an_fp32_norm_weight_is_read_as_it_is(backend):
    layer = Layer(backend, published(1), slots=1)
    layer.norm_weight = layer.norm_weight.float() + 1e-3
    projections = layer.projections(2)
    mixer = mixer_of(layer, Sequence(0, 2, 0, 0))
    backend.assert_close(decode(layer, projections, [Sequence(0, 2, 0, 0)]), mixer.run(*projections)[0])


def test_more_drafts_than_the_kernel_takes_go_to_torch_and_the_ring_carries_over(backend):
    layer = Layer(backend, published(2), slots=1, ring_rows=8, window=11)
    mixer = mixer_of(layer, Sequence(5, 1, 0, 0))
    context = 5
    for tokens, accepted in ((1, 1), (2, 2), (9, 3), (1, 1), (4, 2)):
        projections = layer.projections(tokens)
        expected, states = mixer.run(*projections)
        backend.assert_close(decode(layer, projections, [Sequence(context, tokens, 0, 0)]), expected)
        mixer.accept(projections[0], states, accepted)
        context += accepted


def test_the_kernel_serves_every_published_layout(backend):
    """A call that went to torch would have folded its first token."""
    for nk, nv in ((16, 16), (16, 32), (16, 48), (16, 64)) if backend.device == "cuda" else ((4, 4), (4, 12), (1, 4)):
        layer = Layer(backend, type(published(1))(nk, nv), slots=1, ring_rows=8)
        layer.prepare(0, 12, pending=0)
        decode(layer, layer.projections(1), [Sequence(12, 1, 0, 0)])
        assert layer.cursor[0].tolist() == [12] * nv


def test_decays_of_nearly_one_and_nearly_zero_keep_their_precision(backend):
    for a_log, dt_bias in ((-9.0, -4.0), (3.0, 2.0)):
        layer = Layer(backend, published(1), slots=1, ring_rows=8)
        layer.a_log.fill_(a_log)
        layer.dt_bias.fill_(dt_bias)
        mixer = mixer_of(layer, Sequence(40, 1, 0, 0, 5))
        projections = layer.projections(4)
        expected, states = mixer.run(*projections)
        backend.assert_close(decode(layer, projections, [Sequence(40, 4, 0, 0)]), expected)
        assert relative_error(layer.fold(0, 44), reference.exact(states[4])) < 5e-3
