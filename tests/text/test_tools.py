"""Calls in the model's text: found as it comes, typed by the schema, and otherwise left alone."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tokenspeed.engine.text.tools import (
    Arguments,
    CallCut,
    CallFinished,
    CallStarted,
    Content,
    ToolCallParser,
)
from tokenspeed.engine.text.turn import TurnText, parse_answer

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tool(name="f", definitions=None, **properties):
    parameters = {"type": "object", "properties": properties, "$defs": definitions or {}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call_text(name="f", **arguments):
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def fed(pieces, tools=None):
    parser = ToolCallParser(tools)
    return [event for piece in pieces for event in parser.push(piece)] + parser.finish()


def joined(events):
    """The events with neighbours of a kind made one, so that only what they say is left."""
    result = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            result[-1] = Arguments(event.index, last.json + event.json)
        else:
            result.append(event)
    return result


def parsed(text, tools=None):
    """(content, [(name, arguments), ...]) of a whole turn's content."""
    answer = put_together(fed([text], tools))
    return answer.content, [(call.name, call.arguments) for call in answer.tool_calls]


def put_together(events):
    turn = TurnText()
    turn.add(events)
    return turn.answer()


TYPED = [
    # schema, text, value
    ({"type": "string"}, "12", "12"),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
    ({"type": "string"}, "  kept  ", "  kept  "),
    ({"type": "string"}, "\n two lines \n", "\n two lines \n"),
    ({"type": "string"}, "", ""),
    ({"type": "string"}, 'größe 你好 🙂 \u2028 \x00 "\\', 'größe 你好 🙂 \u2028 \x00 "\\'),
    ({}, "12", "12"),
    ({"description": "no type"}, "[1]", "[1]"),
    (True, "12", "12"),
    ({"type": "nonsense"}, "12", "12"),
    ({"type": "integer"}, "12", 12),
    ({"type": "integer"}, " -7\n", -7),
    ({"type": "integer"}, "12.0", 12),
    ({"type": "integer"}, "12.5", "12.5"),
    ({"type": "integer"}, "true", "true"),
    ({"type": "integer"}, "twelve", "twelve"),
    ({"type": "integer"}, "9" * 5000, "9" * 5000),
    ({"type": "integer"}, "__import__('os')", "__import__('os')"),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "number"}, "3", 3),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "number"}, "1e999", "1e999"),
    ({"type": "number"}, "", ""),
    ({"type": "boolean"}, "true", True),
    ({"type": "boolean"}, "False", False),
    ({"type": "boolean"}, "yes", "yes"),
    ({"type": "boolean"}, "1", "1"),
    ({"type": "null"}, "None", None),
    ({"type": "array"}, '[1, "a", null]', [1, "a", None]),
    ({"type": "array"}, "[1,\n 2]", [1, 2]),
    ({"type": "array"}, "[1, 2", "[1, 2"),
    ({"type": "array"}, "[" * 100_000, "[" * 100_000),
    ({"type": "array"}, '["\\ud800"]', '["\\ud800"]'),
    ({"type": "object"}, '{"a": {"b": []}}', {"a": {"b": []}}),
    ({"type": "object"}, "[1]", "[1]"),
    ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
    ({"items": {}}, "[1]", [1]),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, " null ", None),
    ({"type": ["string", "null"]}, "nullable", "nullable"),
    ({"type": ["string", "null"]}, "12", "12"),
    ({"type": ["integer", "null"]}, "None", None),
    ({"type": "integer", "nullable": True}, "null", None),
    ({"type": ["integer", "string"]}, "12", "12"),
    ({"type": ["boolean", "integer"]}, "true", True),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"', '["a"'),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "a", "a"),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '{"a": 1}', '{"a": 1}'),
    ({"anyOf": [{"type": "string"}, {}]}, "[1]", "[1]"),
    ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "3", 3),
    ({"enum": ["a", "b"]}, "a", "a"),
    ({"enum": ["1", 2, None]}, "2", 2),
    ({"enum": ["1", 2, None]}, "1", "1"),
    ({"enum": ["1", 2, None]}, "null", None),
    ({"enum": ["1", 2, None]}, "4", "4"),
    ({"type": "integer", "enum": [1, 2]}, "2", 2),
    ({"const": True}, "true", True),
    ({"anyOf": [{"type": "boolean"}, {"enum": ["auto"]}]}, "true", True),
    ({"anyOf": [{"type": "boolean"}, {"enum": ["auto"]}]}, "auto", "auto"),
    ({"allOf": [{"type": ["integer", "string"]}, {"type": "integer"}]}, "5", 5),
    ({"type": "number", "allOf": [{"type": "integer"}]}, "5", 5),
    ({"$ref": "#/$defs/point"}, '{"x": 1}', {"x": 1}),
    ({"$ref": "#/$defs/a~1b"}, "5", 5),
    ({"$ref": "#/$defs/nowhere"}, "5", "5"),
    ({"$ref": "https://example.com/schema"}, "5", "5"),
    ({"$ref": "#/$defs/loop"}, "5", "5"),
    ({"$ref": "#/$defs/wide"}, "5", "5"),
    ({"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}, "null", None),
]
DEFINITIONS = {
    "point": {"type": "object"},
    "a/b": {"type": "integer"},
    "wide": {"anyOf": [{"$ref": "#/$defs/wide"}] * 20},
    "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}]},
}


@pytest.mark.parametrize(("schema", "text", "value"), TYPED, ids=lambda value: repr(value)[:40])
def test_an_argument_is_read_by_its_schema_and_on_doubt_stays_the_string_it_is(schema, text, value):
    tools = [tool(definitions=DEFINITIONS, x=schema)]
    turn = call_text(x=text)
    content, [(name, arguments)] = parsed(turn, tools)
    assert (content, name, list(arguments)) == ("", "f", ["x"])
    assert arguments["x"] == value and type(arguments["x"]) is type(value)
    if len(text) < 10_000:
        assert joined(fed(turn, tools)) == joined(fed([turn], tools))


@pytest.mark.parametrize("parameters", [None, [], "x", {"properties": []}, {"properties": {"x": 5}}, {"type": 5}])
def test_a_schema_that_is_none_makes_arguments_strings(parameters):
    assert parsed(call_text(x="12"), [{"name": "f", "parameters": parameters}]) == ("", [("f", {"x": "12"})])


def test_additional_properties_type_what_is_not_named():
    function = {"name": "f", "parameters": {"properties": {}, "additionalProperties": {"type": "integer"}}}
    assert parsed(call_text(x="12"), [function]) == ("", [("f", {"x": 12})])


COMPLETE = call_text(a="1")
LITERALS = [
    # text, content, calls
    ("It starts with <tool_call> and ends.", "It starts with <tool_call> and ends.", []),
    ("<tool_call><tool_call>" + COMPLETE, "<tool_call><tool_call>", [("f", {"a": "1"})]),
    ("Use <function=f> and <parameter=a>.", "Use <function=f> and <parameter=a>.", []),
    ("</tool_call>", "</tool_call>", []),
    ("a <tool_call>\n<function=f>\nno tag follows", "a <tool_call>\n<function=f>\nno tag follows", []),
    ("<tool_call>\n{}</tool_call>".format('{"name": "f"}'), '<tool_call>\n{"name": "f"}</tool_call>', []),
    ("<tool_call>\n<function=>\n</function>", "<tool_call>\n<function=>\n</function>", []),
    (f"<tool_call>\n<function={'f' * 257}></function>", f"<tool_call>\n<function={'f' * 257}></function>", []),
    (f"<tool_call>{' ' * 257}<function=f></function>", f"<tool_call>{' ' * 257}<function=f></function>", []),
    (call_text(a="x </parameter> y"), "", [("f", {"a": "x </parameter> y"})]),
    (call_text(a="</parameter>\n</parameter>"), "", [("f", {"a": "</parameter>\n</parameter>"})]),
    (call_text(a="<parameter=b>\n"), "", [("f", {"a": "<parameter=b>\n"})]),
    (call_text(a="</function>\n</tool_call>"), "", [("f", {"a": "</function>\n</tool_call>"})]),
    (call_text(a="x\n</parameter>\n<parameter=a>\ny"), "", [("f", {"a": "x\n</parameter>\n<parameter=a>\ny"})]),
    (call_text(a="x</parameter>\n<parameter=\ny"), "", [("f", {"a": "x</parameter>\n<parameter=\ny"})]),
    (call_text(a=COMPLETE[:-40]), "", [("f", {"a": COMPLETE[:-40]})]),
    (call_text(a="<tool_call>\n<function=g>\n"), "", [("f", {"a": "<tool_call>\n<function=g>\n"})]),
    (call_text("größe", **{"schlüssel name": "ä"}), "", [("größe", {"schlüssel name": "ä"})]),
    ("<tool_call><function=f><parameter=a>1</parameter><parameter=b>2</parameter></function></tool_call>",
     "", [("f", {"a": "1", "b": "2"})]),
    (call_text(), "", [("f", {})]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), LITERALS, ids=range(len(LITERALS)))
def test_tags_that_make_no_call_are_text(text, content, calls):
    assert parsed(text) == (content, calls)
    assert joined(fed(text)) == joined(fed([text]))


@pytest.mark.parametrize("turn", [f"So:\n\n{COMPLETE}", f"So:\n\n{call_text(a='1', b=' x')}"])
def test_a_turn_cut_anywhere_holds_a_call_only_once_its_function_is_closed(turn):
    whole = parsed(turn)[1]
    for end in range(len(turn)):
        content, calls = parsed(turn[:end])
        if "</function>" in turn[:end]:
            assert (content, calls) == ("So:", whole)
        else:
            assert (content, calls) == (turn[:end].rstrip(), [])
        streamed = [event for event in fed(turn[:end]) if not isinstance(event, Content)]
        started = any(isinstance(event, CallStarted) for event in streamed)
        assert not started or isinstance(streamed[-1], CallCut if not calls else CallFinished)
        arguments = "".join(event.json for event in streamed if isinstance(event, Arguments))
        assert calls or not arguments or cannot_be_json(arguments), "cut arguments must not pass for whole ones"


def cannot_be_json(text):
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def test_white_space_around_calls_and_at_the_ends_is_no_content_and_in_between_it_is():
    turn = f"\n\n Let me look. \n\n{call_text()}\n{call_text('g')}\n\nDone.\n"
    assert parsed(turn) == ("Let me look. \n\n\n\n\nDone.", [("f", {}), ("g", {})])
    assert joined(fed(turn)) == joined(fed([turn]))


TAGS = ["<tool_call>", "</tool_call>", "<function=f>", "<function=g>", "</function>", "</parameter>"]
TAGS += ["<parameter=s>", "<parameter=n>", "<parameter=u>", "<tool_call>\n<function=f>\n<parameter=s>\n"]
TAGS += ["<tool_call>\n<function=g>\n<parameter=n>", "\n</parameter>\n</function>\n</tool_call>\n"]
TEXTS = ["\n", " ", "x", "12", "null", "[", '["a"]', "<", ">", "</", "<tool", "=", '"', "\\", "é", "🙂", "nul"]
TURNS = st.lists(st.sampled_from(TAGS) | st.sampled_from(TEXTS), max_size=14).map("".join)
MIXED = [
    tool(s={"type": "string"}, n={"type": ["string", "null"]}, u={"anyOf": [{"type": "array"}, {"type": "string"}]})
]


@FEW
@given(turn=TURNS, cuts=st.lists(st.integers(0, 200), max_size=6))
@example(turn="<tool_call><function=f><parameter=n>nul</parameter></function>", cuts=[36])
def test_the_events_are_the_same_wherever_the_text_is_cut(turn, cuts):
    whole = joined(fed([turn], MIXED))
    assert joined(fed(turn, MIXED)) == whole
    places = sorted({0, len(turn), *(cut for cut in cuts if cut < len(turn))})
    assert joined(fed([turn[a:b] for a, b in pairwise(places)], MIXED)) == whole
    for cut in range(len(turn)):
        assert joined(fed([turn[:cut], turn[cut:]], MIXED)) == whole


@FEW
@given(turn=TURNS)
def test_nothing_is_lost_and_nothing_added(turn):
    """Against the same rules as regular expressions over the whole text, for arguments that are strings."""
    turn = unique_names(turn)
    content, calls = parsed(turn)
    expected_content, expected_calls = by_regular_expression(turn)
    assert [name for name, _ in calls] == [name for name, _ in expected_calls]
    assert calls == expected_calls
    assert content == expected_content.strip()


def unique_names(turn):
    count = iter(range(1000))
    return re.sub(r"<parameter=\w>", lambda match: f"<parameter={next(count)}>", turn)


NEXT = r"(?=\s*(?:<parameter=[^>\n]+>|</function>))"
ARGUMENT = rf"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>{NEXT}"
OPENING = re.compile(rf"<tool_call>\s*<function=([^>\n]+)>{NEXT}")
REST = re.compile(rf"((?:{ARGUMENT})*)\s*</function>(?:\s*</tool_call>)?", re.DOTALL)


def by_regular_expression(turn):
    content, calls, position = "", [], 0
    while opening := OPENING.search(turn, position):
        rest = REST.match(turn, opening.end())
        if rest is None:
            break
        content += turn[position : opening.start()]
        calls.append((opening[1], dict(re.findall(ARGUMENT, rest[0], re.DOTALL))))
        position = rest.end()
    return content + turn[position:], calls


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.text(st.sampled_from('ab <>/=\n"\\é🙂12[]{}'), max_size=12)


@FEW
@given(text=WORDS, whole=st.integers(), number=st.floats(allow_nan=False, allow_infinity=False), truth=st.booleans(),
       items=st.lists(JSON_VALUES, max_size=3), fields=st.dictionaries(WORDS, JSON_VALUES, max_size=3))  # fmt: skip
def test_what_the_chat_template_writes_is_read_back(template, text, whole, number, truth, items, fields):
    arguments = {"text": text, "whole": whole, "number": number, "truth": truth, "items": items, "fields": fields}
    kinds = ["string", "integer", "number", "boolean", "array", "object"]
    tools = [tool(**{name: {"type": kind} for name, kind in zip(arguments, kinds, strict=True)})]
    calls = [{"function": {"name": name, "arguments": arguments}} for name in ("f", "f")]
    message = {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": calls}
    messages = [{"role": "user", "content": "q"}, message]
    rendered = template.render(messages, add_generation_prompt=False).text
    turn = rendered.split("<think>")[1].removesuffix("<|im_end|>\n")
    answer = parse_answer(turn, tools)
    assert answer.reasoning == "hm" and answer.content == "Let me see."
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("f", arguments)] * 2
    assert parse_answer(turn, tools).message() == answer.message()


def test_strings_are_passed_on_as_they_come_and_content_too():
    parser = ToolCallParser([tool(s={"type": "string"})])
    for character in "some content":
        [event] = parser.push(character) or [Content(" ")]
        assert isinstance(event, Content)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    assert parser.push("word <b> ") == [Arguments(0, '"word <b> ')]
    assert parser.push('"') == [Arguments(0, '\\"')]
    assert parser.push("x\n</para") == [Arguments(0, "x")]


def test_what_is_left_after_a_cut_call_is_held_for_whoever_did_not_pass_its_start_on():
    events = fed(["Well. <tool_call>\n<function=f>\n<parameter=s>\nrm -r /tmp"])
    assert events[-1] == CallCut(0, " <tool_call>\n<function=f>\n<parameter=s>\nrm -r /tmp")
    assert joined(events)[1:3] == [CallStarted(0, "f"), Arguments(0, '{"s": "rm -r /tmp')]
    answer = put_together(events)
    assert answer.content == "Well. <tool_call>\n<function=f>\n<parameter=s>\nrm -r /tmp" and not answer.tool_calls


@pytest.mark.parametrize("unit", ["<tool_call>", "</parameter>\n", "<tool_call><function=f><parameter=a>", "<", "\n"])
def test_hostile_text_takes_linear_time(unit):
    """200,000 characters: quadratic work would take minutes."""
    turn = "<tool_call><function=f><parameter=s>" + unit * (200_000 // len(unit))
    assert fed([turn, "x"])[-1] == CallCut(0, turn + "x")


def test_reasoning_that_never_ends_is_no_content():
    assert parse_answer("hm " + COMPLETE).message() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm " + COMPLETE,
    }
    assert parse_answer(COMPLETE, [], reasoning=False).tool_calls[0].arguments == {"a": "1"}
