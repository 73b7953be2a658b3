"""OpenAI's own client, unchanged, against the shipped model."""

import json

import httpx
import openai
import pytest

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
    assert second.usage.prompt_tokens_details.cached_tokens == consumed


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
    ("changes", "words"),
    [
        ({"messages": []}, ["messages"]),
        ({"messages": [{"role": "wizard", "content": "x"}]}, ["wizard"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ["image"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"n": 1000}, ["n", "1000"]),
        ({"logprobs": True, "top_logprobs": 99}, ["top_logprobs", "99"]),
        ({"stop": ["x"] * 99}, ["stop"]),
        ({"max_tokens": 100000}, ["100000", "8192"]),
        ({"extra_body": {"chat_template_kwargs": {"evil": True}}}, ["evil"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, []),
        ({"tool_choice": "required"}, ["required"]),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, changes, words):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"messages": KELP, **GREEDY, **changes})
    for word in words:
        assert word in str(error.value)
