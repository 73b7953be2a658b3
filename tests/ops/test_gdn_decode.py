"""Claims about `gated_delta_rule_decode`: one step of the whole mixer, verification and commit included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from . import reference
from .backends import bounded, same_bits
from .gdn import Layer, Mixer, Sequence, columns, cu_seqlens, every_head_layout, odd, published, snapshot_rows

EPS = 1e-6
WRITES = ("state", "ring", "cursor", "window")
ROUNDED = 5e-3  # a bf16 state also carries the rounding of k and v, 2^-9 each, where a kernel keeps them exact


def decode(layer, qkv, z, a, b, sequences):
    _, contexts, reads, writes = columns(layer.backend, sequences)
    weights = (layer.conv_weight, layer.a_log, layer.dt_bias, layer.norm_weight, EPS)
    record = (layer.state, layer.ring, layer.cursor, layer.window)
    return layer.backend.op("gated_delta_rule_decode")(qkv, z, a, b, *weights, *record, contexts, reads, writes)


def check_record(layer, slot, context, states, raw_inputs):
    """Whatever the next call accepts, the slot stands for the state and the window after it.

    states: after 0 .. T tokens of this call; raw_inputs: the taps - 1 inputs before the call, then its own.
    """
    taps = layer.heads.taps
    assert len(set(layer.cursor[slot].tolist())) == 1
    for accepted in range(1, len(states)):
        layer.backend.assert_state_close(layer.fold(slot, context + accepted), states[accepted], tolerance=ROUNDED)
        history = layer.history(slot, context + accepted)
        assert torch.equal(history, raw_inputs[accepted : accepted + taps - 1])


def check(layer, sequences, tokens):
    """Decode `tokens` tokens of each sequence and hold them to the reference; padding rows hold NaN."""
    backend = layer.backend
    mixers = [
        Mixer(layer, layer.prepare(s.read, s.context, s.pending), layer.history(s.read, s.context), EPS)
        if s.write >= 0
        else None
        for s in sequences
    ]
    qkv, z, a, b = layer.projections(len(sequences) * tokens)
    for i, mixer in enumerate(mixers):
        if mixer is None:
            for x in (qkv, z, a, b):
                x[i * tokens : (i + 1) * tokens] = torch.nan
    before = layer.arena.clone()
    out = decode(layer, qkv, z, a, b, sequences)
    for i, (sequence, mixer) in enumerate(zip(sequences, mixers, strict=True)):
        rows = slice(i * tokens, (i + 1) * tokens)
        if mixer is None:
            assert not out[rows].any()
            continue
        expected, states = mixer.run(qkv[rows], z[rows], a[rows], b[rows])
        backend.assert_close(out[rows], expected)
        raw_inputs = torch.cat([mixer.history, reference.exact(qkv[rows])])
        check_record(layer, sequence.write, sequence.context, states, raw_inputs)
    assert layer.untouched(before, {s.write for s in sequences if s.write >= 0}, WRITES)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("nv_per_nk", [1, 2, 3, 4])
def test_a_batch_equals_the_recurrence(backend, nv_per_nk, tokens):
    for heads in every_head_layout(backend, nv_per_nk):
        layer = Layer(backend, heads, slots=8, ring_rows=max(tokens - 1, 2), window=tokens + heads.taps - 1)
        sequences = [Sequence(9, 1, 6, 6, 2), Sequence(0, 1, -1, -1), Sequence(2, 1, 0, 5), Sequence(64, 1, 3, 3, 1)]
        check(layer, sequences, tokens)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sequence_that_starts_ignores_garbage_in_its_slot(backend, tokens):
    layer = Layer(backend, published(2), slots=3, window=6)
    for garbage in (-1, 0, 1 << 30):
        layer.cursor[1] = garbage
        check(layer, [Sequence(0, tokens, 1, 2)], tokens)
    layer.prepare(1, 50, pending=2)  # what an earlier sequence left there
    check(layer, [Sequence(0, tokens, 1, 1)], tokens)


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5])
def test_a_window_that_is_not_full_yet_is_zero_before_the_first_token(backend, context):
    check(Layer(backend, published(1), slots=2, window=6), [Sequence(context, 1, 1, 1)], 2)


@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_a_rejected_draft_leaves_no_trace(backend, tokens):
    """Whatever the rejected tokens were, the step after has the same bits, at every count of accepted ones; and no
    cursor has passed the one token of a step that is certain."""
    heads = published(2)
    for ring_rows, pending in ((tokens - 1, 0), (tokens - 1, 1), (8, 8 - tokens), (8, 5)):
        layer = Layer(backend, heads, slots=2, ring_rows=ring_rows, window=tokens + heads.taps - 2)
        layer.prepare(1, 30, pending=pending)
        first, second, before = layer.projections(tokens), layer.projections(tokens), layer.arena.clone()
        other = layer.projections(tokens)
        for accepted in range(1, tokens + 1):
            results = []
            for rejected in (first, other):
                # Both in memory of their own: on a CPU a product's last bit can depend on how its operands lie.
                drafts = [torch.cat([a[:accepted], b[accepted:]]) for a, b in zip(first, rejected, strict=True)]
                layer.arena.copy_(before)
                decode(layer, *drafts, [Sequence(30, tokens, 1, 1)])
                assert layer.cursor[1].max() <= 31
                out = decode(layer, *second, [Sequence(30 + accepted, tokens, 1, 1)])
                results.append((out, layer.fold(1, 30 + accepted + 1), layer.history(1, 30 + accepted + tokens)))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("more_ring", "more_window"), [(0, 0), (3, 0), (0, 3), (5, 2)])
def test_the_smallest_ring_and_window_suffice_and_larger_ones_serve(backend, tokens, more_ring, more_window):
    heads = published(1)
    window = max(tokens + heads.taps - 2, heads.taps) + more_window
    layer = Layer(backend, heads, slots=3, ring_rows=tokens - 1 + more_ring, window=window)
    pending = min(layer.ring.shape[1], 2)
    check(layer, [Sequence(11, 1, 2, 2, pending), Sequence(30, 1, 0, 1)], tokens)


def test_copy_on_write_leaves_the_read_slot_and_forks_share_it(backend):
    layer = Layer(backend, published(1), slots=4)
    mixer = Mixer(layer, layer.prepare(2, 40, pending=2), layer.history(2, 40), EPS)
    qkv, z, a, b = layer.projections(4)
    before = layer.arena.clone()
    out = decode(layer, qkv, z, a, b, [Sequence(40, 2, 2, 3), Sequence(40, 2, 2, 0)])
    for rows, slot in ((slice(0, 2), 3), (slice(2, 4), 0)):
        expected, states = mixer.run(qkv[rows], z[rows], a[rows], b[rows])
        backend.assert_close(out[rows], expected)
        check_record(layer, slot, 40, states, torch.cat([mixer.history, reference.exact(qkv[rows])]))
    assert layer.untouched(before, {0, 3}, WRITES)


def test_a_batch_of_padding_alone_touches_nothing(backend):
    check(Layer(backend, published(1), slots=2), [Sequence(0, 1, -1, -1), Sequence(7, 1, 1, -1)], 1)


def test_an_empty_batch(backend):
    layer = Layer(backend, published(1), slots=1)
    assert decode(layer, *layer.projections(0), []).shape == (0, 128)


def test_strong_decays_neither_overflow_nor_vanish(backend):
    layer = Layer(backend, published(2), slots=2, window=6)
    layer.decay_fast()
    check(layer, [Sequence(6, 1, 1, 0, 3)], 4)


@bounded
@given(st.data())
def test_any_acceptance_equals_the_sequential_run_of_the_accepted_tokens(backend, data):
    """Every step proposes T tokens and the next names how many of them count, as a verifier would."""
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    heads = published(data.draw(st.integers(1, 2))) if backend.kernels or data.draw(st.booleans()) else odd(2)
    tokens = data.draw(st.integers(1, 4), "T")
    ring_rows = tokens - 1 + data.draw(st.integers(0, 4), "more ring rows")
    window = max(tokens + heads.taps - 2, heads.taps) + data.draw(st.integers(0, 3), "more window entries")
    layer = Layer(backend, heads, slots=6, ring_rows=ring_rows, window=window)
    contexts = data.draw(st.lists(st.integers(0, 70), min_size=2, max_size=2), "contexts")
    slots = data.draw(st.permutations(range(6)), "slots")
    reads, spare = slots[:2], slots[2:]
    mixers = [Mixer(layer, layer.prepare(s, c), layer.history(s, c), EPS) for s, c in zip(reads, contexts, strict=True)]
    for _ in range(data.draw(st.integers(1, 4 if backend.kernels else 10), "steps")):
        writes = [spare.pop(0) if data.draw(st.booleans(), "move") else slot for slot in reads]
        spare += [read for read, write in zip(reads, writes, strict=True) if read != write]
        sequences = [Sequence(c, tokens, r, w) for c, r, w in zip(contexts, reads, writes, strict=True)]
        qkv, z, a, b = layer.projections(2 * tokens)
        out = decode(layer, qkv, z, a, b, sequences)
        for i, mixer in enumerate(mixers):
            rows = slice(i * tokens, (i + 1) * tokens)
            expected, states = mixer.run(qkv[rows], z[rows], a[rows], b[rows])
            backend.assert_close(out[rows], expected)
            accepted = data.draw(st.integers(1, tokens), "accepted")
            mixer.accept(qkv[rows], states, accepted)
            contexts[i] += accepted
        reads = writes
    for slot, context, mixer in zip(reads, contexts, mixers, strict=True):
        backend.assert_state_close(layer.fold(slot, context), mixer.state, tolerance=ROUNDED)


def prefill(layer, qkv, z, a, b, sequence):
    """A mixer's prefill out of its three operators."""
    backend, heads = layer.backend, layer.heads
    _, contexts, reads, writes = columns(backend, [sequence])
    starts, none = cu_seqlens(backend, [sequence.length]), snapshot_rows(backend, [])
    mixed = backend.op("causal_conv1d")(qkv, layer.conv_weight, layer.window, starts, contexts, reads, writes, none)
    out = backend.op("gated_delta_rule_prefill")(
        mixed, a, b, layer.a_log, layer.dt_bias, layer.state, layer.ring, layer.cursor, starts, contexts, reads, writes,
        none, sequence.length,
    )  # fmt: skip
    gate = z.unflatten(1, (heads.nv, heads.dv))
    return backend.op("gated_rms_norm")(out, gate, layer.norm_weight, EPS).flatten(1)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("sequences", [1, 2])
def test_rows_lie_one_behind_the_other(backend, sequences, tokens):
    layer = Layer(backend, published(2), slots=2, window=6)
    out = decode(layer, *layer.projections(sequences * tokens), [Sequence(20, tokens, i, i) for i in range(sequences)])
    assert out.is_contiguous()


def test_decode_equals_prefill(backend):
    layer = Layer(backend, published(2), slots=3)
    qkv, z, a, b = layer.projections(12)
    whole = prefill(layer, qkv, z, a, b, Sequence(0, 12, 0, 1))
    parts = [prefill(layer, qkv[:5], z[:5], a[:5], b[:5], Sequence(0, 5, 0, 2))]
    parts += [
        decode(layer, qkv[t : t + 1], z[t : t + 1], a[t : t + 1], b[t : t + 1], [Sequence(t, 1, 2, 2)])
        for t in range(5, 12)
    ]
    backend.assert_close(torch.cat(parts), whole)
    backend.assert_state_close(layer.fold(2, 12), layer.fold(1, 12), tolerance=ROUNDED)
    assert torch.equal(layer.history(2, 12), layer.history(1, 12))


@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_a_prefill_takes_over_after_drafts(backend, accepted):
    layer = Layer(backend, published(2), slots=2, window=5)
    mixer = Mixer(layer, layer.prepare(1, 20), layer.history(1, 20), EPS)
    drafts, rest = layer.projections(3), layer.projections(7)
    decode(layer, *drafts, [Sequence(20, 3, 1, 1)])
    mixer.accept(drafts[0], mixer.run(*drafts)[1], accepted)
    out = prefill(layer, *rest, Sequence(20 + accepted, 7, 1, 0))
    expected, states = mixer.run(*rest)
    backend.assert_close(out, expected)
    backend.assert_state_close(layer.state[0], states[-1], tolerance=ROUNDED)


def test_equal_inputs_give_equal_bits_wherever_the_slots_lie(backend):
    layer = Layer(backend, published(1), slots=6)
    layer.prepare(1, 17, pending=2)
    layer.arena[4] = layer.arena[1]
    projections = [x.repeat(2, 1) for x in layer.projections(3)]
    out = decode(layer, *projections, [Sequence(17, 3, 1, 5), Sequence(17, 3, 4, 4)])
    assert same_bits(out[:3], out[3:])
    assert same_bits(layer.arena[5], layer.arena[4]) or same_bits(layer.state[5], layer.state[4])
