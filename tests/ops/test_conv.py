"""Claims about `causal_conv1d`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import reference
from .backends import bounded, same_bits
from .gdn import Heads, Layer, Sequence, columns, odd, published, snapshot_rows


def conv(layer, x, sequences, snapshots=()):
    starts, contexts, reads, writes = columns(layer.backend, sequences)
    rows = snapshot_rows(layer.backend, list(snapshots))
    return layer.backend.op("causal_conv1d")(x, layer.conv_weight, layer.window, starts, contexts, reads, writes, rows)


def last_inputs(layer, slot, end):
    """What the ring of `slot` holds of the W tokens before `end`, oldest first."""
    entries = layer.window.shape[1]
    return layer.window[slot, [token % entries for token in range(max(0, end - entries), end)]].clone()


def check(layer, sequences, snapshots=()):
    """Run a batch and hold it to explicit windows; stored inputs are copies, so they agree in every bit."""
    backend, entries = layer.backend, layer.window.shape[1]
    for s in sequences:
        if s.read >= 0:
            layer.prepare(s.read, s.context)
    old = [last_inputs(layer, s.read, s.context) for s in sequences]
    histories = [layer.history(s.read, s.context) for s in sequences]
    x = layer.projections(sum(s.length for s in sequences))[0]
    before = layer.arena.clone()
    out = conv(layer, x, sequences, snapshots)

    start, inputs = 0, []
    expected = torch.zeros(out.shape, dtype=torch.float64)
    for sequence, history, known in zip(sequences, histories, old, strict=True):
        rows = slice(start, start := start + sequence.length)
        expected[rows] = reference.causal_conv(x[rows], layer.conv_weight, history)
        inputs.append(torch.cat([known, x[rows]]))
    backend.assert_close(out, expected)
    stored = {s.write: (inputs[i], s.context + s.length) for i, s in enumerate(sequences)}
    for i, count, slot in snapshots:
        beyond = sequences[i].context + sequences[i].length - count
        stored[slot] = (inputs[i][: len(inputs[i]) - beyond], count)
    written = {slot for slot in stored if slot >= 0}
    for slot in written:
        tokens, end = stored[slot]
        assert same_bits(last_inputs(layer, slot, end), tokens[-min(entries, end) :] if end else tokens)
    assert layer.untouched(before, written, ("window",))
    return out


def layouts(backend):
    yield published(1), 4
    if not backend.kernels:
        yield odd(2), 3
        yield Heads(1, 1, dk=6, dv=5, taps=2), 7


def test_ragged_batch_equals_explicit_windows(backend):
    for heads, window in layouts(backend):
        check(
            Layer(backend, heads, slots=9, window=window),
            [
                Sequence(0, 3, 7, 7),
                Sequence(70, 0, 4, 1),
                Sequence(5, 65, 0, 8),
                Sequence(64, 1, 2, 2),
                Sequence(0, 0, 5, 5),
            ],
        )


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 63, 64, 65, 130])
@pytest.mark.parametrize("context", [0, 1, 2, 3, 66])
def test_every_length_and_how_much_of_the_window_exists(backend, tokens, context):
    check(Layer(backend, published(1), slots=2, window=6), [Sequence(context, tokens, 1, 1)])


def test_negative_slots_store_nothing(backend):
    layer = Layer(backend, published(1), slots=3)
    check(layer, [Sequence(0, 4, -1, -1), Sequence(9, 12, 2, -1)], snapshots=[(0, 2, -1), (1, 15, 0), (1, 21, -1)])


def test_no_sequences_and_no_tokens(backend):
    check(Layer(backend, published(1), slots=1), [])
    check(Layer(backend, published(1), slots=3), [Sequence(8, 0, 0, 2), Sequence(0, 0, 1, 1)])


def test_copy_on_write_leaves_the_read_slot_and_forks_share_it(backend):
    layer = Layer(backend, published(1), slots=4)
    layer.prepare(2, 40)
    x, history = layer.projections(7)[0], layer.history(2, 40)
    before = layer.arena.clone()
    out = conv(layer, x, [Sequence(40, 5, 2, 3), Sequence(40, 2, 2, 0)])
    assert same_bits(layer.arena[2], before[2])
    for rows, slot, end in ((slice(0, 5), 3, 45), (slice(5, 7), 0, 42)):
        layer.backend.assert_close(out[rows], reference.causal_conv(x[rows], layer.conv_weight, history))
        assert same_bits(last_inputs(layer, slot, end)[-2:], x[rows][-2:])


@bounded
@given(seed=st.integers(0, 2**32 - 1), context=st.integers(0, 10), split=st.integers(0, 20))
def test_a_prefill_split_at_any_token_equals_the_whole(backend, seed, context, split):
    torch.manual_seed(seed)
    layer = Layer(backend, published(1), slots=3)
    layer.prepare(0, context)
    x = layer.projections(20)[0]
    whole = conv(layer, x, [Sequence(context, 20, 0, 1)])
    first = conv(layer, x[:split], [Sequence(context, split, 0, 2)])
    second = conv(layer, x[split:], [Sequence(context + split, 20 - split, 2, 2)])
    assert same_bits(torch.cat([first, second]), whole)
    assert same_bits(last_inputs(layer, 2, context + 20), last_inputs(layer, 1, context + 20))


@bounded
@given(st.data())
def test_any_batch_with_any_snapshots(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads, window = data.draw(st.sampled_from(list(layouts(backend))), "layout")
    slots = data.draw(st.permutations(range(12)), "slots")
    sequences, snapshots = [], []
    for index in range(data.draw(st.integers(1, 3), "batch")):
        context, length = data.draw(st.integers(0, 9), "context"), data.draw(st.integers(0, 20), "length")
        read, write = slots.pop(), slots.pop()
        sequences.append(Sequence(context, length, read, read if data.draw(st.booleans()) else write))
        if length:
            counts = data.draw(st.lists(st.integers(context + 1, context + length), max_size=2), "snapshots")
            snapshots += [(index, count, slots.pop()) for count in counts]
    layer = Layer(backend, heads, slots=12, window=window)
    plain = check(layer, sequences, data.draw(st.permutations(snapshots)))
    assert plain.shape[1] == heads.channels
