"""Claims about the convolution's kernel: tiles, more sequences than a warp has lanes, windows updated in place."""

import pytest
import torch

from tests.kernels.launches import emulator, torch_served
from tests.ops import reference
from tests.ops.backends import same_bits

pytest_plugins = ["tests.kernels.schedules"]


def run(backend, lengths, contexts, reads, writes, snapshots=(), channels=264, entries=4):
    """A call on random windows, against explicit windows: outputs, every stored entry, and what must not change."""
    slots = 1 + max([*reads, *writes, *(slot for _, _, slot in snapshots)])
    window, weight = backend.randn(slots, entries, channels), backend.randn(channels, 4) * 0.5
    x = backend.randn(sum(lengths), channels + 8)[:, :channels]
    before, starts = window.clone(), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    columns = [backend.tensor(values) for values in (starts, contexts, reads, writes)]
    rows = backend.tensor(list(snapshots)).reshape(-1, 3)
    results = []
    assert torch_served(lambda: results.append(backend.op("causal_conv1d")(x, weight, window, *columns, rows))) == []

    out, expected = results[0], torch.empty(sum(lengths), channels, dtype=torch.float64)
    inputs = []  # of each sequence, by token number
    for start, length, context, read in zip(starts, lengths, contexts, reads, strict=False):
        held = range(max(0, context - entries), context)
        tokens = {t: before[read, t % entries] for t in held} | {context + i: x[start + i] for i in range(length)}
        zero = torch.zeros_like(before[0, 0])
        history = torch.stack([tokens.get(t, zero) for t in range(context - 3, context)])
        expected[start : start + length] = reference.causal_conv(x[start : start + length], weight, history)
        inputs.append(tokens)
    backend.assert_close(out, expected)

    ends = [(i, contexts[i] + lengths[i], slot) for i, slot in enumerate(writes)]
    stored = {slot: (inputs[i], end) for i, end, slot in [*ends, *snapshots] if slot >= 0}
    for slot in range(slots):
        if slot not in stored:
            assert same_bits(window[slot], before[slot])
            continue
        tokens, end = stored[slot]
        for token in range(max(0, end - entries), end):
            assert same_bits(window[slot, token % entries], tokens[token]), f"slot {slot}, token {token} of {end}"
        for token in range(end - entries, 0):
            assert not window[slot, token % entries].any()
    return out


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 65])
def test_lengths_around_a_tile(scheduled, length):
    run(scheduled, [length], [5], [1], [0])


@pytest.mark.parametrize("entries", [4, 5, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 9])
def test_a_window_updated_in_place_reads_before_it_writes(scheduled, entries, length):
    contexts = list(range(entries + 1))
    slots = [slot for slot, _ in enumerate(contexts)]
    run(scheduled, [length] * len(contexts), contexts, slots, slots, entries=entries)


def test_more_sequences_than_lanes(backend):
    lengths = [(7 * i) % 11 for i in range(71)]  # some of them empty
    slots = list(range(71))
    run(backend, lengths, [i % 6 for i in slots], slots, [141 - i for i in slots], channels=8)


def test_only_empty_sequences_still_move_their_windows(backend):
    run(backend, [0, 0], [9, 2], [0, 1], [2, 3])


def test_snapshots_of_a_sequence_in_place_see_the_old_window(scheduled):
    run(scheduled, [3, 40], [6, 30], [0, 1], [0, 1], [(0, 7, 2), (0, 9, 3), (1, 31, 4), (1, 64, 5), (1, 70, 6)])


def test_padding_stores_nothing(backend):
    run(backend, [4, 5], [3, 0], [0, 0], [-1, -5], [(0, 5, -1), (1, 5, 1)])


def test_a_long_tile_gives_the_bits_of_a_short_one(backend):
    if backend.emulated is None:
        pytest.skip("only the emulated device changes its size")
    outs, library = [], emulator()
    for multiprocessors in (1, 64):
        library.emulator_multiprocessors(multiprocessors)
        torch.manual_seed(5)
        outs.append(run(backend, [150, 70], [4, 0], [0, 1], [0, 1], channels=72))
    library.emulator_multiprocessors(4)
    assert same_bits(*outs)
