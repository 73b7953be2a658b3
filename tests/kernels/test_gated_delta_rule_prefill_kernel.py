"""Claims about the prefill kernel of the delta rule beyond its operator's contract: pipeline, heads, ranges, length."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from tests.kernels.launches import emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import relative_error, same_bits
from tests.ops.gdn import Heads, Layer, Sequence, columns, published, snapshot_rows
from tests.ops.test_gdn_prefill import check, inputs, prefill

pytest_plugins = ["tests.kernels.schedules"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


@pytest.fixture
def card(backend):
    if backend.emulated is not None:
        pytest.skip("too long for the emulated device")
    return backend


@contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """The emulated device with so many of them; a card has its own."""
    emulator().emulator_multiprocessors(count)
    try:
        yield
    finally:
        emulator().emulator_multiprocessors(4)


@pytest.mark.parametrize(("context", "tokens"), [(0, 1), (60, 129), (5, 330), (5, 700)])
def test_more_chunks_than_stages_under_any_schedule(scheduled, context, tokens):
    """330 tokens after 5 are six chunks: every stage is filled twice. 700 are twelve: blocks that prepare take two."""
    snapshots = [(0, context + tokens, 2), (0, context + (tokens + 1) // 2, 0)]
    check(Layer(scheduled, published(1), slots=3), [Sequence(context, tokens, 1, 1, min(context, 2))], snapshots)


@pytest.mark.parametrize("sequences", [16, 40])
def test_a_batch_of_several_windows(backend, sequences):
    """From sixteen sequences on a window has eight chunks of each: 900 tokens take two, and carry their state."""
    layer = Layer(backend, published(1), slots=sequences + 2)
    lengths = [900 if i in (3, 9) else i % 7 for i in range(sequences)]
    batch = [Sequence(70 if i == 9 else 0, length, i, i) for i, length in enumerate(lengths)]
    before = sum(lengths[:9])
    assert before % 64, "the second long sequence begins within a tile of rows"
    check(layer, batch, snapshots=[(3, 512, sequences), (9, 70 + 700, sequences + 1)])


@pytest.mark.parametrize("seed", range(3))
def test_the_kernels_of_windows_wait_for_each_other(backend, seed):
    """Queued, each may run up to its wait before the one before it has begun."""
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    batch = [Sequence(0, 700 if i == 7 else 2, i, i) for i in range(16)]
    results = []
    for early in (False, True):
        torch.manual_seed(11)
        layer = Layer(backend, published(1), slots=16)
        data = inputs(layer, sum(s.length for s in batch))
        arrays = *columns(backend, batch), snapshot_rows(backend, [])
        records = (layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor)
        call = partial(backend.op("gated_delta_rule_prefill"), *data, *records, *arrays, 700)
        results.append((queued(emulator(), seed, call) if early else call(), layer.state))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("count", "tokens", "seed"),
    [(count, 1000, seed) for count in (2, 6, 12) for seed in range(6)] + [(12, 1700, seed) for seed in range(2)],
)
def test_the_scan_takes_chunks_while_others_are_prepared(backend, count, tokens, seed):
    """Two multiprocessors leave the scan none of its own, six some after a round of units, twelve from the start: then
    the preparation of 27 chunks waits for the scan."""
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    results, device = [], emulator()
    for early in (False, True):
        torch.manual_seed(11)
        layer = Layer(backend, published(1), slots=4)
        layer.prepare(1, 30, pending=2)
        data = inputs(layer, tokens)
        arrays = *columns(backend, [Sequence(30, tokens, 1, 2)]), snapshot_rows(backend, [(0, 700, 3)])
        records = (layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor)
        call = partial(backend.op("gated_delta_rule_prefill"), *data, *records, *arrays, tokens)
        with multiprocessors(count if early else 4):
            out = queued(device, seed, call) if early else call()
        results.append((out, layer.state[2:].clone()))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


# None to five chunks, of any context; in place, to another slot and to none; updates that wait in a ring.
RAGGED = [
    Sequence(0, 0, 0, 0),
    Sequence(64, 128, 1, 1),
    Sequence(30, 300, 2, 3, 2),
    Sequence(13, 0, 4, 4, 2),
    Sequence(0, 0, 5, -1),
    Sequence(9, 0, 6, 7),
    Sequence(63, 1, 8, 8, 3),
    Sequence(0, 70, -1, 9),
    Sequence(100, 64, 10, -1),
    Sequence(1, 3, 11, 11, 1),
]
SNAPSHOTS = [(1, 128, 12), (1, 192, 13), (2, 31, 14), (2, 256, 15), (6, 64, 16), (8, 130, -1), (8, 101, 17)]


@pytest.mark.parametrize("count", [2, 6, 16])
def test_clusters_take_sequences_and_heads_in_turn(scheduled, count):
    """Ten sequences of two heads on one, three or eight clusters. A card has room for all of these at once."""
    with multiprocessors(count):
        check(Layer(scheduled, published(2), slots=18), RAGGED, SNAPSHOTS)
        assert scheduled.emulated is None or emulator().emulator_clusters() == count // 2


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_that_takes_several_gives_the_bits_of_clusters_that_take_one(backend, seed):
    if backend.emulated is None:
        pytest.skip("a card has its own number of clusters")
    results = []
    for count in (4, 64):
        torch.manual_seed(11)
        layer = Layer(backend, published(2), slots=18)
        for sequence in RAGGED:
            layer.prepare(sequence.read, sequence.context, sequence.pending)
        data = inputs(layer, sum(s.length for s in RAGGED))
        arrays = *columns(backend, RAGGED), snapshot_rows(backend, SNAPSHOTS)
        records = (layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor)
        call = partial(backend.op("gated_delta_rule_prefill"), *data, *records, *arrays, 300)
        with multiprocessors(count):
            out = queued(emulator(), seed, call)
        results.append((out, layer.arena))
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("sequences", [5, 6, 7, 9])
def test_every_pair_is_in_one_range(backend, sequences):
    """Costs that four clusters do not divide: a range ends within a pair. Pairs without tokens cost the least."""
    with multiprocessors(8):
        batch = [Sequence(20 + i, 0, i, sequences + i) for i in range(sequences)]
        check(Layer(backend, published(1), slots=2 * sequences), batch)


def test_an_empty_cluster_among_those_that_take_turns(backend):
    """One sequence costs more than all others: ranges of the same cost hold no pair's beginning."""
    with multiprocessors(8):
        check(
            Layer(backend, published(1), slots=6),
            [Sequence(7, 900, 0, 0), *(Sequence(3, 0, i, i) for i in range(1, 6))],
        )
        assert backend.emulated is None or emulator().emulator_clusters() == 4


@pytest.mark.parametrize("heads", [Heads(1, 1), Heads(2, 4), Heads(1, 3), Heads(2, 8), Heads(1, 8)])
def test_each_value_head_takes_its_key_head(backend, heads):
    layer = Layer(backend, heads, slots=2)
    results = []
    qkv, a, b = inputs(layer, 20)
    layer.prepare(0, 60, pending=2)
    before = layer.fold(0, 60)
    served = torch_served(lambda: results.append(prefill(layer, qkv, a, b, [Sequence(60, 20, 0, 1)])))
    assert served == []
    expected, states = reference.delta_rule(qkv, a, b, layer.a_log, layer.dt_bias, before)
    backend.assert_close(results[0], expected)
    backend.assert_state_close(layer.state[1], states[-1])


def test_more_value_heads_to_a_key_head_than_the_kernel_takes(backend):
    check(Layer(backend, Heads(1, 9), slots=1), [Sequence(0, 3, 0, 0)])


def test_sequences_of_a_batch_do_not_see_each_other(backend):
    """Tiles reach over the ends of a sequence, into neighbours that may hold anything."""
    layer = Layer(backend, published(2), slots=4)
    sequences = [Sequence(0, 10, 0, 0), Sequence(70, 30, 1, 1), Sequence(3, 15, 2, 2)]
    for sequence in sequences:
        layer.prepare(sequence.read, sequence.context)
    qkv, a, b = inputs(layer, 55)
    alone = [x.clone() for x in (qkv, a, b)]
    state = layer.state[1].clone()
    batch = prefill(layer, qkv, a, b, sequences)
    after = layer.state[1].clone()
    layer.state[1], layer.cursor[1] = state, 70
    for x in alone:
        x[:10], x[40:] = float("nan"), float("inf")
    others = [Sequence(0, 10, 3, -1), Sequence(70, 30, 1, 1), Sequence(0, 15, 3, -1)]
    assert same_bits(prefill(layer, *alone, others)[10:40], batch[10:40])
    assert same_bits(layer.state[1], after)


@pytest.mark.parametrize("scale", [2.0**-14, 2.0**-8, 2.0**6, 2.0**40])
def test_keys_and_queries_of_any_magnitude(backend, scale):
    layer = Layer(backend, published(1), slots=2)
    qkv, a, b = inputs(layer, 70)
    qkv[:, :256] *= scale
    qkv[::3, :256] *= 2.0**-6
    check(layer, [Sequence(0, 70, 1, 1)], snapshots=[(0, 33, 0)], data=(qkv, a, b))


@pytest.mark.parametrize("scale", [2.0**-6, 2.0**6])
def test_values_of_any_usual_magnitude(backend, scale):
    layer = Layer(backend, published(1), slots=2)
    qkv, a, b = inputs(layer, 70)
    qkv[:, 256:] *= scale
    check(layer, [Sequence(0, 70, 1, 1)], snapshots=[(0, 33, 0)], data=(qkv, a, b))


def test_snapshots_in_one_chunk_at_its_borders_and_twice(scheduled):
    layer = Layer(scheduled, published(1), slots=9)
    counts = [61, 64, 65, 100, 100, 128, 129]
    snapshots = [(0, count, slot) for slot, count in enumerate(counts, start=2)]
    check(layer, [Sequence(60, 69, 0, 1, 1)], snapshots)


def test_a_ring_of_any_row_width_is_folded(backend):
    """An odd number of value heads leaves ring rows unaligned."""
    check(Layer(backend, Heads(1, 3), slots=2, ring_rows=8), [Sequence(13, 3, 1, 1, 8)])


# A schedule that shows what others do not: that the blocks of the inverse wait for each other, and that no cursor is
# written before both halves of a head have read it.
@pytest.mark.parametrize("seed", [7])
@pytest.mark.parametrize("sequence", [Sequence(30, 100, 1, 1, 2), Sequence(13, 0, 1, 1, 2)])
def test_every_schedule_gives_the_same_bits(backend, sequence, seed):
    if backend.emulated is None:
        pytest.skip("a card takes no seed")
    results, device = [], emulator()
    for order in (0, seed):
        torch.manual_seed(11)
        layer = Layer(backend, published(1), slots=3)
        layer.prepare(1, sequence.context, sequence.pending)
        device.emulator_seed(order)
        out = prefill(layer, *inputs(layer, sequence.length + 4), [sequence, Sequence(0, 4, 2, 2)])
        results.append((out, layer.state[1:].clone()))
    device.emulator_seed(0)
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


def chunked_reference(qkv, a, b, layer, state):
    """The chunked form in double precision: the recurrence's result in a time that long sequences allow."""
    nv, dv, dk = state.shape
    keys = (qkv.shape[1] - nv * dv) // 2
    q, k, v = reference.exact(qkv).split([keys, keys, nv * dv], 1)
    q, k = (
        reference.unit(x.unflatten(1, (-1, dk))).repeat_interleave(nv * dk // keys, 1).transpose(0, 1) for x in (q, k)
    )
    v = v.unflatten(1, (nv, dv)).transpose(0, 1)
    g, beta = reference.log_decay(a, layer.a_log, layer.dt_bias).T, reference.sigmoid(b).T
    state, outputs = reference.exact(state), []
    for start in range(0, len(qkv), 64):
        rows = slice(start, start + 64)
        total = g[:, rows].cumsum(1)
        decay = (total[:, :, None] - total[:, None]).exp().tril()
        of_beta, keys_of, queries = beta[:, rows, None], k[:, rows], q[:, rows]
        lower = of_beta * (keys_of @ keys_of.mT) * decay
        carried = total.exp()[..., None]
        right = of_beta * (v[:, rows] - carried * (keys_of @ state.mT))
        update = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
        outputs.append(carried * (queries @ state.mT) + (queries @ keys_of.mT * decay) @ update)
        to_end = (total[:, -1:] - total).exp()[..., None]
        state = carried[:, -1:] * state + update.mT @ (keys_of * to_end)
    return torch.cat(outputs, 1).transpose(0, 1) / dk**0.5, state


def test_the_chunked_reference_is_the_recurrence(backend):
    layer = Layer(backend, published(2), slots=1)
    state = layer.prepare(0, 64)
    data = inputs(layer, 140)
    expected, states = reference.delta_rule(*data, layer.a_log, layer.dt_bias, state)
    out, after = chunked_reference(*data, layer, state)
    assert relative_error(out, expected) < 1e-10
    assert relative_error(after, states[-1]) < 1e-10


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_long_sequences_stay_close_to_double_precision(card, tokens, slow):
    layer = Layer(card, Heads(2, 4), slots=3)
    if slow:  # almost nothing is forgotten
        layer.a_log.fill_(-6.0)
    state = layer.prepare(0, 64)
    data = inputs(layer, tokens)
    out = prefill(layer, *data, [Sequence(64, tokens, 0, 1)], [(0, 64 + tokens - 30, 2)])
    expected, after = chunked_reference(*data, layer, state)
    card.assert_close(out, expected)
    card.assert_state_close(layer.state[1], after, tolerance=2e-3)
    _, snapshot = chunked_reference(*(x[: tokens - 30] for x in data), layer, state)
    card.assert_state_close(layer.state[2], snapshot, tolerance=2e-3)


@pytest.mark.parametrize("count", [4, 40])
def test_a_thousand_calls_give_the_same_bits(card, count):
    """Four sequences of two heads have a cluster a head, forty are more than fit: clusters take turns."""
    layer = Layer(card, published(2), slots=2 * count + 1)
    sequences = [Sequence(64 * i + 7 * i, (150 + 31 * i) % 400, i, count + i) for i in range(count)]
    for sequence in sequences:
        layer.prepare(sequence.read, sequence.context)
    data = inputs(layer, sum(s.length for s in sequences))
    first = None
    for _ in range(1000):
        layer.state[count:] = float("nan")
        out = prefill(layer, *data, sequences, [(3, 300, 2 * count)])
        now = torch.cat([out.float().flatten(), layer.state[count:].flatten()])
        first = now if first is None else first
        assert same_bits(now, first)


def test_a_batch_of_more_blocks_than_the_card_holds(card):
    layer = Layer(card, Heads(2, 4), slots=40)
    check(layer, [Sequence(13 * i, 47 * i % 331, i, i, i % 3) for i in range(40)])
