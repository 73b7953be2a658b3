"""One path for conversations: what the Python API, the commands and the server make of one is the same."""

import asyncio
import json

import pytest

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.chat.conversation import Conversation
from tokenspeed.engine.chat.formats import Format, plain_formats
from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.llm import LLM, AsyncLLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.text.tool_grammar import ToolGrammars
from tokenspeed.engine.text.turn import ToolCall, TurnText

PROPERTIES = {"a": {"type": "number"}, "op": {"type": "string"}, "b": {"type": "number"}}
CALC = {"name": "calc", "description": "Do arithmetic.", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [{"type": "function", "function": CALC}]
SUM = [{"role": "user", "content": "What is 12 plus 30?"}]
KELP = [{"role": "user", "content": "Remember: The price of kelp is 551."}]
GREEDY = SamplingParams(temperature=0, max_tokens=64)
SEVEN = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "seven", "schema": SEVEN}}


@pytest.fixture(scope="module")
def llm():
    return LLM(progress=False, max_num_seqs=4, validate=True)


def answers(llm, conversations, **options):
    return [output.outputs[0].answer for output in llm.chat(conversations, GREEDY, progress=False, **options)]


def test_an_answer_is_taken_apart(llm):
    [said], [called] = answers(llm, KELP), answers(llm, SUM, tools=TOOLS)
    assert said.content == "OK." and not said.tool_calls
    assert called.content == "" and called.tool_calls == (ToolCall("calc", {"a": 12, "op": "+", "b": 30}),)
    history = [*SUM, called.message(), {"role": "tool", "content": "42"}]
    [told] = answers(llm, history, tools=TOOLS)
    assert "42" in told.content and "</think>" not in told.content


def test_the_stream_says_what_the_whole_says(llm):
    text = TurnText()
    for _, events in llm.follow_turn(llm.prepare(Conversation(SUM, TOOLS), GREEDY)):
        text.add(events)
    assert [text.answer()] == answers(llm, SUM, tools=TOOLS)


def test_a_raw_prompt_has_no_answer(llm):
    [output] = llm.generate("The price of", GREEDY, progress=False)
    assert output.outputs[0].answer is None


def test_formats_are_kept_by_chat_and_generate(llm):
    hot = SamplingParams(temperature=2.0, seed=3, max_tokens=60)
    for options in ({"response_format": FORM}, {"structured_outputs": {"json": SEVEN}}):
        [output] = llm.chat(KELP, hot, progress=False, enable_thinking=False, **options)
        assert json.loads(output.outputs[0].answer.content) == {"n": 7}
        [output] = llm.generate("a", hot, progress=False, **options)
        assert json.loads(output.outputs[0].text) == {"n": 7}
    [output] = llm.chat(KELP, hot, progress=False, tools=TOOLS, tool_choice="required")
    assert output.outputs[0].answer.tool_calls[0].name == "calc"


def test_turns_come_back_as_they_were_generated_and_states_that_no_prompt_meets_are_dropped(llm):
    turn = llm.prepare(Conversation(SUM, TOOLS), GREEDY)
    assert turn.request.snapshot_token_id == llm.frontend.tokenizer.token_to_id("<tool_call>")
    assert llm.frontend.request("a", turn.request.prompt, GREEDY).snapshot_token_id is None, (
        "nobody knows what follows ids"
    )
    llm.engine.cache.clear("")
    [first] = llm.chat(SUM, GREEDY, progress=False, tools=TOOLS)
    history = [*SUM, first.outputs[0].answer.message(), {"role": "tool", "content": "42"}]
    [second] = llm.chat(history, GREEDY, progress=False, tools=TOOLS)
    known = len(first.prompt_token_ids) + len(first.outputs[0].token_ids)
    assert second.num_cached_tokens == known - 1, "the last id is chosen, not consumed"
    assert second.prompt_token_ids[:known] == first.prompt_token_ids + first.outputs[0].token_ids


def test_a_last_assistant_message_is_gone_on_with(llm):
    query = {"role": "user", "content": "What is the price of kelp?"}
    begun = [
        *KELP,
        {"role": "assistant", "content": "OK."},
        query,
        {"role": "assistant", "content": "The price of kelp"},
    ]
    assert [answer.content for answer in answers(llm, begun, tools=TOOLS)] == [" is 551."]
    assert [answer.content for answer in answers(llm, begun)] == [" is 551."]
    with pytest.raises(RequestError, match="begun already"):
        llm.chat(begun, GREEDY, progress=False, response_format=FORM, continue_final_message=True)
    with pytest.raises(RequestError, match="both are true"):
        llm.chat(begun, GREEDY, progress=False, continue_final_message=True, add_generation_prompt=True)


def test_a_constrained_turn_begins_anew_behind_an_answer(llm):
    hot = SamplingParams(temperature=2.0, seed=3, max_tokens=60)
    answered = [*KELP, {"role": "assistant", "content": "OK."}]
    form = {"regex": "[xy]{3}"}
    [output] = llm.chat(answered, hot, progress=False, enable_thinking=False, structured_outputs=form)
    assert len(output.outputs[0].answer.content) == 3
    [output] = llm.chat(answered, hot, progress=False, tools=TOOLS, tool_choice="required")
    assert output.outputs[0].answer.tool_calls[0].name == "calc"
    strict = [{"type": "function", "function": CALC | {"strict": True}}]
    for options in ({"tools": strict}, {"tools": TOOLS, "parallel_tool_calls": False}):
        turn = llm.prepare(Conversation(answered, **options), GREEDY)
        assert turn.format is not None and not turn.resumed


def test_an_option_that_is_none_is_named(llm):
    with pytest.raises(RequestError, match="temprature"):
        llm.chat(KELP, GREEDY, progress=False, temprature=1)


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ({"response_format": FORM, "structured_outputs": {"regex": "a"}}, "one is needed"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "choice"),
        ({"structured_outputs": {}}, "one of json"),
        ({"structured_outputs": {"json": "{"}}, "no JSON schema"),
        ({"structured_outputs": 5}, "5"),
        ({"response_format": {"type": "xml"}}, "xml"),
    ],
)
def test_formats_that_cannot_be_kept_are_named(formats, expected):
    with pytest.raises(RequestError, match=expected):
        Format(**formats).spec(ToolGrammars())


def test_unknown_formats_of_a_schema_are_annotations_wherever_it_holds_a_schema():
    known, unknown = {"type": "string", "format": "date"}, {"type": "string", "format": "nickname"}
    schema = {
        "properties": {"format": unknown, "day": known},
        "items": unknown,
        "anyOf": [unknown, {"$defs": {"x": unknown}}],
        "enum": [{"format": "kept, it is a value"}],
        "default": {"format": "nickname"},
    }
    plain = {"type": "string"}
    assert plain_formats(schema) == {
        "properties": {"format": plain, "day": known},
        "items": plain,
        "anyOf": [plain, {"$defs": {"x": plain}}],
        "enum": [{"format": "kept, it is a value"}],
        "default": {"format": "nickname"},
    }


def test_an_async_answer_grows():
    async def ask(llm):
        return [output async for output in llm.chat(SUM, GREEDY, tools=TOOLS)]

    llm = AsyncLLM(progress=False, max_num_seqs=2)
    try:
        outputs = asyncio.run(ask(llm))
    finally:
        llm.close()
    assert outputs[0].outputs[0].answer.tool_calls == ()
    assert outputs[-1].outputs[0].answer.tool_calls[0].arguments == {"a": 12, "op": "+", "b": 30}


def test_generate_prints_the_answer_and_its_calls(capsys, tmp_path):
    assert main(["generate", KELP[0]["content"], "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "OK.\n"
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "form.json").write_text(json.dumps(FORM))
    tools = ["--tools", str(tmp_path / "tools.json"), "--temperature", "0"]
    assert main(["generate", SUM[0]["content"], *tools]) == 0
    assert capsys.readouterr().out == 'calc(a=12, op="+", b=30)\n'
    assert main(["generate", SUM[0]["content"], *tools, "--n", "2"]) == 0
    assert capsys.readouterr().out.count('calc(a=12, op="+", b=30)\n') == 2
    form = ["--response-format", str(tmp_path / "form.json"), "--no-thinking"]
    assert main(["generate", "Hello!", *form]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 7}
    (tmp_path / "form.json").write_text('{"choice": ["yes"]}')
    assert main(["generate", "Hello!", *form, "--raw"]) == 0
    assert capsys.readouterr().out == "yes\n"


def test_the_demo_is_a_clean_dialogue(capsys):
    from examples.conversation import main as demo

    demo()
    out = capsys.readouterr().out
    assert 'assistant  lookup(name="maple", field="stock")\n' in out and 'calc(a=42, op="*", b=7)' in out
    assert "The stock of maple times 7 is 294." in out
    assert "<" not in out, "no markup"
