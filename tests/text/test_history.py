"""Known turns in a prompt: the ids that were generated stand in for those the tokenizer spells."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.engine.text.history import TurnHistory

END = 9
IDS = st.lists(st.integers(0, 8), max_size=6)


def same_sum(spelled, generated) -> bool:
    """Two spellings of one turn, in a language where only the sum counts."""
    return sum(spelled) == sum(generated)


def test_a_known_turn_is_put_back_and_counts_move_with_it():
    history = TurnHistory([END])
    history.store("", [1, 2, 3], [4, 4, END])
    ids, counts, restored = history.restore("", [1, 2, 3, 8, END, 5, 5], [2, 3, 4, 5, 6], same_sum)
    assert (ids, restored) == ([1, 2, 3, 4, 4, END, 5, 5], 1)
    assert counts == [2, 3, 6, 7], "a place inside the turn is none any more"


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 4, 8, END, 5],  # other ids before the turn
        [1, 2, 3, 7, END, 5],  # another turn
        [1, 2, 3, 8, 5, 5],  # a turn without an end
        [1, 2],
        [],
    ],
)
def test_anything_else_stays_as_it_is(ids):
    history = TurnHistory([END])
    history.store("", [1, 2, 3], [4, 4, END])
    assert history.restore("", ids, [1], same_sum) == (ids, [1], 0)
    assert history.restore("other", [1, 2, 3, 8, END], [], same_sum)[2] == 0, "name spaces never meet"


def test_a_turn_that_was_cut_short_is_not_kept():
    history = TurnHistory([END])
    history.store("", [1], [4, 4])
    history.store("", [1], [])
    assert history.restore("", [1, 8, END], [], same_sum)[2] == 0


def test_memory_is_bounded_by_turns_and_by_ids_and_what_is_used_stays():
    history = TurnHistory([END], max_turns=3, max_ids=100)
    for first in range(3):
        history.store("", [first], [4, 4, END])
    assert history.restore("", [0, 8, END], [], same_sum)[2] == 1
    history.store("", [3], [4, 4, END])
    found = [history.restore("", [first, 8, END], [], same_sum)[2] for first in range(4)]
    assert found == [1, 0, 1, 1], "the one that was used longest ago is gone"
    history.store("", [5], [1] * 98 + [END])
    assert sum(history.restore("", [first, 8, END], [], same_sum)[2] for first in range(4)) == 0
    history.store("", [6], [1] * 200 + [END])
    assert history.restore("", [6, *[2] * 100, END], [], same_sum)[2] == 0


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), start=IDS)
def test_a_conversation_comes_back_whole(turns, start):
    """Turn after turn is generated in one spelling and returned in another; the prompt is always the generated ids."""
    history, exact = TurnHistory([END]), [7, *start]
    returned = list(exact)
    for generated, question in turns:
        history.store("", exact, [*generated, END])
        spelled = [8] * (sum(generated) // 8) + ([sum(generated) % 8] if sum(generated) % 8 else [])
        returned = [*returned, *spelled, END, *question, 7]
        exact = [*exact, *generated, END, *question, 7]
        ids, counts, _ = history.restore("", returned, [len(returned)], same_sum)
        assert ids == exact and counts == [len(exact)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "a"]), st.lists(st.integers(0, 2), max_size=3), IDS), max_size=20))
def test_the_index_of_known_prompts_holds_them_and_nothing_else(turns):
    history = TurnHistory([END], max_turns=5, max_ids=20)
    for name_space, prompt, generated in turns:
        history.store(name_space, prompt, [*generated, END])
        ends = [(turn.name_space, turn.length) for turn in history._turns.values()]
        assert {place: tails.total() for place, tails in history._tails.items()} == Counter(ends)
        indexed = {(space, length) for space, lengths in history._lengths.items() for length in lengths}
        assert indexed == set(ends)
    history.clear()
    assert not (history._lengths or history._tails)
