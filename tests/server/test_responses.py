"""OpenAI's responses through its own client, against the shipped model."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.server.response_items import Tools, as_messages, sealed
from tokenspeed.engine.server.response_store import ResponseStore, StoredResponse, UnknownResponse

CALCULATOR = {
    "type": "function",
    "name": "calc",
    "description": "Do arithmetic.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "op": {"type": "string"}, "b": {"type": "number"}},
    },
}
GREEDY = {"model": "tiny", "temperature": 0}
KELP = "Remember: The price of kelp is 551."


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_sampling_and_the_cache_are_asked_for_by_vllms_names(client):
    found = client.responses.create(input=KELP, extra_body={"stop": "K."}, **GREEDY)
    assert found.output_text == "O"
    hot = {"input": KELP, "model": "tiny", "temperature": 6, "max_output_tokens": 12}
    outputs = [client.responses.create(extra_body=body, **hot).output for body in ({"seed": -3}, {"seed": -3})]
    said = [[[part.text for part in item.content] for item in output] for output in outputs]
    assert said[0] == said[1] and said[0]
    one = client.responses.create(extra_body={"top_k": 1}, **hot)
    assert one.output_text == "OK."
    full = client.responses.create(extra_body={"ignore_eos": True}, **hot)
    assert full.usage.output_tokens == 12 and full.status == "incomplete"
    formed = {"structured_outputs": {"regex": "[xy]{3}"}}
    assert (
        len(client.responses.create(input=KELP, extra_body=formed, reasoning={"effort": "none"}, **GREEDY).output_text)
        == 3
    )
    with pytest.raises(openai.BadRequestError, match="999999"):
        client.responses.create(input=KELP, extra_body={"logit_bias": {"999999": 1}}, **GREEDY)
    said = "Remember: The code of cedar is 8214."
    for salt, known in (("a", False), ("a", True), ("b", False)):
        found = client.responses.create(input=said, extra_body={"cache_salt": salt, "priority": 1}, **GREEDY)
        assert bool(found.usage.input_tokens_details.cached_tokens) == known


def test_a_response_answers_and_counts(client):
    found = client.responses.create(input=KELP, **GREEDY)
    assert found.output_text == "OK." and found.status == "completed"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert 0 < found.usage.output_tokens_details.reasoning_tokens < found.usage.output_tokens
    chat = client.chat.completions.create(messages=[{"role": "user", "content": KELP}], **GREEDY)
    assert chat.usage.prompt_tokens == found.usage.input_tokens, "the same prompt through both APIs"


def test_a_conversation_goes_on_from_a_response_that_is_remembered(client):
    first = client.responses.create(input=KELP, instructions="You are a helpful agent.", **GREEDY)
    query = "What is the price of kelp?"
    second = client.responses.create(input=query, previous_response_id=first.id, **GREEDY)
    assert second.output_text == "The price of kelp is 551." and second.previous_response_id == first.id
    again = client.responses.retrieve(second.id)
    assert again.output_text == second.output_text
    items = [{"role": "user", "content": KELP}, *first.output, {"role": "user", "content": query}]
    whole = client.responses.create(input=[i if isinstance(i, dict) else i.model_dump() for i in items], **GREEDY)
    assert whole.usage.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    for unknown in (first.id, "resp_nowhere"):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(input=query, previous_response_id=unknown, **GREEDY)
        assert error.value.code == "previous_response_not_found" and unknown in str(error.value)
    unkept = client.responses.create(input=KELP, store=False, **GREEDY)
    with pytest.raises(openai.BadRequestError, match=unkept.id):
        client.responses.create(input=query, previous_response_id=unkept.id, **GREEDY)


def test_a_tool_loop_by_items_and_by_previous_response(client):
    question = [{"role": "user", "content": "What is 12 plus 30?"}]
    first = client.responses.create(input=question, tools=[CALCULATOR], **GREEDY)
    call = first.output[-1]
    assert call.type == "function_call" and call.name == "calc" and call.status == "completed"
    assert json.loads(call.arguments) == {"a": 12, "op": "+", "b": 30}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    second = client.responses.create(input=[result], previous_response_id=first.id, tools=[CALCULATOR], **GREEDY)
    assert "42" in second.output_text
    consumed = first.usage.total_tokens - 1  # the last id is chosen, not consumed
    assert second.usage.input_tokens_details.cached_tokens >= consumed
    by_items = [*question, *(item.model_dump() for item in first.output), result]
    whole = client.responses.create(input=by_items, tools=[CALCULATOR], **GREEDY)
    assert whole.output_text == second.output_text and whole.usage.input_tokens == second.usage.input_tokens
    referred = [*question, {"type": "item_reference", "id": call.id}, result]
    assert "42" in client.responses.create(input=referred, tools=[CALCULATOR], **GREEDY).output_text


def test_the_stream_tells_of_every_item_and_ends_with_the_response(client):
    events = list(client.responses.create(input="What is 12 plus 30?", tools=[CALCULATOR], stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == events[-1].response.output and done[-1].arguments == arguments
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == list(range(len(done)))
    with client.responses.stream(input=KELP, **GREEDY) as stream:  # the SDK's own assembly of the events
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "OK."


PRICE = {"type": "object", "properties": {"é": {"enum": [551]}}, "required": ["é"], "additionalProperties": False}
INCLUDED = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        (KELP, {}),
        (KELP, {"reasoning": {"effort": "none"}}),
        (KELP, {"tools": [CALCULATOR]}),
        (KELP, {"text": {"format": {"type": "json_schema", "name": "price", "schema": PRICE}}}),
        ("What is the price of kelp?", {"extra_body": {"stop": " of"}}),
    ],
)
def test_the_text_comes_with_the_logprobs_of_its_tokens(client, asked, more):
    found = client.responses.create(input=asked, **INCLUDED, **more, **GREEDY)
    part = found.output[-1].content[0]
    assert bytes(byte for entry in part.logprobs for byte in entry.bytes).decode().strip().startswith(part.text)
    assert found.top_logprobs == 2
    for entry in part.logprobs:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token and len(entry.top_logprobs) == 2
        assert "text" in more or entry.logprob == entry.top_logprobs[0].logprob <= 0, (
            "before a format's mask, as in chat"
        )
    for item in found.output[:-1]:
        assert item.type == "reasoning" and not hasattr(item.content[0], "logprobs")
    with client.responses.stream(input=asked, **INCLUDED, **more, **GREEDY) as stream:
        events = list(stream)
        streamed = stream.get_final_response().output[-1].content[0]
    kept = [entry.model_dump() for entry in part.logprobs]
    assert [(e["token"], e["logprob"]) for e in kept] == [
        (e.token, pytest.approx(e.logprob, abs=1e-4)) for e in streamed.logprobs
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    [done] = [event for event in events if event.type == "response.output_text.done"]
    parts = [event.part for event in events if event.type == "response.content_part.done"]
    by_delta = [entry.model_dump() for event in deltas for entry in event.logprobs]
    ended = [entry.model_dump() for entry in done.logprobs]
    assert (
        by_delta == ended == [entry.model_dump() for entry in streamed.logprobs] == parts[-1].model_dump()["logprobs"]
    )
    for event in deltas:
        said = bytes(byte for entry in event.logprobs for byte in entry.bytes).decode()
        assert event.delta.strip() in said or said.strip() in event.delta, "each delta has its own tokens"


def test_logprobs_are_those_of_chat_and_the_chosen_token_alone_comes_without_alternatives(client):
    chat = client.chat.completions.create(
        messages=[{"role": "user", "content": KELP}], logprobs=True, top_logprobs=2, **GREEDY
    )
    found = client.responses.create(input=KELP, **INCLUDED, **GREEDY)
    part = found.output[-1].content[0]
    told = [entry.model_dump() for entry in chat.choices[0].logprobs.content]
    names = [entry["token"] for entry in told]
    text = told[names.index("</think>") :]
    own = [entry.model_dump() for entry in part.logprobs]
    places = [i for i in range(len(text)) if [e["token"] for e in text[i : i + len(own)]] == [e["token"] for e in own]]
    assert len(places) == 1
    for one, other in zip(own, text[places[0] :], strict=False):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4) and one["bytes"] == other["bytes"]
    bare = client.responses.create(input=KELP, include=INCLUDED["include"], **GREEDY)
    entries = bare.output[-1].content[0].logprobs
    assert [entry.token for entry in entries] == [entry["token"] for entry in own]
    assert all(entry.top_logprobs == [] for entry in entries) and bare.top_logprobs == 0
    plain = client.responses.create(input=KELP, **GREEDY)
    assert plain.output[-1].content[0].logprobs == [] and plain.top_logprobs == 0
    calling = client.responses.create(input="What is 12 plus 30?", tools=[CALCULATOR], **INCLUDED, **GREEDY)
    assert calling.output[-1].type == "function_call" and "logprobs" not in calling.output[-1].model_dump()
    items = [{"role": "user", "content": KELP}, *(item.model_dump() for item in found.output)]
    again = client.responses.create(input=[*items, {"role": "user", "content": "What is it?"}], **GREEDY)
    by_id = client.responses.create(input="What is it?", previous_response_id=found.id, **GREEDY)
    assert again.usage.input_tokens == by_id.usage.input_tokens, "they come back without a meaning"
    kept = client.responses.retrieve(found.id)
    assert kept.output[-1].content[0].logprobs == [] and kept.output_text == found.output_text


class Thing(BaseModel):
    size: int
    tags: list[bool]


def test_a_format_is_kept(client):
    found = client.responses.parse(input=KELP, text_format=Thing, temperature=1, model="tiny", max_output_tokens=400)
    assert isinstance(found.output_parsed, Thing)


def test_a_response_that_is_cut_is_incomplete(client):
    found = client.responses.create(input="What is 12 plus 30?", tools=[CALCULATOR], max_output_tokens=22, **GREEDY)
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    cut = found.output[-1]
    assert cut.type == "function_call" and cut.status == "incomplete"
    items = [{"role": "user", "content": "What is 12 plus 30?"}, *(item.model_dump() for item in found.output)]
    client.responses.create(input=[*items, {"role": "user", "content": "Hello!"}], tools=[CALCULATOR], **GREEDY)


def test_reasoning_comes_back_in_the_field_for_clients_without_a_store(client):
    body = {"reasoning": {"effort": "high"}, "include": ["reasoning.encrypted_content"], "store": False}
    found = client.responses.create(input="What is the stock of maple times 7?", tools=[CALCULATOR], **body, **GREEDY)
    for item in found.output:
        if item.type == "reasoning":
            assert item.encrypted_content == sealed(item.content[0].text)


def test_items_become_the_messages_they_mean():
    given = [
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed("hm")},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "input": 'a "b"'},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "y"},
        {"type": "message", "role": "assistant", "content": None},
        {"type": "item_reference", "id": "msg_1"},
    ]
    referred = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    found = as_messages(given, lambda id: referred)
    assert [message["role"] for message in found] == ["developer", "assistant", "tool", "tool", "assistant"]
    assert found[0]["content"] == "ab" and found[1]["reasoning_content"] == "hm" and found[1]["content"] == "So"
    assert [call["function"]["name"] for call in found[1]["tool_calls"]] == ["f", "patch"]
    assert json.loads(found[1]["tool_calls"][1]["function"]["arguments"]) == {"input": 'a "b"'}
    assert found[4]["content"] == "no"
    for bad in ({"type": "image_generation_call"}, {"role": "user", "content": [{"type": "input_image"}]}, "x"):
        with pytest.raises(RequestError, match=r"input\[0\]"):
            as_messages([bad], lambda id: referred)


def test_reasoning_that_comes_as_its_id_alone_is_what_is_remembered_of_it():
    store = ResponseStore()
    kept = {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "hm"}]}
    store.put("a", "resp_1", StoredResponse([], {"output": [kept]}))
    call = {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}"}
    for id, name_space, thought in (("rs_1", "a", "hm"), ("rs_1", "b", ""), ("rs_2", "a", ""), (None, "a", "")):
        bare = {"type": "reasoning", "id": id, "summary": [], "content": [], "status": "in_progress"}
        [message] = as_messages([bare, call, bare], lambda id, space=name_space: store.item(space, id))[:1]
        assert message["reasoning_content"] == thought and message["tool_calls"][0]["id"] == "1"


def test_a_custom_tool_is_a_function_of_one_text():
    tools = Tools([{"type": "custom", "name": "patch", "format": {"type": "grammar", "definition": "start: x"}}])
    assert "start: x" in json.dumps(tools.definitions)
    assert tools.call_item("patch")["type"] == "custom_tool_call" and tools.custom_input('{"input": "a"}') == "a"
    assert Tools([{"type": "web_search_preview"}]).definitions == []
    with pytest.raises(RequestError, match="file_search"):
        Tools([{"type": "file_search"}])


def test_the_memory_of_responses_is_bounded():
    store = ResponseStore(max_bytes=3000)
    for i in range(100):
        frame = {"output": [{"id": f"item{i}", "text": "x" * 50}]}
        store.put("", f"r{i}", StoredResponse([{"role": "user", "content": "x" * 300}], frame))
    assert store.get("", "r99").messages and store.item("", "item99")
    for unknown in ("r0", "r50"):
        with pytest.raises(UnknownResponse, match=unknown):
            store.get("", unknown)
    with pytest.raises(UnknownResponse):
        store.get("another key", "r99")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"top_logprobs": 3}, "top_logprobs needs 'message.output_text.logprobs' in include; include is []."),
        ({"top_logprobs": 3, "include": ["reasoning.encrypted_content"]}, "include is ['reasoning.encrypted_content']"),
        (INCLUDED | {"top_logprobs": 21}, "less than or equal to 20"),
        (INCLUDED | {"top_logprobs": 21}, "21"),
        (INCLUDED | {"top_logprobs": -1}, "greater than or equal to 0"),
        ({"tools": [{"type": "computer"}]}, "computer"),
        ({"tool_choice": {"type": "hosted"}}, "hosted"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "msg_x"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
        ({"max_output_tokens": 100000}, "maximum context length is 8192"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(server, changes, expected):
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "Hello!", "model": "tiny"} | changes)
    assert answer.status_code == 400 and expected in answer.json()["error"]["message"]
