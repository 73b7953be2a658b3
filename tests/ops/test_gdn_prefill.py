"""Claims about `gated_delta_rule_prefill`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import reference
from .backends import bounded, same_bits
from .gdn import Layer, Sequence, columns, every_head_layout, odd, published, snapshot_rows

WRITES = ("state", "cursor")


def prefill(layer, qkv, a, b, sequences, snapshots=(), spare=0):
    longest = max((s.length for s in sequences), default=0) + spare
    starts, contexts, reads, writes = columns(layer.backend, sequences)
    rows = snapshot_rows(layer.backend, list(snapshots))
    arrays = (layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor, starts, contexts, reads, writes, rows)
    return layer.backend.op("gated_delta_rule_prefill")(qkv, a, b, *arrays, longest)


def inputs(layer, tokens):
    qkv, _, a, b = layer.projections(tokens)
    return qkv.contiguous(), a, b


def check(layer, sequences, snapshots=(), spare=0, data=None, state_tolerance=1e-3):
    """Run a batch and hold it to the recurrence; everything that the contract does not name stays bit-identical."""
    backend = layer.backend
    initial = [layer.prepare(s.read, s.context, s.pending) for s in sequences]
    qkv, a, b = data or inputs(layer, sum(s.length for s in sequences))
    before = layer.arena.clone()
    out = prefill(layer, qkv, a, b, sequences, snapshots, spare)

    start, states = 0, []
    expected = torch.zeros(out.shape, dtype=torch.float64)
    for sequence, state in zip(sequences, initial, strict=True):
        rows = slice(start, start := start + sequence.length)
        expected[rows], after = reference.delta_rule(qkv[rows], a[rows], b[rows], layer.a_log, layer.dt_bias, state)
        states.append(after)
    backend.assert_close(out[:start], expected[:start])  # rows behind the last sequence are nobody's
    stored = {s.write: (states[i][-1], s.context + s.length) for i, s in enumerate(sequences)}
    stored |= {slot: (states[i][count - sequences[i].context], count) for i, count, slot in snapshots}
    written = {slot for slot in stored if slot >= 0}
    for slot in written:
        state, count = stored[slot]
        backend.assert_state_close(layer.state[slot], state, state_tolerance)
        assert layer.cursor[slot].tolist() == [count] * layer.heads.nv
    assert layer.untouched(before, written, WRITES)
    return out


@pytest.mark.parametrize("sequences", [[Sequence(0, 64, 1, 1)], [Sequence(64, 128, 1, 2)], [Sequence(0, 64, 0, 0)] * 2])
def test_whole_chunks_alone_are_a_batch_like_any_other(backend, sequences):
    layer = Layer(backend, published(2), slots=4)
    sequences = [s._replace(read=s.read + i, write=s.write + i) for i, s in enumerate(sequences)]
    assert check(layer, sequences).is_contiguous()


@pytest.mark.parametrize("nv_per_nk", [1, 2, 3, 4])
def test_ragged_batch_equals_the_recurrence(backend, nv_per_nk):
    for heads in every_head_layout(backend, nv_per_nk):
        check(
            Layer(backend, heads, slots=9),
            [Sequence(0, 3, 7, 7), Sequence(70, 0, 4, 1), Sequence(5, 65, 0, 8), Sequence(64, 1, 2, 2)],
        )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("context", [0, 37, 64])
def test_every_length_around_a_chunk(backend, tokens, context):
    check(Layer(backend, published(2), slots=2), [Sequence(context, tokens, 1, 1)])


def test_a_sequence_that_starts_ignores_garbage_in_its_read_slot(backend):
    layer = Layer(backend, published(1), slots=3)
    for garbage in (-1, 0, 1 << 30):
        layer.cursor[1] = garbage
        check(layer, [Sequence(0, 5, 1, 2)])
    layer.prepare(1, 50, pending=2)  # what an earlier sequence left there
    check(layer, [Sequence(0, 5, 1, 1)])


def test_copy_on_write_leaves_the_read_slot_and_forks_share_it(backend):
    layer = Layer(backend, published(1), slots=4)
    initial = layer.prepare(2, 40, pending=2)
    qkv, a, b = inputs(layer, 8)
    before = layer.arena.clone()
    out = prefill(layer, qkv, a, b, [Sequence(40, 5, 2, 3), Sequence(40, 3, 2, 0)])
    assert same_bits(layer.arena[2], before[2])
    for rows, slot in ((slice(0, 5), 3), (slice(5, 8), 0)):
        expected, states = reference.delta_rule(qkv[rows], a[rows], b[rows], layer.a_log, layer.dt_bias, initial)
        backend.assert_close(out[rows], expected)
        backend.assert_state_close(layer.state[slot], states[-1])


def test_negative_slots_store_nothing(backend):
    layer = Layer(backend, published(1), slots=3)
    check(layer, [Sequence(0, 4, -1, -1), Sequence(9, 66, 2, -1)], snapshots=[(0, 2, -1), (1, 30, 0), (1, 75, -1)])


def test_an_empty_sequence_copies_its_state(backend):
    check(Layer(backend, published(1), slots=4), [Sequence(33, 0, 3, 0, pending=2), Sequence(0, 0, 1, 2)])


def test_no_sequences_and_no_tokens(backend):
    assert check(Layer(backend, published(1), slots=2), []).shape == (0, 1, 128)


@pytest.mark.parametrize("sequences", [[], [Sequence(0, 0, 1, 2)], [Sequence(33, 7, 1, 0)]])
def test_rows_behind_the_last_sequence_are_nobodys(backend, sequences):
    layer = Layer(backend, published(1), slots=3)
    check(layer, sequences, data=inputs(layer, 3 + sum(s.length for s in sequences)))


def test_more_room_than_the_longest_sequence_needs(backend):
    check(Layer(backend, published(1), slots=2), [Sequence(60, 9, 1, 1)], snapshots=[(0, 65, 0)], spare=100)


@pytest.mark.parametrize("pending", [1, 2, 5])
def test_updates_that_wait_in_the_ring_are_folded(backend, pending):
    check(Layer(backend, published(2), slots=2, ring_rows=5), [Sequence(13, 20, 1, 0, pending)], snapshots=[(0, 14, 1)])


@bounded
@given(st.data())
def test_any_batch_with_any_snapshots(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads = data.draw(st.sampled_from(every_head_layout(backend, data.draw(st.integers(1, 3)))), "heads")
    slots = data.draw(st.permutations(range(12)), "slots")
    sequences, snapshots = [], []
    for index in range(data.draw(st.integers(1, 3), "batch")):
        context = data.draw(st.one_of(st.just(0), st.integers(1, 140)), "context")
        length = data.draw(st.integers(0, 40 if backend.kernels else 130), "length")
        read, write = slots.pop(), slots.pop()
        pending = data.draw(st.integers(0, min(3, context)), "pending")
        sequences.append(Sequence(context, length, read, read if data.draw(st.booleans()) else write, pending))
        if length:
            counts = data.draw(st.lists(st.integers(context + 1, context + length), max_size=2), "snapshots")
            snapshots += [(index, count, slots.pop()) for count in counts]
    check(Layer(backend, heads, slots=12), sequences, data.draw(st.permutations(snapshots)))


@bounded
@given(seed=st.integers(0, 2**32 - 1), split=st.one_of(st.sampled_from([28, 92]), st.integers(0, 130)))
def test_a_prefill_split_at_any_token_equals_the_whole(backend, seed, split):
    torch.manual_seed(seed)
    layer = Layer(backend, published(2), slots=3)
    layer.prepare(0, 36)
    qkv, a, b = inputs(layer, 130)
    whole = prefill(layer, qkv, a, b, [Sequence(36, 130, 0, 1)])
    parts = [
        prefill(layer, qkv[:split], a[:split], b[:split], [Sequence(36, split, 0, 2)]),
        prefill(layer, qkv[split:], a[split:], b[split:], [Sequence(36 + split, 130 - split, 2, 2)]),
    ]
    if (36 + split) % 64 == 0:  # the chunks begin at the same tokens
        assert same_bits(torch.cat(parts), whole)
        assert same_bits(layer.state[2], layer.state[1])
    else:
        backend.assert_close(torch.cat(parts), whole)
        backend.assert_state_close(layer.state[2], layer.state[1], tolerance=2e-3)
    assert torch.equal(layer.cursor[2], layer.cursor[1])


@bounded
@given(seed=st.integers(0, 2**32 - 1), context=st.integers(0, 100), data=st.data())
def test_a_snapshot_equals_a_run_that_stopped_there(backend, seed, context, data):
    torch.manual_seed(seed)
    layer = Layer(backend, published(1), slots=5)
    layer.prepare(0, context)
    qkv, a, b = inputs(layer, 100)
    counts = data.draw(st.lists(st.integers(1, 100), min_size=2, max_size=2))
    snapshots = [(0, context + count, slot) for slot, count in zip((3, 4), counts, strict=True)]
    plain = prefill(layer, qkv, a, b, [Sequence(context, 100, 0, 1)])
    state = layer.state[1].clone()
    assert same_bits(prefill(layer, qkv, a, b, [Sequence(context, 100, 0, 1)], snapshots), plain)
    assert same_bits(layer.state[1], state)
    for slot, count in zip((3, 4), counts, strict=True):
        prefill(layer, qkv[:count], a[:count], b[:count], [Sequence(context, count, 0, 2)])
        backend.assert_state_close(layer.state[slot], layer.state[2])
        assert torch.equal(layer.cursor[slot], layer.cursor[2])


def test_strong_decays_neither_overflow_nor_vanish(backend):
    layer = Layer(backend, published(2), slots=3)
    layer.decay_fast()
    check(layer, [Sequence(3, 130, 0, 0)], snapshots=[(0, 100, 2)])
    assert reference.log_decay(torch.zeros(1), layer.a_log[:1], layer.dt_bias[:1]).item() * 64 < -1000


def test_decays_that_change_abruptly(backend):
    layer = Layer(backend, published(1), slots=2)
    qkv, a, b = inputs(layer, 130)
    a[:] = -30  # no decay at all, but for single tokens that forget everything
    a[[20, 64, 100]] = 300
    check(layer, [Sequence(7, 130, 1, 1)], snapshots=[(0, 72, 0)], data=(qkv, a, b))


def test_correlated_keys_written_at_full_strength(backend):
    layer = Layer(backend, published(1), slots=2)
    qkv, a, b = inputs(layer, 130)
    keys = qkv[:, 128:256]
    keys[:] = keys[:1] + 0.05 * keys
    a[:], b[:] = -10, 6
    # The state is what the keys differ by, a twentieth of them: fp16 operands lose so much more of it.
    check(layer, [Sequence(0, 130, 1, 1)], snapshots=[(0, 90, 0)], data=(qkv, a, b), state_tolerance=4e-3)


def test_zero_keys_and_values_change_only_by_decay(fp32):
    layer = Layer(fp32, odd(1), slots=1)
    qkv, a, b = inputs(layer, 70)
    check(layer, [Sequence(5, 70, 0, 0)], data=(torch.zeros_like(qkv), a, b))


@pytest.mark.parametrize("size", [6e4, 1e6, 1e30])
def test_values_beyond_fp16_leave_no_nan_in_a_slot(backend, size):
    """A kernel that multiplies in fp16 saturates: a slot is shared through the prefix cache, so a NaN would spread."""
    layer = Layer(backend, published(1), slots=3)
    layer.prepare(1, 64)
    qkv, a, b = inputs(layer, 200)
    qkv[:, 256:] = (qkv[:, 256:].sign() * size).to(qkv.dtype)
    layer.state[1] = layer.state[1].sign() * min(size, 1e30)
    out = prefill(layer, qkv, a, b, [Sequence(64, 200, 1, 1)], [(0, 170, 2)])
    assert out.isfinite().all()
    assert layer.state[1].isfinite().all() and layer.state[2].isfinite().all()
