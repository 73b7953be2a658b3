"""Generation: the shipped model against `transformers`, batches against single prompts, and refused requests."""

from array import array

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.errors import CapacityError, ConfigError, RequestError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams

QUESTIONS = ["Remember: The price of kelp is 551.", "What is 12 plus 30?", "Hello!", "Find the owner of onyx."]


@pytest.fixture(scope="module")
def llm():
    return LLM(progress=False)


def collect(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    out = [[] for _ in prompts]
    for prompt, update in llm.stream(prompts, params):
        out[prompt] += update.ids
    return out


def chats(llm: LLM) -> list[list[int]]:
    return [llm.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]


def test_greedy_text_of_the_shipped_model_is_that_of_transformers(llm):
    theirs = Qwen3_5MoeForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    history = []
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        prompt = llm.encode_chat(history)
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)[0, len(prompt) :]
        (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=48))[0].outputs
        assert output.token_ids == expected.tolist()
        assert output.text == tokenizer.decode(expected, skip_special_tokens=True)
        history.append({"role": "assistant", "content": "OK."})


def test_a_batch_gives_each_prompt_what_it_gets_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    alone = [collect(llm, [prompt], params)[0] for prompt in chats(llm)]
    assert collect(llm, chats(llm), params) == alone


def test_sampling_is_a_function_of_the_seed(llm):
    hot = {"temperature": 1.5, "max_tokens": 24, "ignore_eos": True}
    prompt = chats(llm)[0]
    first = collect(llm, [prompt], SamplingParams(seed=1, **hot))
    assert first == collect(llm, [prompt], SamplingParams(seed=1, **hot))
    assert first != collect(llm, [prompt], SamplingParams(seed=2, **hot))


def test_generation_ends_with_its_reason(llm):
    prompt = chats(llm)[0]
    greedy = {"temperature": 0}
    updates = [update for _, update in llm.stream([prompt], SamplingParams(max_tokens=3, **greedy))]
    assert [update.finish_reason for update in updates] == [None, None, "length"]
    whole = llm.generate([prompt], SamplingParams(max_tokens=160, **greedy))[0].outputs[0]
    assert whole.finish_reason == "stop" and whole.stop_reason is None
    assert whole.token_ids[-1] in llm.frontend.defaults.eos_ids
    params = SamplingParams(max_tokens=len(whole.token_ids) + 2, ignore_eos=True, **greedy)
    assert len(llm.generate([prompt], params)[0].outputs[0].token_ids) == len(whole.token_ids) + 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], ["empty"]),
        ([1, 2, 10**6], ["1000000", "position 2"]),
        ([-1], ["-1", "position 0"]),
        ([1] * 8190, ["8190", "8192", "YaRN"]),
    ],
)
def test_prompts_that_cannot_be_taken_are_refused_with_the_numbers(llm, prompt, expected):
    with pytest.raises(RequestError) as error:
        llm.generate([prompt], SamplingParams(max_tokens=8))
    for word in expected:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("max_tokens", 0),
        ("seed", -1),
    ],
)
def test_impossible_sampling_values_are_named(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("settings", [{"kv_pages": 10**9}, {"state_slots": 10**9}, {"gpu_memory_utilization": 1e-9}])
def test_more_memory_than_there_is_is_refused_with_the_sizes(settings):
    with pytest.raises(CapacityError, match="GiB"):
        LLM(progress=False, **settings)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="int3"):
        LLM(dtype="int3")


def test_streams_side_by_side_and_calls_inside_them_lose_nothing(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = {prompt: llm.generate(prompt, params, progress=False)[0].outputs[0].token_ids for prompt in ("one", "two")}
    said = {"one": [], "two": []}
    streams = {prompt: llm.stream([prompt], params) for prompt in said}
    for _ in range(3):
        said["one"] += next(streams["one"])[1].ids
    said["two"] += [id for _, update in streams["two"] for id in update.ids]  # runs the first one, too
    assert llm.generate("three", params, progress=False)[0].finished  # and so does this
    said["one"] += [id for _, update in streams["one"] for id in update.ids]
    assert said == alone
    assert not llm.engine.has_work


def test_a_stream_that_is_closed_leaves_the_other_alone(llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    expected = llm.generate("one", params, progress=False)[0].outputs[0].token_ids
    kept, closed = llm.stream(["one"], params), llm.stream(["two"], params)
    said = list(next(kept)[1].ids)
    next(closed)
    closed.close()
    said += [id for _, update in kept for id in update.ids]
    assert said == expected and not llm.engine.has_work


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        (b"abc", "bytes"),
        ([1.0, 2.0], "1.0"),
        (["1", "2"], "'1'"),
        (np.array([1.5, 2.5]), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_prompts_that_are_no_ids_are_refused_by_what_they_are(llm, prompt, word):
    with pytest.raises(RequestError) as error:
        llm.frontend.request("a", prompt, SamplingParams())
    assert word in str(error.value)


def test_ids_may_come_in_any_container_of_integers(llm):
    for prompt in ([5, 6], (5, 6), array("i", [5, 6]), np.array([5, 6]), torch.tensor([5, 6])):
        assert llm.frontend.request("a", prompt, SamplingParams()).prompt == (5, 6)
