"""Anthropic's own client, unchanged, against the shipped model."""

import anthropic
import httpx
import pytest

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


def test_a_marked_block_is_resumed_by_another_conversation(client):
    system = [{"type": "text", "text": "You know about kelp. " * 12, "cache_control": {"type": "ephemeral"}}]
    client.messages.create(system=system, messages=SUM, **COMMON)
    other = [{"role": "user", "content": "Hello!"}]
    answer = client.messages.create(system=system, messages=other, **COMMON)
    assert answer.usage.cache_read_input_tokens > 60


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [CALCULATOR], "tool_choice": {"type": "tool", "name": "other"}}, "other"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, changes, word):
    with pytest.raises(anthropic.BadRequestError, match=word):
        client.messages.create(**{"messages": SUM, **COMMON, **changes})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"thinking": {"type": []}}, "thinking: Value error, its type is []"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2**64}}, "budget_tokens is 18446744073709551616"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "budget_tokens is -1"),
        ({"tool_choice": {"type": {}}}, "tool_choice: Value error, its type is {}"),
        ({"tool_choice": {}}, "its type is None"),
    ],
)
def test_a_type_that_is_no_string_and_a_budget_without_end_are_refused(server, more, words):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | more
    answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=30)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
