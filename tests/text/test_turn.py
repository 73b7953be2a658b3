"""A turn taken apart: reasoning, content and calls, also where the model lost a tag; the same wherever it is cut."""

import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenspeed.engine.text.tools import Arguments, CallCut, CallStarted, Content
from tokenspeed.engine.text.turn import AnswerParser, Reasoning, TurnText, parse_answer

FEW = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INTEGER, STRING = {"type": "integer"}, {"type": "string"}


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


TOOLS = [
    tool("calc", a=INTEGER, op=STRING, b=INTEGER),
    tool("write", path=STRING, text=STRING, tags={"type": "array"}),
    tool("now"),
]


def fed(pieces, reasoning=True, tools=TOOLS, resumed=False):
    parser = AnswerParser(reasoning, tools, resumed)
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish()


def joined(events):
    """The events with neighbours of a kind made one, so that only what they say is left."""
    result = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content | Reasoning) and type(event) is type(last):
            result[-1] = type(event)(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            result[-1] = Arguments(event.index, last.json + event.json)
        else:
            result.append(event)
    return result


def read(turn, reasoning=False, tools=TOOLS):
    """(reasoning, content, [(name, arguments), ...]) of a whole turn."""
    answer = parse_answer(turn, tools, reasoning)
    return answer.reasoning, answer.content, [(call.name, call.arguments) for call in answer.tool_calls]


SUM = {"a": 1, "op": "+", "b": 2}
CALC = (
    "<tool_call>\n<function=calc>\n<parameter=a>\n1\n</parameter>\n<parameter=op>\n+\n</parameter>\n"
    "<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>"
)
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
RECOVERED = {
    "a parameter opens before the last one is closed": CALC.replace("1\n</parameter>", "1"),
    "two parameters do": CALC.replace("\n</parameter>\n<parameter", "\n<parameter"),
    "no </function>": CALC.replace("</function>\n", ""),
    "no last </parameter>": CALC.replace("</parameter>\n</function>", "</function>"),
    "neither of them": CALC.replace("</parameter>\n</function>\n", ""),
    "no last </parameter> and no </tool_call>": CALC.replace("</parameter>\n</function>\n</tool_call>", "</function>"),
    "no <tool_call>": CALC.replace("<tool_call>\n", ""),
    "no <tool_call> and no </tool_call>": CALC.replace("<tool_call>\n", "").replace("\n</tool_call>", ""),
}


@pytest.mark.parametrize("turn", RECOVERED.values(), ids=RECOVERED.keys())
@pytest.mark.parametrize("before", ["", "Let me see.\n\n"])
@pytest.mark.parametrize("after", ["", "\n"])
def test_a_call_of_an_offered_tool_is_read_though_a_tag_is_missing(turn, before, after):
    assert read(before + turn + after) == ("", before.strip(), [("calc", SUM)])
    assert read(before + turn + "\n" + NOW + after) == ("", before.strip(), [("calc", SUM), ("now", {})])
    same_at_every_split(before + turn + "\n" + NOW + after, reasoning=False)


@pytest.mark.parametrize("turn", RECOVERED.values(), ids=RECOVERED.keys())
def test_a_call_of_another_tool_is_not_guessed_at(turn):
    assert ("calc", SUM) not in read(turn, tools=[tool("other")])[2]


@pytest.mark.parametrize("turn", RECOVERED.values(), ids=RECOVERED.keys())
def test_where_a_grammar_keeps_the_tags_nothing_is_guessed_at(turn):
    found = [(call.name, call.arguments) for call in parse_answer(turn, TOOLS, False, exact=True).tool_calls]
    assert found != [("calc", SUM)]
    text = "x\n<parameter=tags>\n"
    call = f"<tool_call>\n<function=write>\n<parameter=text>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert parse_answer(call, TOOLS, False, exact=True).tool_calls[0].arguments == {"text": text}


def test_two_functions_in_one_call_are_two_calls():
    second = "<function=now>\n</function>\n"
    assert read(CALC.replace("</tool_call>", second + "</tool_call>"))[1:] == ("", [("calc", SUM), ("now", {})])
    lost = CALC.replace("</parameter>\n</function>\n", "</function>\n" + second)
    assert read(lost)[1:] == ("", [("calc", SUM), ("now", {})])


@pytest.mark.parametrize(
    "turn",
    [
        "A call begins with <function=calc> and <parameter=a>.",
        "Write\n<function=calc>\nand so on.",
        "The tag <function=now></function> in a line",
        "<function=other>\n</function>",
        "It ends in </function> or </tool_call>",
        "- `<tool_call>`: opens a call\n- `</parameter>`: ends a value",
        "<tool_call>\n</tool_call>",
    ],
)
def test_prose_about_tags_stays_prose(turn):
    assert read(turn) == ("", turn, [])
    same_at_every_split(turn, reasoning=False)


@pytest.mark.parametrize(
    "text",
    [
        "<parameter=text> in a line",
        "x\n<parameter=unknown>\ny",
        "x\n<parameter=path>\nused before",
        "</function>",
        "a\n</function>\n</tool_call>\nb",
        "</tool_call> and more",
        "x </parameter> y",
    ],
)
def test_tags_in_a_value_stay_text(text):
    turn = (
        f"<tool_call>\n<function=write>\n<parameter=path>\np\n</parameter>\n<parameter=text>\n{text}\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    assert read(turn) == ("", "", [("write", {"path": "p", "text": text})])
    same_at_every_split(turn, reasoning=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a', \"b\"]", ["a", "b"]),
        ("[1, True, None]", [1, True, None]),
        ("[{'a': (1, 2)}]", [{"a": [1, 2]}]),
        ("{'a': 1}", "{'a': 1}"),
        ("[open('x')]", "[open('x')]"),
        ("[a]", "[a]"),
        ("[1e999]", "[1e999]"),
        ("{1, 2}", "{1, 2}"),
        ("[b'x']", "[b'x']"),
        ("[" * 1000 + "'a'" + "]" * 1000, "[" * 1000 + "'a'" + "]" * 1000),
        ("['" + "a" * 200_000 + "']", "['" + "a" * 200_000 + "']"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_array_spelled_as_python_spells_it_is_an_array(text, value):
    turn = f"<tool_call>\n<function=write>\n<parameter=tags>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert read(turn)[2] == [("write", {"tags": value})]


THOUGHTS = [
    # turn, reasoning, content, names of the calls; the prompt has opened the reasoning
    ("hm\n" + CALC, "hm", "", ["calc"]),
    (CALC, "", "", ["calc"]),
    ("hm\n" + CALC + "\n" + NOW + "\n", "hm", "", ["calc", "now"]),
    ("hm\n" + CALC.replace("</function>\n", ""), "hm", "", ["calc"]),
    ("I could say <tool_call>, or\n" + NOW, "I could say <tool_call>, or", "", ["now"]),
    (NOW + " or " + CALC, NOW + " or", "", ["calc"]),
    (NOW + "\n</think>\n\nno", NOW, "no", []),
    (NOW + "\n</think>\n\n" + CALC, NOW, "", ["calc"]),
    ("hm " + NOW + " was what I thought", "hm " + NOW + " was what I thought", "", []),
    ("hm\n" + CALC[:-40], "hm\n" + CALC[:-40], "", []),
    ("hm <tool", "hm <tool", "", []),
    ("hm\n<tool_call>\n<function=other>\n</function>\n</tool_call>",) * 2 + ("", []),
    ("hm\n<function=now>\n</function>",) * 2 + ("", []),
]


@pytest.mark.parametrize(("turn", "reasoning", "content", "names"), THOUGHTS, ids=range(len(THOUGHTS)))
def test_complete_calls_that_end_a_turn_inside_its_reasoning_are_calls(turn, reasoning, content, names):
    thought, said, calls = read(turn, reasoning=True)
    assert (thought, said, [name for name, _ in calls]) == (reasoning, content, names)
    same_at_every_split(turn, reasoning=True)


def test_without_tools_no_calls_are_looked_for():
    assert read(CALC, tools=None) == ("", CALC, [])
    assert read(CALC, reasoning=True, tools=None) == (CALC, "", [])
    assert read(CALC, reasoning=True, tools=[]) == (CALC, "", [])


def test_a_turn_that_goes_on_with_what_the_prompt_began_keeps_its_leading_space():
    for tools in (TOOLS, None):
        assert joined(fed([" is 551."], reasoning=False, tools=tools, resumed=True)) == [Content(" is 551.")]
    assert joined(fed([" is 551."], reasoning=False)) == [Content("is 551.")]


def test_reasoning_comes_as_it_is_written_up_to_what_may_be_a_call():
    parser = AnswerParser(True, TOOLS)
    assert parser.push("I think <") == [Reasoning("I think")]
    assert parser.push("tool> ") == [Reasoning(" <tool>")]
    assert parser.push("<tool_call>\n<function=now>") == []
    assert parser.push(" is what I would write") == [Reasoning(" <tool_call>\n<function=now> is what I would write")]


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=calc>", "<function=other>", "</function>"]
TAGS += ["<parameter=a>", "<parameter=op>", "<parameter=text>", "</parameter>", CALC, NOW, *RECOVERED.values()]
TAGS += ["<tool_call>\n<function=write>\n<parameter=text>\n", "\n</parameter>\n</function>\n</tool_call>\n"]
TEXTS = ["\n", " ", "\n\n", "x", "12", "['a']", "<", ">", "</", "<tool", "<function", "=", '"', "é", "🙂"]
TURNS = st.lists(st.sampled_from(TAGS) | st.sampled_from(TEXTS), max_size=12).map("".join)


def same_at_every_split(turn, reasoning, tools=TOOLS):
    whole = joined(fed([turn], reasoning, tools))
    assert joined(fed(turn, reasoning, tools)) == whole
    for cut in range(len(turn)):
        assert joined(fed([turn[:cut], turn[cut:]], reasoning, tools)) == whole


@FEW
@given(turn=TURNS, reasoning=st.booleans(), cuts=st.lists(st.integers(0, 400), max_size=6))
@example(turn="<tool_call>" + " " * 300 + NOW, reasoning=True, cuts=[])
@example(turn=CALC[:-13] + " " * 300, reasoning=False, cuts=[5])
@example(turn="<tool_call>\n<function=write>\n<parameter=text>\nx</function>" + "\n" * 300, reasoning=False, cuts=[])
def test_the_events_are_the_same_wherever_the_turn_is_cut(turn, reasoning, cuts):
    whole = joined(fed([turn], reasoning))
    places = sorted({0, len(turn), *(cut for cut in cuts if cut < len(turn))})
    assert joined(fed([turn[a:b] for a, b in pairwise(places)], reasoning)) == whole
    same_at_every_split(turn, reasoning)


@FEW
@given(turn=TURNS, reasoning=st.booleans(), size=st.integers(1, 50), tools=st.sampled_from([TOOLS, None]))
@example(turn=f"</think>\n\nOne. {NOW}\n\ntwo, \nthree\n", reasoning=True, size=1, tools=TOOLS)
@example(turn=f"</think>\n\nOne. {NOW}", reasoning=True, size=400, tools=None)
def test_content_says_where_in_the_turn_it_stands(turn, reasoning, size, tools):
    told, called = 0, True
    for event in fed([turn[i : i + size] for i in range(0, len(turn), size)], reasoning, tools):
        if isinstance(event, Content):
            begin, end = event.at
            before = event.text.removesuffix(turn[begin:end])
            assert told <= begin < end and event.text == before + turn[begin:end]
            assert not before.strip() and (called or begin == told), "only white space before a call is left out"
            told = end
        called = not isinstance(event, Content)


@FEW
@given(turn=TURNS, reasoning=st.booleans())
def test_what_is_announced_as_a_call_is_json_or_cut(turn, reasoning):
    events = fed(turn, reasoning)
    started = [event.index for event in events if isinstance(event, CallStarted)]
    assert started == list(range(len(started)))
    text = TurnText()
    text.add(events)
    assert len(text.answer().tool_calls) == len(started) - any(isinstance(event, CallCut) for event in events)


HOSTILE = ["\n", " ", "<tool_call>", "<function=calc>", "\n<function=calc>\n", "</parameter>\n", "</function>\n", NOW]
HOSTILE += ["</tool_call>\n", "<parameter=a>\n", "\n<", "<tool_call><function=write><parameter=text>", NOW + "x"]
HOSTILE += ["<tool_call>\n<function=calc>\n</function>\n", "</think>", "<tool_call>" + 250 * " ", CALC[:-20]]
STARTS = ["", "</think>x", "</think><tool_call><function=write><parameter=text>"]


@pytest.mark.thinned(3, "start", "unit")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("unit", HOSTILE, ids=lambda unit: repr(unit[:24]))
def test_a_turn_takes_time_linear_in_its_length(unit, start):
    """200,000 characters, whole and in pieces of a token: quadratic work would take minutes."""
    turn = start + unit * (200_000 // len(unit))
    for size in (len(turn), 4):
        begin = time.process_time()
        events = fed([turn[at : at + size] for at in range(0, len(turn), size)])
        assert time.process_time() - begin < 5
        assert events or not turn.strip()
