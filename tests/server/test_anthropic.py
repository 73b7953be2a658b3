"""Anthropic's own client, unchanged, against the shipped model."""

import json

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

CALCULATOR = {
    "name": "calc",
    "description": "Do arithmetic.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "op": {"type": "string"}, "b": {"type": "number"}},
    },
}
COMMON = {"model": "tiny", "max_tokens": 200, "extra_body": {"temperature": 0}}
SUM = [{"role": "user", "content": "What is 12 plus 30?"}]


@pytest.fixture(scope="module")
def client(server):
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


def test_a_message_is_answered(client):
    said = "Remember: The price of kelp is 551."
    answer = client.messages.create(messages=[{"role": "user", "content": said}], **COMMON)
    assert answer.content[-1].text == "OK." and answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0


def test_a_tool_round_trip(client):
    first = client.messages.create(messages=SUM, tools=[CALCULATOR], **COMMON)
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert call.name == "calc" and call.input == {"a": 12, "op": "+", "b": 30}
    messages = [
        *SUM,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "42"}]},
    ]
    second = client.messages.create(messages=messages, tools=[CALCULATOR], **COMMON)
    assert "42" in second.content[-1].text
    assert second.usage.cache_read_input_tokens >= first.usage.input_tokens + first.usage.cache_read_input_tokens


def test_the_stream_says_what_the_whole_says(client):
    whole = client.messages.create(messages=SUM, tools=[CALCULATOR], **COMMON)
    with client.messages.stream(messages=SUM, tools=[CALCULATOR], **COMMON) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert final.content[-1].input == whole.content[-1].input
    assert final.stop_reason == whole.stop_reason


def test_thinking_has_a_signature_without_which_clients_do_not_give_it_back(server):
    tool = {"name": "lookup", "description": "Look up a value."}
    tool["input_schema"] = {"type": "object", "properties": {name: {"type": "string"} for name in ("name", "field")}}
    said = [{"role": "user", "content": "What is the stock of maple times 7?"}]
    body = {"model": "tiny", "max_tokens": 200, "temperature": 0, "tools": [CALCULATOR, tool], "messages": said}
    whole = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()
    thought = whole["content"][0]
    assert thought["type"] == "thinking" and thought["thinking"] and thought["signature"]
    streamed = httpx.post(f"{server.url}/v1/messages", json=body | {"stream": True}, timeout=60).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    stop = next(i for i, found in enumerate(events) if found["type"] == "content_block_stop")
    assert events[stop]["index"] == 0 and events[stop - 1]["index"] == 0
    assert events[stop - 1]["delta"] == {"type": "signature_delta", "signature": thought["signature"]}
    assert all(found.get("delta", {}).get("type") != "signature_delta" for found in events[stop:])


def test_a_marked_block_is_resumed_by_another_conversation(client):
    system = [{"type": "text", "text": "You know about kelp. " * 12, "cache_control": {"type": "ephemeral"}}]
    client.messages.create(system=system, messages=SUM, **COMMON)
    other = [{"role": "user", "content": "Hello!"}]
    answer = client.messages.create(system=system, messages=other, **COMMON)
    assert answer.usage.cache_read_input_tokens > 60


def test_what_another_salt_brought_is_not_resumed(client):
    said = [{"role": "user", "content": "Remember: The code of cedar is 8214."}]
    for salt, known in (("one", False), ("one", True), ("other", False)):
        body = COMMON["extra_body"] | {"cache_salt": salt}
        answer = client.messages.create(messages=said, **COMMON | {"extra_body": body})
        assert bool(answer.usage.cache_read_input_tokens) == known


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [CALCULATOR], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ({"extra_body": {"output_config": {"format": {"type": "xml"}}}}, "xml"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, changes, word):
    with pytest.raises(anthropic.BadRequestError, match=word):
        client.messages.create(**{"messages": SUM, **COMMON, **changes})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"thinking": {"type": []}}, "thinking.type: Input should be a valid string (given: [])"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2**64}}, "budget_tokens: Input should be less than 2147"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens: Input should be greater than or"),
        ({"tool_choice": {"type": {}}}, "tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none' (given"),
        ({"tool_choice": {}}, "tool_choice.type: Field required"),
    ],
)
def test_a_type_that_is_no_string_and_a_budget_without_end_are_refused(server, more, expected):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | more
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=30)
    assert answer.status_code == 400 and expected in answer.json()["error"]["message"], answer.text


def test_a_system_message_among_the_others_is_folded_into_the_system_text(client):
    """As Claude Code sends it with every request."""
    messages = [*SUM, {"role": "system", "content": [{"type": "text", "text": "Two."}]}]
    late = client.messages.count_tokens(model="tiny", messages=messages, system="One.")
    folded = client.messages.count_tokens(model="tiny", messages=SUM, system="One.\n\nTwo.")
    assert late == folded
    client.messages.create(messages=messages, system="One.", **COMMON)


def test_what_claude_code_bills_by_is_no_part_of_the_prompt(client):
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=abcde;"}
    said = {"type": "text", "text": "Be brief."}
    with_it = client.messages.count_tokens(model="tiny", messages=SUM, system=[billing, said])
    assert with_it == client.messages.count_tokens(model="tiny", messages=SUM, system=[said])


def test_tokens_are_counted_as_the_prompt_has_them(client):
    asked = {"messages": SUM, "tools": [CALCULATOR], "system": "Be brief."}
    count = client.messages.count_tokens(model="tiny", **asked).input_tokens
    usage = client.messages.create(**asked, **COMMON).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


def test_equal_tools_give_equal_prompts_through_both_apis(client, server):
    other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
    function = {name: CALCULATOR[name] for name in ("name", "description")}
    function["parameters"] = CALCULATOR["input_schema"]
    backwards = dict(reversed(function.items())) | {"strict": False}
    for strict, sent in (({}, function), ({"strict": True}, function | {"strict": True}), ({}, backwards)):
        tool = {"function": sent, "type": "function"}
        one = client.messages.create(messages=SUM, tools=[CALCULATOR | strict], **COMMON)
        two = other.chat.completions.create(model="tiny", messages=SUM, tools=[tool], temperature=0)
        assert one.usage.input_tokens + one.usage.cache_read_input_tokens == two.usage.prompt_tokens
        assert two.usage.prompt_tokens_details.cached_tokens >= two.usage.prompt_tokens - 6


def test_a_strict_tool_is_enforced(client):
    schema = {"type": "object", "properties": {"n": {"enum": [3]}}, "required": ["n"], "additionalProperties": False}
    strict = {"name": "pick", "strict": True, "input_schema": schema}
    asked = {"tools": [strict], "tool_choice": {"type": "any"}, "extra_body": {"temperature": 1}}
    answer = client.messages.create(messages=SUM, **COMMON | asked)
    assert answer.content[-1].input == {"n": 3}
    loop = strict | {"input_schema": {"type": "object", "properties": {}, "patternProperties": {"x": {}}}}
    with pytest.raises(anthropic.BadRequestError, match="patternProperties"):
        client.messages.create(messages=SUM, tools=[loop], **COMMON)


class Thing(BaseModel):
    size: int
    tags: list[bool]


def test_messages_parse_gives_a_model(client):
    answer = client.messages.parse(messages=SUM, output_format=Thing, **COMMON | {"max_tokens": 400})
    assert isinstance(answer.parsed_output, Thing)


def test_the_tool_runner_runs_a_tool_to_its_end(client):
    @anthropic.beta_tool
    def calc(a: float, op: str, b: float) -> str:
        """Do arithmetic."""
        return str(int(a + b))

    runner = client.beta.messages.tool_runner(messages=SUM, tools=[calc], **COMMON)
    assert "42" in runner.until_done().content[-1].text


def test_one_call_where_parallel_use_is_disabled(client):
    two = [{"role": "user", "content": "What is 12 plus 30? What is 3 plus 4?"}]
    for kind in ("auto", "any"):
        choice = {"type": kind, "disable_parallel_tool_use": True}
        answer = client.messages.create(messages=two, tools=[CALCULATOR], tool_choice=choice, **COMMON)
        assert sum(block.type == "tool_use" for block in answer.content) <= 1


def test_a_last_assistant_message_is_gone_on_with(client):
    said = [{"role": "user", "content": "Remember: The price of kelp is 551."}, {"role": "assistant", "content": "OK."}]
    said += [{"role": "user", "content": "What is the price of kelp?"}]
    answer = client.messages.create(messages=[*said, {"role": "assistant", "content": "The price of kelp"}], **COMMON)
    assert answer.content[0].text == " is 551."


def test_no_tokens_fill_the_prefix_cache(client):
    system = "You know about cedar and onyx. " * 9
    empty = client.messages.create(messages=SUM, system=system, **COMMON | {"max_tokens": 0})
    assert empty.content == [] and empty.usage.output_tokens == 0 and empty.stop_reason == "max_tokens"
    assert client.messages.create(messages=SUM, system=system, **COMMON).usage.cache_read_input_tokens > 100


def test_a_thread_is_refused_so_that_the_client_goes_on_without(server):
    body = {"model": "tiny", "max_tokens": 5, "messages": SUM, "thread": {"type": "create"}}
    answer = httpx.post(f"{server.url}/v1/messages", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    client = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    with pytest.raises(anthropic.types.ThreadUnsupportedRequestError):
        client.beta.messages.thread(**COMMON).send(*SUM)
    # The tool runner asks for a thread first, too, and then goes on without one: the test above.


def test_a_prompt_that_does_not_fit_is_told_in_anthropics_words(client):
    with pytest.raises(anthropic.BadRequestError, match=r"`max_tokens` exceed context limit: \d+ \+ 8192 > 8192"):
        client.messages.create(messages=SUM, **COMMON | {"max_tokens": 8192})
    long = [{"role": "user", "content": "kelp " * 9000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 8191 maximum"):
        client.messages.create(messages=long, **COMMON)


def test_models_have_cards(client):
    [card] = client.models.list().data
    assert (card.id, card.type, card.display_name) == ("tiny", "model", "tiny") and card.created_at.year > 2000
    assert client.models.retrieve("tiny") == card
