"""Bad words and the thinking budget: what each forbids, and that it says beforehand where it may."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.text.constraints import BadWords, ThinkingBudget, Verdict, combine
from tokenspeed.engine.text.tokenizer import Tokenizer

START, END, WORDS = 40, 41, 2


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(SHIPPED)


def allowed_ids(mask: np.ndarray | None) -> list[int] | None:
    return None if mask is None else [i for i in range(32 * len(mask)) if mask[i // 32] >> (i % 32) & 1]


def test_a_bad_word_is_not_completed_in_either_spelling(tokenizer):
    rule = BadWords(["kelpish"], tokenizer)
    for text in ("kelpish", " kelpish"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1
        assert ids[-1] in rule.verdicts([1, 2, *ids[:-1]])[0].banned
        assert ids[-1] in rule.verdicts(ids[:-1])[0].banned, "also as the first words of an output"
        assert ids[-1] not in rule.verdicts([*ids[:-2], 1])[0].banned
        assert ids[-1] not in rule.verdicts(ids[1:-1])[0].banned, "half a word in the prompt is none"


def test_what_ends_in_a_forbidden_id_needs_no_look_at_the_outputs(tokenizer):
    (call,) = tokenizer.encode("<tool_call>")
    assert len(tokenizer.encode(" <tool_call>")) > 1
    rule = BadWords(["<tool_call>"], tokenizer)
    assert rule.single == (call,) and not rule.may_act(99)


def test_a_bad_word_of_one_id_is_always_forbidden_and_costs_no_waiting(tokenizer):
    rule = BadWords(["!"], tokenizer)
    assert tokenizer.encode("!") == [*rule.single][:1]
    both = BadWords(["!", "kelpish"], tokenizer)
    assert both.single == rule.single
    assert not both.may_act(0) and both.may_act(1), "a longer word needs an output before its last id"


@given(
    st.integers(0, 4),
    st.lists(st.sampled_from([1, 2, START, END]), max_size=6),
    st.lists(st.sampled_from([1, 2, 3, START, END]), max_size=14),
)
def test_after_the_budget_the_end_of_reasoning_is_the_only_choice(budget, prompt, outputs):
    rule = ThinkingBudget(budget, prompt, START, END, WORDS)
    thinking, spent, foreseen = False, 0, []
    for id in prompt:
        thinking = id == START or (thinking and id != END)
    for i in range(len(outputs) + 1):
        now, *ahead = rule.verdicts(outputs[:i], outputs[i:])
        assert allowed_ids(now.allowed) == ([END] if thinking and spent >= budget else None)
        foreseen.append([allowed_ids(verdict.allowed) for verdict in (now, *ahead)])
        # Said one output ahead too, as planning must, when the id before is not known yet.
        if i < len(outputs):
            id = outputs[i]
            acts_next = rule.may_act(i + 1)
            rule.accept(id)
            spent = 0 if id == END or not thinking else spent + 1
            thinking = id == START or (thinking and id != END)
            if thinking and spent >= budget:
                assert acts_next, "the step was planned as if nothing could be forbidden"
                assert rule.may_act(i + 1)
    said = foreseen[0]
    assert foreseen == [said[i:] for i in range(len(said))], "what is foreseen is what is said then"


def test_a_budget_that_is_far_away_costs_no_waiting():
    rule = ThinkingBudget(100, [START], START, END, WORDS)
    assert not any(rule.may_act(i) for i in range(100))
    assert rule.may_act(100)


def test_rules_combine_to_what_all_of_them_leave():
    a, b = (np.array([bits, 0], dtype=np.int32) for bits in (0b0110, 0b0011))
    verdict = combine([Verdict(a, (7,)), Verdict(), Verdict(b, (5, 7))])
    assert allowed_ids(verdict.allowed) == [1] and verdict.banned == (5, 7)
    assert combine([Verdict()]) == Verdict()
