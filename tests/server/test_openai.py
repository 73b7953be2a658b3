"""OpenAI's own client, unchanged, against the shipped model."""

import json

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.testclient import TestClient

from tokenspeed.engine.server.http import allow_origins

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Do arithmetic.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "op": {"type": "string"}, "b": {"type": "number"}},
        },
    },
}
GREEDY = {"model": "tiny", "temperature": 0}
KELP = [{"role": "user", "content": "Remember: The price of kelp is 551."}]
JSON = {"content-type": "application/json"}
SUM = [{"role": "user", "content": "What is 12 plus 30?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_chat_answers_and_counts(client):
    answer = client.chat.completions.create(messages=KELP, **GREEDY)
    assert answer.choices[0].message.content == "OK."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_the_usage_says_how_drafts_fared_and_metrics_add_it_up(client, server):
    def counters():
        found = {}
        for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(("tokenspeed_draft", "tokenspeed_accepted")):
                found[name] = float(value)
        return found

    def told(usage):
        details = usage.completion_tokens_details
        return details.accepted_prediction_tokens, details.rejected_prediction_tokens

    before, usages = counters(), []
    usages.append(client.chat.completions.create(messages=SUM, **GREEDY).usage)
    usages.append(client.chat.completions.create(messages=SUM, tools=[CALCULATOR], **GREEDY).usage)
    for chunk in client.chat.completions.create(
        messages=KELP, stream=True, stream_options={"include_usage": True}, **GREEDY
    ):
        usages += [chunk.usage] if chunk.usage else []
    usages.append(client.completions.create(prompt=["The price of", "What is"], n=2, **GREEDY).usage)
    after = counters()
    gone = {name: after[name] - before.get(name, 0) for name in after}
    accepted, rejected = (sum(counts) for counts in zip(*map(told, usages), strict=True))
    assert all(sum(told(usage)) > 0 for usage in usages), "a chat without tools is drafted for, too"
    assert told(usages[1])[0] > told(usages[1])[1], "calls are easy to foresee"
    by_place = {
        name: [gone[f'tokenspeed_{name}_tokens_total{{position="{place}"}}'] for place in (1, 2, 3)]
        for name in ("drafted", "accepted")
    }
    assert sum(by_place["accepted"]) == accepted and sum(by_place["drafted"]) == accepted + rejected
    assert by_place["drafted"] == sorted(by_place["drafted"], reverse=True)
    assert by_place["accepted"] == sorted(by_place["accepted"], reverse=True)
    steps = gone["tokenspeed_draft_steps_total"]
    assert steps == by_place["drafted"][0]
    assert gone["tokenspeed_draft_step_tokens_total"] <= steps + accepted, "an end may cut what was accepted"


def test_the_stream_joined_is_the_whole_answer(client):
    whole = client.chat.completions.create(messages=SUM, tools=[CALCULATOR], **GREEDY).choices[0]
    text, name, arguments, finish, usage = "", "", "", None, None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(
        messages=SUM, tools=[CALCULATOR], stream=True, stream_options=options, **GREEDY
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    function = whole.message.tool_calls[0].function
    assert (text, finish) == (whole.message.content or "", whole.finish_reason) == ("", "tool_calls")
    assert (name, arguments) == (function.name, function.arguments)
    assert json.loads(arguments) == {"a": 12, "op": "+", "b": 30}
    assert usage.completion_tokens > 10


def test_a_tool_round_trip_resumes_at_the_end_of_the_call(client):
    messages = list(SUM)
    first = client.chat.completions.create(messages=messages, tools=[CALCULATOR], **GREEDY)
    message = first.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"})
    second = client.chat.completions.create(messages=messages, tools=[CALCULATOR], **GREEDY)
    assert "42" in second.choices[0].message.content
    consumed = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last id is chosen, not consumed
    assert second.usage.prompt_tokens_details.cached_tokens >= consumed


def test_n_continuations_share_one_prefill_and_differ(client):
    answer = client.chat.completions.create(model="tiny", messages=SUM, n=4, temperature=6, seed=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content or choice.message.reasoning_content for choice in answer.choices}) > 1
    again = client.chat.completions.create(model="tiny", messages=SUM, n=4, temperature=6, seed=3, max_tokens=12)
    assert [c.message for c in again.choices] == [c.message for c in answer.choices]


def test_structured_output_is_valid_whatever_the_model_would_say(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 2, 3]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny",
            messages=KELP,
            response_format=form,
            temperature=1,
            seed=seed,
            max_tokens=400,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content)
        assert found.keys() == {"name", "size"} and found["size"] in (1, 2, 3) and len(found["name"]) <= 8


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calc"}}])
def test_a_call_that_is_demanded_comes(client, choice):
    answer = client.chat.completions.create(
        messages=KELP, tools=[CALCULATOR], tool_choice=choice, max_tokens=300, **GREEDY
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "calc"


def test_no_call_comes_where_none_is_wanted(client):
    answer = client.chat.completions.create(
        messages=SUM, tools=[CALCULATOR], tool_choice="none", max_tokens=30, **GREEDY
    )
    assert answer.choices[0].message.tool_calls is None
    assert "<tool_call>" not in (answer.choices[0].message.content or "")


def test_logprobs_of_chat(client):
    answer = client.chat.completions.create(messages=KELP, logprobs=True, top_logprobs=3, **GREEDY)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_completions_with_echo_and_logprobs(client):
    answer = client.completions.create(prompt="The price of kelp", echo=True, logprobs=2, max_tokens=4, **GREEDY)
    choice = answer.choices[0]
    assert choice.text.startswith("The price of kelp")
    tokens = choice.logprobs.tokens
    assert (
        len(tokens)
        == answer.usage.prompt_tokens + answer.usage.completion_tokens
        == len(choice.logprobs.token_logprobs)
    )
    assert choice.logprobs.token_logprobs[0] is None and "".join(tokens).startswith(choice.text[:10])


def test_completions_of_several_prompts_and_their_stream(client):
    prompts = ["The price of", "Hello"]
    whole = client.completions.create(prompt=prompts, max_tokens=5, **GREEDY)
    texts = ["", ""]
    for chunk in client.completions.create(prompt=prompts, max_tokens=5, stream=True, **GREEDY):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_stop_strings_bias_and_token_ids(client):
    plain = client.chat.completions.create(messages=KELP, extra_body={"return_token_ids": True}, **GREEDY)
    ids = plain.choices[0].token_ids
    assert len(ids) == plain.usage.completion_tokens and len(plain.prompt_token_ids) == plain.usage.prompt_tokens
    stopped = client.chat.completions.create(messages=KELP, stop=["K."], **GREEDY)
    assert stopped.choices[0].message.content == "O" and stopped.choices[0].stop_reason == "K."
    banned = client.chat.completions.create(
        messages=KELP, logit_bias={str(ids[-2]): -100}, max_tokens=20, extra_body={"return_token_ids": True}, **GREEDY
    )
    assert ids[-2] not in banned.choices[0].token_ids


def test_a_final_message_is_continued(client):
    answered = {"role": "assistant", "content": "OK."}
    query = {"role": "user", "content": "What is the price of kelp?"}
    messages = [*KELP, answered, query, {"role": "assistant", "content": "The price of kelp"}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(messages=messages, extra_body=body, max_tokens=20, **GREEDY)
    assert answer.choices[0].message.content == " is 551."


def test_thinking_can_be_turned_off(client):
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = client.chat.completions.create(messages=KELP, extra_body=body, **GREEDY)
    assert answer.choices[0].message.content == "OK."
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "wizard", "content": "x"}]}, ["wizard"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["image"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"n": 1000}, ["n", "1000"]),
        ({"logprobs": True, "top_logprobs": 99}, ["top_logprobs", "99"]),
        ({"stop": ["x"] * 99}, ["stop", "64"]),
        ({"stop": ""}, ["stop", "1 character"]),
        ({"max_tokens": 0}, ["max_tokens", "1"]),
        ({"extra_body": {"guided_grammar": "x"}}, ["guided_grammar"]),
        ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, ["structured_outputs", "grammar"]),
        ({"extra_body": {"use_beam_search": True}}, ["use_beam_search"]),
        ({"functions": [{"name": "f"}]}, ["functions"]),
        ({"tool_choice": "sometimes", "tools": [CALCULATOR]}, ["sometimes"]),
        ({"max_tokens": 100000}, ["100000", "8192"]),
        ({"extra_body": {"chat_template_kwargs": {"evil": True}}}, ["evil"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, []),
        ({"tool_choice": "required"}, ["required"]),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, changes, expected):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"messages": KELP, **GREEDY, **changes})
    for text in expected:
        assert text in str(error.value)


def test_a_prompt_that_does_not_fit_is_told_in_openais_words(client):
    for changes in ({"max_tokens": 8192}, {"messages": [{"role": "user", "content": "kelp " * 9000}]}):
        with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 8192 tokens") as error:
            client.chat.completions.create(**{"messages": KELP, **GREEDY, **changes})
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 8192 tokens"):
        client.completions.create(prompt="kelp", max_tokens=8192, **GREEDY)


def test_a_body_that_is_no_json_is_told_as_that(server):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b'{"messages": [', headers=JSON)
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]


def test_null_is_the_default_wherever_the_clients_types_allow_it(server):
    names = ["max_tokens", "n", "stream", "stop", "seed", "temperature", "tools", "tool_choice", "parallel_tool_calls"]
    names += ["logprobs", "top_logprobs", "response_format", "stream_options", "logit_bias", "priority", "functions"]
    body = {"messages": KELP, **GREEDY} | dict.fromkeys(names) | {"stream_options": {"include_usage": None}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"temperature": 0}, timeout=60)
    assert answer.json()["choices"][0]["message"]["content"] == "OK."


def test_a_negative_seed_is_a_seed(client):
    texts = {
        client.chat.completions.create(model="tiny", messages=SUM, temperature=6, seed=seed, max_tokens=12)
        .choices[0]
        .message.model_dump_json()
        for seed in (-1, -1, -1)
    }
    assert len(texts) == 1


def test_developer_late_and_several_systems_null_content_and_cut_arguments_are_taken(client):
    call = {"id": "1", "type": "function", "function": {"name": "calc", "arguments": '{"a": 12, "op": "'}}
    messages = [
        {"role": "developer", "content": "You are a helpful agent."},
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *SUM,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "system", "content": "The code of cedar is 8214."},
        {"role": "user", "content": "What is the code of cedar?"},
    ]
    answer = client.chat.completions.create(messages=messages, tools=[CALCULATOR], max_tokens=40, **GREEDY)
    merged = [{"role": "system", "content": "You are a helpful agent.\n\nBe brief.\n\nThe code of cedar is 8214."}]
    call = {**call, "function": {"name": "calc", "arguments": {"a": 12, "op": ""}}}
    merged += [*SUM, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": ""}]
    again = client.chat.completions.create(
        messages=[*merged, messages[-1]], tools=[CALCULATOR], max_tokens=40, **GREEDY
    )
    assert answer.usage.prompt_tokens == again.usage.prompt_tokens
    assert answer.choices[0].message.content == again.choices[0].message.content


def test_a_last_assistant_message_is_gone_on_with(client):
    messages = [
        *KELP,
        {"role": "assistant", "content": "OK."},
        {"role": "user", "content": "What is the price of kelp?"},
    ]
    messages.append({"role": "assistant", "content": "The price of kelp"})
    for tools in ([CALCULATOR], openai.omit):
        answer = client.chat.completions.create(messages=messages, tools=tools, max_tokens=20, **GREEDY)
        assert answer.choices[0].message.content == " is 551."
    body = {"add_generation_prompt": True}
    new = client.chat.completions.create(messages=messages, extra_body=body, max_tokens=20, **GREEDY)
    assert new.usage.prompt_tokens > answer.usage.prompt_tokens


def test_stop_strings_count_after_the_reasoning_only(client):
    question = [{"role": "user", "content": "What is the stock of maple times 7?"}]
    lookup = {"name": "lookup", "description": "Look up a value."}
    strings = {name: {"type": "string"} for name in ("name", "field")}
    lookup["parameters"] = {"type": "object", "properties": strings}
    asked = {"messages": question, "tools": [CALCULATOR, {"type": "function", "function": lookup}], **GREEDY}
    free = client.chat.completions.create(**asked).choices[0]
    assert "stock" in free.message.reasoning_content and free.finish_reason == "tool_calls"
    for stop in ("stock of", "First"):
        bound = client.chat.completions.create(stop=[stop], **asked).choices[0]
        assert bound.message.reasoning_content == free.message.reasoning_content
        assert bound.finish_reason == "tool_calls"


def test_structured_outputs_by_vllms_names_and_a_schema_of_a_json_object(client):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    for body in (
        {"structured_outputs": {"json": schema}},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
    ):
        answer = client.chat.completions.create(messages=KELP, extra_body=body | off, **GREEDY)
        assert json.loads(answer.choices[0].message.content) == {"n": 7}
    body = {"structured_outputs": {"choice": ["yes", "no"]}, "enable_thinking": False}
    assert (
        client.chat.completions.create(messages=KELP, extra_body=body, **GREEDY).choices[0].message.content in "yes no"
    )
    body = {"response_format": {"type": "json_object", "schema": schema}, "enable_thinking": False}
    answer = client.chat.completions.create(messages=KELP, extra_body=body, **GREEDY)
    assert json.loads(answer.choices[0].message.content) == {"n": 7}
    answer = client.completions.create(prompt="a", extra_body={"guided_regex": "[xy]{3}"}, **GREEDY)
    assert len(answer.choices[0].text) == 3 and set(answer.choices[0].text) <= {"x", "y"}


def test_unknown_formats_of_a_schema_are_annotations(client):
    field = {"type": "string", "format": "nickname", "maxLength": 5}
    schema = {"type": "object", "properties": {"format": field}, "required": ["format"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"enable_thinking": False}
    answer = client.chat.completions.create(messages=KELP, response_format=form, extra_body=body, **GREEDY)
    assert json.loads(answer.choices[0].message.content).keys() == {"format"}
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    client.chat.completions.create(messages=KELP, tools=[strict], max_tokens=5, **GREEDY)


def test_with_tools_and_a_format_a_turn_is_a_call_or_has_the_format(client):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = {"response_format": form, "tools": [CALCULATOR], "max_tokens": 300, **GREEDY}
    called = client.chat.completions.create(messages=SUM, **asked).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None
    turn = {"role": "assistant", "content": "", "tool_calls": [c.model_dump() for c in called.message.tool_calls]}
    told = [*SUM, turn, {"role": "tool", "content": "42", "tool_call_id": called.message.tool_calls[0].id}]
    biased = client.chat.completions.create(messages=told, **asked).choices[0]
    assert biased.finish_reason == "tool_calls" or json.loads(biased.message.content) == {"n": 7}
    plain = client.chat.completions.create(messages=KELP, tool_choice="none", **asked).choices[0]
    assert json.loads(plain.message.content) == {"n": 7}
    demanded = client.chat.completions.create(messages=KELP, tool_choice="required", **asked).choices[0]
    assert demanded.finish_reason == "tool_calls"


def test_one_call_at_most_where_parallel_calls_are_off(client):
    two = [{"role": "user", "content": "What is 12 plus 30? What is 3 plus 4?"}]
    for choice in ("auto", "required"):
        answer = client.chat.completions.create(
            messages=two, tools=[CALCULATOR], tool_choice=choice, parallel_tool_calls=False, max_tokens=400, **GREEDY
        )
        assert len(answer.choices[0].message.tool_calls or []) <= 1


def test_text_offsets_and_echoed_logprobs_of_a_stream_are_those_of_the_whole(client):
    for echo in (False, True):
        asked = {"prompt": "The price of kelp", "logprobs": 1, "max_tokens": 6, "n": 2, "echo": echo, "seed": 1}
        whole = client.completions.create(**asked, model="tiny")
        found = [{"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []} for _ in range(2)]
        for chunk in client.completions.create(**asked, model="tiny", stream=True):
            for choice in chunk.choices:
                for name, values in found[choice.index].items():
                    values += getattr(choice.logprobs, name) if choice.logprobs else []
        assert found == [choice.logprobs.model_dump(include=set(found[0])) for choice in whole.choices]
        offsets = whole.choices[0].logprobs.text_offset
        assert offsets[0] == 0 and offsets == sorted(offsets)


def test_a_completion_s_first_chunk_brings_what_is_asked_of_its_prompt(client):
    asked = {"prompt": ["One", "The price of"], "max_tokens": 3, "seed": 1, "model": "tiny"}
    more = {"prompt_logprobs": 1, "return_token_ids": True}
    whole = client.completions.create(**asked, extra_body=more)
    told: dict[int, list] = {0: [], 1: []}
    for chunk in client.completions.create(**asked, extra_body=more, stream=True):
        for choice in chunk.choices:
            told[choice.index].append(choice)
    for choice in whole.choices:
        first, *others = told[choice.index]
        assert first.prompt_token_ids == choice.prompt_token_ids
        assert [one and one.keys() for one in first.prompt_logprobs] == [
            one and one.keys() for one in choice.prompt_logprobs
        ]
        assert others and not any(hasattr(other, "prompt_token_ids") for other in others)


def test_no_tokens_give_the_scores_of_the_prompt(client):
    answer = client.completions.create(prompt="The price", echo=True, logprobs=0, max_tokens=0, **GREEDY)
    assert answer.choices[0].text == "The price" and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(prompt="a", suffix="b", **GREEDY)


def test_models_have_cards_and_head_is_answered(client, server):
    [card] = client.models.list().data
    assert card.id == "tiny" and card.created > 0 and client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError, match="nothing/here"):
        client.models.retrieve("nothing/here")
    with httpx.Client(base_url=server.url) as one:  # one connection: a body would be taken for the next answer
        for path in ("/", "/v1/models", "/health"):
            answer = one.head(path)
            assert answer.status_code == 200 and not answer.content
        assert one.head("/nowhere").status_code == 404


def test_pages_of_other_origins_are_let_in_only_when_named(server):
    origin = {"origin": "https://example.com", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/v1/models", headers=origin).headers

    async def app(scope, receive, send):
        await PlainTextResponse("ok")(scope, receive, send)

    site = Starlette(routes=[Mount("/", app)])
    allow_origins(site, ("https://example.com",))
    with TestClient(site) as browser:
        headers = browser.options("/", headers=origin).headers
        assert headers["access-control-allow-origin"] == "https://example.com"
        other = browser.get("/", headers={"origin": "https://elsewhere.com"}).headers
        assert "access-control-allow-origin" not in other
