"""Reasoning off the front of a turn, wherever the pieces of text are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.engine.text.reasoning import ReasoningSplitter, leaves_reasoning_open

FEW = settings(max_examples=150, deadline=None)


def split(pieces, opened):
    splitter = ReasoningSplitter(opened)
    splits = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(s.reasoning for s in splits), "".join(s.content for s in splits)


SPLITS = [
    # turn, (reasoning, content) when the prompt left the reasoning open, and when it did not
    ("hm\n</think>\n\nyes", ("hm", "yes"), ("", "hm\n</think>\n\nyes")),
    ("<think>\nhm\n</think>\n\nyes", ("hm", "yes"), ("hm", "yes")),
    ("\n <think> hm</think>yes ", ("hm", "yes "), ("hm", "yes ")),
    ("\n</think>\n\nyes", ("", "yes"), ("", "\n</think>\n\nyes")),
    ("</think>", ("", ""), ("", "</think>")),
    ("hm", ("hm", ""), ("", "hm")),
    ("hm </think", ("hm </think", ""), ("", "hm </think")),
    ("<thi", ("<thi", ""), ("", "<thi")),
    ("<think>", ("", ""), ("", "")),
    (" \n a", ("a", ""), ("", " \n a")),
    (
        "a  b \n\n c \n</think> x </think> y",
        ("a  b \n\n c", "x </think> y"),
        ("", "a  b \n\n c \n</think> x </think> y"),
    ),
    ("a <think> b</think>c", ("a <think> b", "c"), ("", "a <think> b</think>c")),
    ("", ("", ""), ("", "")),
]


@pytest.mark.parametrize(("turn", "opened", "closed"), SPLITS, ids=[repr(turn) for turn, *_ in SPLITS])
def test_a_turn_is_split_at_its_first_closing_tag_if_reasoning_was_opened(turn, opened, closed):
    for pieces in ([turn], turn, *([turn[:cut], turn[cut:]] for cut in range(len(turn)))):
        assert split(pieces, opened=True) == opened
        assert split(pieces, opened=False) == closed


@FEW
@given(
    turn=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "th", "a", " ", "\n"]), max_size=9).map("".join),
    opened=st.booleans(),
)
def test_the_split_is_the_same_wherever_the_text_is_cut_and_loses_only_tags_and_white_space(turn, opened):
    reasoning, content = split([turn], opened)
    assert split(turn, opened) == (reasoning, content)
    for cut in range(len(turn)):
        assert split([turn[:cut], turn[cut:]], opened) == (reasoning, content)
    assert reasoning == reasoning.strip()
    body = turn.lstrip()
    opened = opened or body.startswith("<think>")
    before, closing, after = body.removeprefix("<think>").partition("</think>") if opened else ("", "", turn)
    assert (reasoning, content) == (before.strip(), after.lstrip() if closing else after)


def test_only_what_may_be_a_tag_or_white_space_at_an_end_is_held_back():
    splitter = ReasoningSplitter(opened=True)
    assert splitter.push("\nI think").reasoning == "I think"
    assert splitter.push(" </thi").reasoning == ""
    assert splitter.push("s").reasoning == " </this"
    assert splitter.push(" \n</think>\n").reasoning == ""
    assert splitter.push("\nSo </think> ").content == "So </think> "
    assert splitter.push("<").content == "<"


def test_the_generation_prompt_tells_whether_reasoning_is_open(template):
    messages = [{"role": "user", "content": "<think>"}]
    assert leaves_reasoning_open(template.render(messages).text)
    assert not leaves_reasoning_open(template.render(messages, enable_thinking=False).text)
    assert not leaves_reasoning_open(template.render(messages, add_generation_prompt=False).text)
