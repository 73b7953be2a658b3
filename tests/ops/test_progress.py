"""Claims about the operators that keep a sequence's progress on the device, against a list of plain sequences."""

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .backends import bounded

PAGE, COLUMNS, STOPS, PAGES = 64, 5, 4, 6


@dataclass
class Tables:
    """Random progress of some sequences, and the row that padding has."""

    length: list[int]
    left: list[int]
    prompt: list[int]
    capacity: list[int]
    min_tokens: list[int]
    ids: list[list[int]]
    stops: list[list[int]]
    pages: list[list[int]] = field(default_factory=list)

    @classmethod
    def random(cls, random: Random, rows: int = 6) -> "Tables":
        def each(low: int, high: int) -> list[int]:
            return [random.randint(low, high) for _ in range(rows)]

        prompt = each(1, 200)
        length = [p + random.randint(0, 150) for p in prompt]
        return cls(
            length,
            [random.choice([0, 1, 2, 3, 900]) for _ in range(rows)],
            prompt,
            [min(PAGE * (1 + tokens // PAGE + random.randint(0, 1)), PAGE * PAGES) for tokens in length],
            [random.choice([0, 0, n - p, n - p + 1, n - p + 3]) for n, p in zip(length, prompt, strict=True)],
            [[random.randrange(3) for _ in range(COLUMNS)] for _ in range(rows)],
            [[random.choice([-1, 0, 1, 2, 2**31]) for _ in range(STOPS)] for _ in range(rows)],
            [random.sample(range(50), PAGES) for _ in range(rows)],
        )


def int64(backend, values):
    return backend.tensor(values, torch.int64)


def decode_rows(backend, tables: Tables, index, reads, writes, width):
    """Of the operator: index, tokens, outputs, contexts, read and write slots, pages, angles, places."""
    numbers = (backend.tensor(x) for x in ([index, reads, writes], tables.length, tables.left, tables.prompt))
    places = backend.tensor(tables.pages), backend.tensor(tables.capacity), torch.ones(1, device=backend.device)
    return backend.op("decode_rows")(*numbers, int64(backend, tables.ids), *places, width, 0.5, PAGE)


@bounded
@given(st.integers(0, 2**32), st.integers(1, COLUMNS), st.integers(1, 6))
def test_a_sequence_goes_on_from_where_it_is_or_stands_still(backend, seed, width, batch):
    random = Random(seed)
    tables, index = Tables.random(random), random.sample(range(6), batch)
    reads, writes = ([random.randint(-1, 9) for _ in index] for _ in range(2))
    given, tokens, outputs, context, read, write, pages, cos_sin, kv_slots = decode_rows(
        backend, tables, index, reads, writes, width
    )
    assert given.dtype == torch.int64 and given.tolist() == index
    assert tokens.tolist() == [tables.ids[i][:width] for i in index]
    assert pages.tolist() == [tables.pages[i] for i in index]
    places = backend.tensor(tables.pages), backend.tensor(tables.capacity), torch.ones(1, device=backend.device)
    rows = backend.op("paged_rows")(int64(backend, index), context, *places, width, 0.5, 0, PAGE)
    assert torch.equal(cos_sin, rows[0]) and torch.equal(kv_slots, rows[1])
    for row, i in enumerate(index):
        going = writes[row] >= 0 and tables.left[i] > 0
        expected = (tables.length[i], reads[row], writes[row]) if going else (-1, -1, -1)
        assert (context[row].item(), read[row].item(), write[row].item()) == expected
        if going:
            first = tables.length[i] + 1 - tables.prompt[i]
            assert outputs[row].tolist() == list(range(first, first + width))


@bounded
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 6), st.sampled_from([0, -1]))
def test_rows_stand_in_the_pages_of_their_sequence_and_nowhere_else(backend, seed, width, batch, shift):
    random = Random(seed)
    tables, index = Tables.random(random), random.sample(range(6), batch)
    first = [random.choice([-1, tables.length[i], tables.capacity[i] - 2]) for i in index]
    inv_freq = torch.tensor([1.0, 0.1, 0.003], device=backend.device)
    arguments = (backend.tensor(first), backend.tensor(tables.pages), backend.tensor(tables.capacity), inv_freq)
    cos_sin, slots = backend.op("paged_rows")(int64(backend, index), *arguments, width, 0.5, shift, PAGE)
    rows = [(i, f + j if f >= 0 else -1) for i, f in zip(index, first, strict=True) for j in range(width)]
    expected = [
        tables.pages[i][row // PAGE] * PAGE + row % PAGE if 0 <= row < tables.capacity[i] else -1 for i, row in rows
    ]
    assert slots.tolist() == expected
    angles = torch.tensor([[(row + shift) * f for f in (1.0, 0.1, 0.003)] for _, row in rows], dtype=torch.float64)
    there = torch.tensor([row >= 0 for _, row in rows])
    wanted = 0.5 * torch.cat([angles.cos(), angles.sin()], 1)
    assert cos_sin.dtype == torch.float32
    if there.any():
        assert (cos_sin.cpu().double() - wanted)[there].abs().max() < 1e-4


def test_angles_of_the_longest_contexts_are_exact(backend):
    first, shift = [262_144, 105_610, 99_999, 1_000], -3
    inv_freq = torch.cat([torch.ones(1), 1e7 ** -(torch.arange(0, 64, 2) / 64)]).to(backend.device)
    tables = backend.tensor([[0]] * 4), backend.tensor([0] * 4)
    index = int64(backend, range(4))
    cos_sin, slots = backend.op("paged_rows")(index, backend.tensor(first), *tables, inv_freq, 8, 1.0, shift, PAGE)
    positions = torch.tensor([row + j + shift for row in first for j in range(8)], dtype=torch.float32)
    angles = (positions[:, None] * inv_freq.cpu()).double()  # the product in single precision defines the angle
    assert (cos_sin.cpu() - torch.cat([angles.cos(), angles.sin()], 1)).abs().max() < 1e-5
    assert slots.tolist() == [-1] * 32


def accepted(tables: Tables, i: int, tokens: list[int], chosen: list[int], context: int) -> int:
    """How many of the ids that were chosen count."""
    count = 0
    for place, id in enumerate(chosen):
        if context < 0 or tables.left[i] == count or (place and tokens[place] != chosen[place - 1]):
            break
        count += 1
        if id < 0 or (id in tables.stops[i] and context + 1 - tables.prompt[i] + place + 1 >= tables.min_tokens[i]):
            tables.left[i] = count
            break
    return count


@bounded
@given(st.integers(0, 2**32), st.integers(1, COLUMNS), st.integers(1, 6))
def test_drafts_count_as_far_as_they_were_chosen_and_no_further_than_an_end(backend, seed, width, batch):
    random = Random(seed)
    tables, index = Tables.random(random), random.sample(range(6), batch)
    writes = [random.choice([-1, 3, 3, 3]) for _ in index]
    _, tokens, outputs, context, *_ = decode_rows(backend, tables, index, writes, writes, width)
    chosen = [[random.randrange(3) for _ in range(width)] for _ in index]
    for row in range(batch):  # most drafts are right
        chosen[row] = [
            tokens[row, at + 1].item() if at + 1 < width and random.random() < 0.7 else id
            for at, id in enumerate(chosen[row])
        ]
        if random.random() < 0.3:  # and behind some no id could be chosen
            chosen[row][random.randrange(width)] = random.choice([-1, -2])
    progress = [backend.tensor(tables.length), backend.tensor(tables.left), int64(backend, tables.ids)]
    rules = backend.tensor(tables.min_tokens), int64(backend, tables.stops)
    arguments = (int64(backend, chosen), tokens, outputs, context, int64(backend, index), *rules, *progress)
    counts = backend.op("accept_tokens")(*arguments)
    for row, i in enumerate(index):
        before = tables.left[i]
        count = accepted(tables, i, tokens[row].tolist(), chosen[row], context[row].item())
        assert counts[row].item() == count
        if count:
            tables.length[i] = context[row].item() + count
            tables.ids[i][0] = max(chosen[row][count - 1], 0)
        tables.left[i] = 0 if tables.left[i] != before else before - count
    assert [x.tolist() for x in progress] == [tables.length, tables.left, tables.ids]


def test_padding_rows_share_an_index_and_change_nothing(backend):
    tables = Tables.random(Random(0))
    index, none = [5, 2, 5, 5], [-1, 4, -1, -1]
    tables.left[2] = 9
    _, tokens, outputs, context, read, write, *_ = decode_rows(backend, tables, index, none, none, 3)
    assert read.tolist() == write.tolist() == none and context.tolist() == [-1, tables.length[2], -1, -1]
    progress = [backend.tensor(tables.length), backend.tensor(tables.left), int64(backend, tables.ids)]
    rules = backend.tensor(tables.min_tokens), int64(backend, [[-1] * STOPS] * 6)
    chosen = int64(backend, [[1, 1, 1], [7, 7, 7], [2, 2, 2], [3, 3, 3]])
    counts = backend.op("accept_tokens")(chosen, tokens, outputs, context, int64(backend, index), *rules, *progress)
    assert counts.tolist() == [0, 1, 0, 0]
    assert [progress[0].tolist()[i] for i in (0, 1, 3, 4, 5)] == [tables.length[i] for i in (0, 1, 3, 4, 5)]
    assert progress[2].tolist()[5] == tables.ids[5] and progress[2].tolist()[2][0] == 7


@bounded
@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(1, 6))
def test_drafts_stand_behind_the_last_id_as_far_as_there_are_pages(backend, seed, drafts, batch):
    random = Random(seed)
    tables, index = Tables.random(random), random.sample(range(6), batch)
    context = [random.choice([-1, tables.length[i], tables.capacity[i] - 2]) for i in index]
    columns = (backend.tensor(x) for x in (context, tables.capacity, tables.prompt))
    tokens, rows, outputs = backend.op("draft_rows")(
        int64(backend, index), *columns, int64(backend, tables.ids), drafts
    )
    assert tokens.tolist() == [tables.ids[i][0] for i in index]
    for at, (i, first) in enumerate(zip(index, context, strict=True)):
        for k in range(drafts):
            exists = first >= 0 and first + k < tables.capacity[i]
            assert rows[k, at].item() == (first + k if exists else -1)
            if exists:
                assert outputs[k, at].item() == first + 1 - tables.prompt[i] + k


@pytest.mark.parametrize("name", ["decode_rows", "paged_rows", "draft_rows", "accept_tokens"])
def test_no_sequences_are_no_work(backend, name):
    none, tables = int64(backend, []), Tables.random(Random(1))
    few, counts = backend.tensor([]), [backend.tensor(x) for x in (tables.length, tables.left, tables.prompt)]
    ids = int64(backend, tables.ids)
    places = (backend.tensor(tables.pages), backend.tensor(tables.capacity), torch.ones(3, device=backend.device))
    if name == "decode_rows":
        assert decode_rows(backend, tables, [], [], [], 2)[1].shape == (0, 2)
    elif name == "paged_rows":
        assert backend.op(name)(none, few, *places, 2, 1.0, 0, PAGE)[1].shape == (0,)
    elif name == "draft_rows":
        assert backend.op(name)(none, few, *counts[:2], ids, 2)[1].shape == (2, 0)
    else:
        empty = none.view(0, 2)
        rules = backend.tensor(tables.min_tokens), int64(backend, tables.stops)
        assert len(backend.op(name)(empty, empty, empty, few, none, *rules, *counts[:2], ids)) == 0


# tokens, chosen, left, min_tokens, stops; how many count, what is left. The first id chosen is output 0.
COUNTED = {
    "all drafts are right": ([5, 6, 7, 8], [6, 7, 8, 9], 99, 0, [], 4, 95),
    "the second is wrong": ([5, 6, 0, 8], [6, 7, 8, 9], 99, 0, [], 2, 97),
    "the first is wrong, those behind it right": ([5, 0, 7, 8], [6, 7, 8, 9], 99, 0, [], 1, 98),
    "a stop among them": ([5, 6, 7, 8], [6, 7, 8, 9], 99, 0, [7], 2, 0),
    "a stop behind a wrong one": ([5, 0, 7, 8], [6, 7, 8, 9], 99, 0, [8], 1, 98),
    "a stop before min_tokens": ([5, 6, 7, 8], [6, 7, 8, 9], 99, 3, [7], 4, 95),
    "a stop with which min_tokens are reached": ([5, 6, 7, 8], [6, 7, 8, 9], 99, 2, [7], 2, 0),
    "no more than is left": ([5, 6, 7, 8], [6, 7, 8, 9], 2, 0, [], 2, 0),
}


def counted(backend, accept, name: str) -> None:
    tokens, chosen, left, min_tokens, stops, count, rest = COUNTED[name]
    length, remaining, ids = backend.tensor([30]), backend.tensor([left]), int64(backend, [[5, 0, 0, 0]])
    rules = backend.tensor([min_tokens]), int64(backend, [[*stops, *[-1] * (STOPS - len(stops))]])
    rows = (int64(backend, [x]) for x in (chosen, tokens, [0, 1, 2, 3]))
    found = accept(*rows, backend.tensor([30]), int64(backend, [0]), *rules, length, remaining, ids)
    assert (found.item(), length.item(), remaining.item()) == (count, 30 + count, rest)
    assert ids[0, 0].item() == chosen[count - 1]


@pytest.mark.parametrize("name", COUNTED)
def test_of_the_ids_chosen_count(backend, name):
    counted(backend, backend.op("accept_tokens"), name)


def _left_again(accept, *a):
    before = a[8].clone()
    found = accept(*a)
    a[8].copy_(before)
    return found


def _length_by_width(accept, *a):
    found = accept(*a)
    a[7].copy_(a[3] + a[0].shape[1])
    return found


def _stop_of_any_row(accept, *a):
    found = accept(*a)
    a[8].masked_fill_((a[0][:, :, None] == a[6][:, None]).any(-1).any(-1), 0)
    return found


# Wrong ways, of (chosen, tokens, outputs, context_lens, index, min_tokens, stops, length, left, ids).
WRONG = {
    "drafts count unseen": lambda accept, *a: accept(a[0], torch.cat([a[1][:, :1], a[0][:, :-1]], 1), *a[2:]),
    "ids behind a stop count": lambda accept, *a: accept(*a[:6], torch.full_like(a[6], -1), *a[7:]),
    "min_tokens by the first output": lambda accept, *a: accept(*a[:2], a[2][:, :1].expand_as(a[2]) * 1, *a[3:]),
    "min_tokens are ignored": lambda accept, *a: accept(*a[:5], a[5] * 0, *a[6:]),
    "left is not counted down": _left_again,
    "length goes on by the width": _length_by_width,
    "a stop behind a rejected draft ends": _stop_of_any_row,
}


@pytest.mark.parametrize("bug", WRONG)
def test_a_wrong_way_to_count_is_found(backend, bug):
    def wrong(*arguments):
        return WRONG[bug](backend.op("accept_tokens"), *arguments)

    with pytest.raises(AssertionError):
        for name in COUNTED:
            counted(backend, wrong, name)
