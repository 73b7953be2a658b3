"""Calls under a grammar: whatever is drawn reads back as calls that the tools' schemas admit."""

import json
import time

import pytest

from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.text import tool_grammar
from tokenspeed.engine.text.argument_types import domain
from tokenspeed.engine.text.tool_grammar import ToolGrammars
from tokenspeed.engine.text.turn import parse_answer

from .grammar_sampling import after, violation


def specs(tools, choice="auto", **kwargs):
    return ToolGrammars().spec(tools, choice, **kwargs)


def tool(name="f", required=(), strict=True, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "maximum": 99, "minimum": 0}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    }
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}}


TEXT = {"type": "string", "maxLength": 6}
EVERYTHING = tool(
    "everything",
    ["text", "number", "either", "point"],
    text=TEXT,
    pattern={"type": "string", "pattern": "^[a-c]{1,3}/x$"},
    number={"type": "number", "minimum": 0, "maximum": 9},
    word={"enum": ["a", "b c", 3, None]},
    maybe={"anyOf": [{"type": "string", "minLength": 1, "maxLength": 3}, {"type": "null"}]},
    either={"anyOf": [TEXT, {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2}]},
    direct={"allOf": [{"$ref": "#/$defs/point"}], "default": None},
    listed={"type": ["array", "null"], "items": {"type": "boolean"}, "maxItems": 2},
    point={"$ref": "#/$defs/point", "description": "where"},
)
LITTLE = tool("little", ["on"], on={"type": "boolean"})
EMPTY = tool("empty")
TOOLS = [EVERYTHING, LITTLE, EMPTY]
SCHEMAS = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}


def answers(compiler, sampler, spec, tools, seeds=8):
    grammar = compiler.compile(spec)
    drawn = [sampler.draw(grammar.copy(), seed) for seed in range(seeds)]
    texts = [sampler.tokenizer.decode(ids, skip_special_tokens=False) for ids in drawn if ids is not None]
    assert texts, "no sample came to an end"
    return [parse_answer(text, tools, spec.reasoning, exact=True) for text in texts]


def valid(calls):
    return [violation(call.arguments, SCHEMAS[call.name]) for call in calls] == [None] * len(calls)


@pytest.mark.parametrize("reasoning", [False, True])
def test_a_required_call_is_made_and_its_arguments_are_valid(compiler, sampler, reasoning):
    for answer in answers(compiler, sampler, specs(TOOLS, "required", reasoning=reasoning), TOOLS):
        assert answer.tool_calls and not answer.content and valid(answer.tool_calls)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize(
    "form", [lambda name: {"type": "function", "function": {"name": name}}, lambda name: {"name": name}]
)
def test_a_named_function_is_called_once(compiler, sampler, name, form):
    for answer in answers(compiler, sampler, specs(TOOLS, form(name)), TOOLS, seeds=4):
        assert [call.name for call in answer.tool_calls] == [name]
        assert not answer.content and valid(answer.tool_calls)


def test_without_parallel_calls_there_is_one(compiler, sampler):
    several = answers(compiler, sampler, specs([LITTLE, EMPTY], "required"), TOOLS, seeds=12)
    assert max(len(answer.tool_calls) for answer in several) > 1
    for answer in answers(compiler, sampler, specs([LITTLE, EMPTY], "required", parallel=False), TOOLS):
        assert len(answer.tool_calls) == 1


def test_with_a_free_choice_text_may_come_first_and_strict_calls_are_valid(compiler, sampler):
    found = answers(compiler, sampler, specs(TOOLS), TOOLS, seeds=24)
    assert all(valid(answer.tool_calls) for answer in found)
    assert any(answer.content for answer in found) and any(answer.tool_calls for answer in found)


def test_nothing_is_enforced_where_any_text_may_come():
    assert specs(TOOLS, "none") is None
    assert specs([tool(strict=False)], "auto") is None
    assert specs([], "auto") is None


@pytest.fixture(scope="module")
def accepts(compiler, tokenizer):
    """Whether a grammar lets all of a text through and may end there."""

    def check(spec, text):
        matcher = compiler.compile(spec).copy()
        return all(map(matcher.accept, tokenizer.encode(text))) and matcher.accept(tokenizer.eos_id)

    return check


def written(name, **arguments):
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


NEEDED = {"text": "ab", "number": 3, "either": "xy", "point": '{"x": 1}'}
ADMITTED = [
    {},
    {"text": ""},
    {"text": "\n</\n"},
    {"pattern": "ab/x"},
    {"word": "b c"},
    {"word": 3},
    {"word": "null"},
    {"maybe": "null"},
    {"maybe": "xyz"},
    {"either": '[{"x": 1}, {"x": 2}]'},
    {"either": "[]"},
    {"listed": "[true]"},
    {"listed": "null"},
]
REFUSED = [
    {"text": "more than six"},
    {"pattern": "d/x"},
    {"pattern": "a/x "},
    {"number": "ten"},
    {"number": 10},
    {"word": "c"},
    {"word": 4},
    {"maybe": ""},
    {"maybe": "wxyz"},
    {"either": "[1]"},
    {"listed": "[1]"},
    {"point": "{}"},
    {"point": '{"x": 1, "y": 2}'},
    {"unknown": "1"},
]


@pytest.mark.parametrize("changes", ADMITTED, ids=str)
def test_each_alternative_can_be_written(accepts, changes):
    order = [name for name in SCHEMAS["everything"]["properties"] if name in NEEDED | changes]
    text = written("everything", **{name: (NEEDED | changes)[name] for name in order})
    [call] = parse_answer(text, TOOLS, reasoning=False).tool_calls
    assert violation(call.arguments, SCHEMAS["everything"]) is None
    for choice in ("required", "auto"):
        assert accepts(specs(TOOLS, choice), text)


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_the_schema_refuses_cannot_be_written(accepts, changes):
    arguments = NEEDED | changes
    order = [name for name in (*SCHEMAS["everything"]["properties"], "unknown") if name in arguments]
    text = written("everything", **{name: arguments[name] for name in order})
    [call] = parse_answer(text, TOOLS, reasoning=False).tool_calls
    assert violation(call.arguments, SCHEMAS["everything"]) is not None
    for choice in ("required", "auto"):
        assert not accepts(specs(TOOLS, choice), text)


def test_missing_arguments_and_unknown_functions_cannot_be_written(accepts):
    for text in (written("everything", text="ab"), written("little"), written("nobody"), "no call", ""):
        assert not accepts(specs(TOOLS, "required"), text)
    for text in ("no call", "", "Well:\n\n" + written("empty") + "\n" + written("little", on="true")):
        assert accepts(specs(TOOLS, "auto"), text)


def test_a_call_cannot_pass_for_text_by_another_spelling_of_its_tag(compiler, tokenizer):
    matcher = after(compiler.compile(specs(TOOLS)), tokenizer.encode_text("Use <tool_call"))
    closing = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id).startswith(b">")]
    assert closing and not any(matcher.copy().accept(id) for id in closing)


def test_a_text_cannot_hold_what_would_end_it(compiler, tokenizer, accepts):
    """Or it would not read back as it was meant."""
    note = tool("note", ["text"], text={"type": "string"}, more={"type": "string"})
    spec = specs([note], "required")
    for text in (
        "x </parameter> y",
        "x\n</parameter",
        "<parameter=more>",
        "</function>",
        "<tool_call",
        "größe 🙂 \x00",
    ):
        assert accepts(spec, written("note", text=text))
        [call] = parse_answer(written("note", text=text), [note], reasoning=False, exact=True).tool_calls
        assert call.arguments == {"text": text}
    cut = "<tool_call>\n<function=note>\n<parameter=text>\nx</parameter>"
    matcher = after(compiler.compile(spec), tokenizer.encode(cut))
    assert not all(map(matcher.accept, tokenizer.encode("<parameter=more>")))
    either = tool("either", ["n"], n={"type": ["string", "array"]})
    for text in ("[x", " \n{", "\x1c["):
        assert not accepts(specs([either], "required"), written("either", n=text))


def test_what_the_chat_template_writes_is_admitted(accepts, template):
    arguments = {"text": "ab\nc", "number": 3, "either": [{"x": 1}], "point": {"x": 5}}
    calls = [
        {"function": {"name": "everything", "arguments": arguments}},
        {"function": {"name": "empty", "arguments": {}}},
    ]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    text = template.render(messages, add_generation_prompt=False).text
    turn = text[text.index("<tool_call>") :].removesuffix("<|im_end|>\n")
    assert accepts(specs(TOOLS, "required"), turn)


def test_a_lax_tool_is_held_to_its_schema_where_a_call_is_required_and_else_to_the_form_of_a_call(accepts):
    lax = tool("lax", ["n"], strict=False, n={"type": "integer"})
    typed, free = written("lax", n=5), written("lax", m="x", n="y")
    assert accepts(specs([lax], "required"), typed)
    assert not accepts(specs([lax], "required"), free)
    beside = specs([lax, LITTLE], "auto")
    assert accepts(beside, typed) and accepts(beside, free)
    assert not accepts(beside, free.removesuffix("</tool_call>"))
    for schema in ({"not": {}}, {"type": "array", "uniqueItems": True}, False, {"type": "string", "pattern": "("}):
        odd = tool("odd", ["n"], strict=False, n=schema)
        assert accepts(specs([odd], "required"), written("odd", n="anything", m="else"))
    for parameters in ({}, None, 5, {"type": "object"}):
        bare = {"name": "bare", "parameters": parameters}
        assert accepts(specs([bare], "required"), written("bare", n="anything"))


def changed(**parameters):
    return [{"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}} | parameters}]


CANNOT = [
    (changed(properties={"n": {"not": {}}}), "strict tool 'f' cannot be enforced: .*not"),
    (changed(properties={"n": {"type": "array", "uniqueItems": True}}), "uniqueItems"),
    (changed(properties={"n": False}), "admits nothing"),
    (changed(properties={"n": {"type": ["string", "array"], "minLength": 3}}), "something else as well"),
    (changed(properties={"n": {"type": "string", "pattern": "^a|b"}}), "an anchor and alternatives"),
    (changed(properties={"n": {"type": "string", "pattern": 5}}), "must be a string"),
    (changed(properties={"n": {"type": "string", "pattern": "("}}), "unclosed group"),
    (changed(properties={"n": {"type": "string", "minLength": "x"}}), "must be integers"),
    (changed(properties={"n": {"type": "string", "not": {}}}), "text with not"),
    (changed(properties={"n": {"allOf": [{"type": ["string", "array"]}, {"minLength": 3}]}}), "text with allOf"),
    (changed(properties={"n": {"enum": ["</parameter>"]}}), "closing tag"),
    (changed(properties={"n": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string"}]}}), "text with oneOf"),
    (changed(properties={"a>b": {}}), "'a>b' cannot be written in a call"),
    (changed(properties=[]), "properties must be an object"),
    (changed(required="n"), "required a list"),
    (changed(required=[5]), "required names 5"),
    (changed(anyOf=[]), "parameters may not have anyOf"),
    (changed(minProperties=1), "parameters may not have minProperties"),
    (changed(properties={"n": {"type": "string", "pattern": "\ud800"}}), "not valid Unicode"),
    (changed(properties={"\ud800": {}}), "not valid Unicode"),
    ([{"name": "f", "strict": True, "parameters": "x"}], "must be a JSON schema"),
]


@pytest.mark.parametrize(("tools", "expected"), CANNOT, ids=range(len(CANNOT)))
def test_a_strict_tool_that_cannot_be_enforced_is_a_request_error_with_the_reason(tools, expected):
    for choice in ("auto", "required", {"name": "f"}):
        with pytest.raises(RequestError, match=expected):
            specs(tools, choice)


@pytest.mark.parametrize("choice", ["always", None, {}, {"function": "f"}, {"function": {"name": "g"}}, ["f"]])
def test_a_choice_that_is_none_is_a_request_error(choice):
    with pytest.raises(RequestError, match="tool_choice is"):
        specs([tool("f")], choice)


def test_a_call_that_cannot_be_made_is_a_request_error():
    with pytest.raises(RequestError, match="there are no tools"):
        specs([], "required")
    with pytest.raises(RequestError, match="cannot be written in a call; names have"):
        specs([{"name": "a\nb"}], "required")


def test_definitions_come_along_only_where_they_are_used():
    definitions = {"big": {"type": "object", "description": "x" * 30_000}}
    properties = {f"n{i}": {"type": "integer"} for i in range(20)} | {
        "p": {"type": "array", "items": {"$ref": "#/$defs/big"}}
    }
    spec = specs(changed(properties=properties, **{"$defs": definitions}), "required")
    assert len(spec.rules) < 2 * len(json.dumps(definitions)) + 10_000


def test_a_function_is_worked_out_once(monkeypatch):
    checked = []
    grammars = ToolGrammars()
    first = grammars.spec(TOOLS, "required")
    monkeypatch.setattr(tool_grammar, "_by_schema", lambda *_: checked.append(1))
    assert grammars.spec(TOOLS, "required") == first and not checked
    assert grammars.spec(TOOLS, "required", reasoning=True).rules == first.rules and not checked


def test_what_many_constants_admit_is_found_in_linear_time():
    words, arrays = [f"w{i}" for i in range(200_000)], [[i] for i in range(20_000)]
    start = time.monotonic()
    admitted = domain({"allOf": [{"enum": words}, {"enum": words[::-2]}, {"anyOf": [{"enum": words}] * 3}]}, {})
    assert set(admitted["string"]) == set(words[::-2])
    assert len(domain({"allOf": [{"enum": arrays}, {"enum": arrays}]}, {})["array"]) == 20_000
    assert domain({"allOf": [{"enum": [[1], [2], "a"]}, {"enum": [[2], "b"]}]}, {}) == {"array": ([2],), "string": ()}
    assert time.monotonic() - start < 10, "minutes, where each constant copies those before it"
