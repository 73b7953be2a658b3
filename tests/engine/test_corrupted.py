"""A request whose logits are not finite, or to which no token is allowed, ends alone, with a typed error: others say
what they say without it, and nobody finds its keys, values or states."""

from array import array
from contextlib import contextmanager

import mtp_oracle
import pytest
import torch
from checkpoints import CPU, Shape
from hash_device import POISON
from lab import TOLERANCE, Lab
from scenarios import text
from schedules import Bench, Setting
from test_loop import prompt_of, request

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.errors import CorruptedError, RequestError
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights

BROKEN = 299  # an id that no other prompt holds


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request, tmp_path_factory):
    """A random model with an MTP head."""
    shape = Shape(moe=request.param == "moe")
    made = mtp_oracle.write_checkpoint(tmp_path_factory.mktemp(request.param), shape, 5, rms_norm_eps=1e-3)
    model = Qwen3_5.empty(ModelConfig.from_directory(made.directory), torch.float32, CPU, mtp=True)
    load_weights(model, made.directory, progress=False)
    return model


@contextmanager
def broken_token(model: Qwen3_5, id: int, value: float = float("nan")):
    """An id whose embedding is not finite: whatever follows it is not, either."""
    weight = model.program[0].weight
    before = weight[id].clone()
    weight[id] = value
    try:
        yield
    finally:
        weight[id] = before


def prompt(seed: int, count: int = 40) -> list[int]:
    return [id for id in text(seed, count) if id != BROKEN]


def good_talks(lab: Lab) -> list:
    """Others in the same Steps: greedy, sampled, penalised, several, scored."""
    asked = [{"temperature": 0.0}, {"temperature": 1.0}, {"repetition_penalty": 1.3}, {"n": 2}, {"logprobs": 2}]
    bias = {"logit_bias": {BROKEN: -100.0}, "max_tokens": 12}
    return [lab.submit(prompt(i), seed=i, **bias | params) for i, params in enumerate(asked)]


ASKED = [{}, {"n": 2}, {"logprobs": 1}, {"prompt_logprobs": 1}, {"temperature": 0.0}]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_that_is_not_finite_ends_alone(model, drafts, value):
    settings = {"max_seqs": 16, "max_num_batched_tokens": 100, "slots": 48, "drafts": drafts}
    alone = Lab(model, **settings)
    expected = good_talks(alone)
    alone.run()
    lab = Lab(model, **settings)
    with broken_token(model, BROKEN, value):
        prompts = [[*prompt(20 + i), BROKEN, *prompt(30 + i)] for i in range(len(ASKED))]
        bad = [lab.submit(ids, [60], **asked) for ids, asked in zip(prompts, ASKED, strict=True)]
        bad.append(lab.submit([BROKEN]))
        found = good_talks(lab)
        lab.run()
    for talk in bad:
        assert set(talk.reasons.values()) == {"error"} and not any(talk.outputs)
        assert {type(error) for error in talk.errors} == {CorruptedError}
    assert lab.engine.corrupted == lab.engine.stats()["corrupted_requests"] == len(bad)
    assert [t.outputs for t in found] == [t.outputs for t in expected]
    lab.talks = found
    assert lab.difference() <= TOLERANCE
    for talk in bad[:2]:  # with the token repaired, the same prompts are answered as if they were new
        again = lab.ask(list(talk.request.prompt))
        assert again.reuse.kv_tokens == again.reuse.cached_tokens == 0
    assert lab.difference() <= TOLERANCE


@pytest.mark.parametrize("drafts", [0, 3])
def test_one_that_breaks_on_its_way_says_what_it_said_and_ends(model, drafts):
    lab = Lab(model, drafts=drafts, max_seqs=6)
    params = {"max_tokens": 30, "temperature": 1.0, "seed": 5}
    whole, others = lab.ask(prompt(1), **params).outputs[0], [lab.ask(prompt(i), seed=i) for i in (2, 3)]
    said = {id for talk in others for id in talk.history()} | set(prompt(1))
    at, id = next((i, id) for i, id in enumerate(whole) if i >= 8 and id not in said and id not in whole[:i])
    lab = Lab(model, drafts=drafts, max_seqs=6)
    with broken_token(model, id):
        talk, *found = [lab.submit(prompt(1), **params), *(lab.submit(prompt(i), seed=i) for i in (2, 3))]
        lab.run()
    # Ids that would have been verified beside the broken one are lost with it: attention weighs keys behind a row by
    # zero, and zero times NaN is NaN.
    ends = range(at + 1 - drafts, at + 2)
    assert talk.outputs[0] in [whole[:end] for end in ends] and talk.reasons == {0: "error"}
    assert [type(error) for error in talk.errors] == [CorruptedError]
    assert [t.outputs for t in found] == [t.outputs for t in others]
    again = lab.ask(talk.history(), max_tokens=2)
    assert again.reuse.kv_tokens <= len(talk.history()) - 1, "the token that broke it is not known"
    lab.talks.remove(talk)
    assert lab.difference() <= TOLERANCE


def test_a_prompt_that_breaks_in_its_first_chunk_publishes_none_of_its_chunks(model):
    lab = Lab(model, max_num_batched_tokens=64)
    long = prompt(4, 310)
    long[70] = BROKEN
    with broken_token(model, BROKEN):
        talk = lab.ask(long, [200])
    assert [type(error) for error in talk.errors] == [CorruptedError]
    assert lab.computed[talk.sequences[0].id][-1][1] < 300, "the rest of the prompt is not computed"
    assert lab.ask(long, []).reuse.kv_tokens <= 64


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [5, 6], "stop_token_ids": [5, 6], "min_tokens": 3},
        {"allowed_token_ids": [5], "logit_bias": {5: -100.0}, "bad_words": [" the"]},
        {"allowed_token_ids": [5, 6], "stop_token_ids": [5, 6], "min_tokens": 3, "n": 2, "logprobs": 1},
    ],
)
def test_where_no_token_is_allowed_the_request_is_wrong(model, drafts, params):
    lab = Lab(model, drafts=drafts)
    if "bad_words" in params:  # a word of one token
        word = lab.engine.tokenizer.decode([5])
        params = {"allowed_token_ids": [5], "bad_words": [word]}
    talk, other = lab.submit(prompt(1), **params), lab.submit(prompt(2))
    lab.run()
    assert set(talk.reasons.values()) == {"error"} and not any(talk.outputs)
    assert {type(error) for error in talk.errors} == {RequestError}
    assert "allowed_token_ids" in str(talk.errors[0]) and lab.engine.corrupted == 0
    assert other.reasons == {0: "length"} and lab.difference() <= TOLERANCE


def test_after_some_tokens_nothing_may_be_allowed_either(model):
    lab = Lab(model)
    tokenizer = lab.engine.tokenizer
    word = tokenizer.decode([5, 6])
    assert tokenizer.encode(word) == [5, 6]
    talk = lab.ask(
        prompt(1),
        allowed_token_ids=[5, 6],
        logit_bias={5: 100.0, 6: -100.0},
        bad_words=[tokenizer.decode([5, 5]), word],
    )
    assert talk.outputs[0] in ([5], []) and [type(error) for error in talk.errors] == [RequestError]


def test_what_the_device_consumed_behind_an_end_that_the_host_found_is_not_published():
    """A stop string ends it, one Step later than the device has consumed the token that is not finite."""
    bench = Bench(Setting())
    start = (*prompt_of(70), *POISON[:2])
    bench.submit(request("a", start, allowed_token_ids=POISON[2:], stop=["n"], max_tokens=9))
    bench.run()
    bench.check()
    assert bench.outcome("a").reason == "stop" and bench.outcome("a").ids == [POISON[2]]
    match = bench.cache.probe("", array("i", (*start, POISON[2], 1)))
    assert max(match.kv_tokens, match.state_tokens) <= len(start)
