"""Several tokens a step change no text: whatever is drafted, ids, logits and what the cache keeps are those of one
token a step. Drafts are those of an MTP head or looked up; random models draft wrongly, the shipped one well."""

import functools
from random import Random

import mtp_oracle
import pytest
import torch
from checkpoints import CPU, Shape
from lab import TOLERANCE, Lab, shipped_tokenizer
from lives import live
from scenarios import SCENARIOS, text

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.text.grammar import json_object, json_schema, regex


def load(directory, mtp: bool = True) -> Qwen3_5:
    model = Qwen3_5.empty(ModelConfig.from_directory(directory), torch.float32, CPU, mtp=mtp)
    load_weights(model, directory, progress=False)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directories: a dense and a MoE model with a random head, and the shipped one."""
    made = {"shipped": SHIPPED}
    for name, shape in {"dense": Shape(), "moe": Shape(moe=True)}.items():
        # Norms that never divide by nearly nothing keep rounding far below the tolerance.
        made[name] = mtp_oracle.write_checkpoint(tmp_path_factory.mktemp(name), shape, 5, rms_norm_eps=1e-3).directory
    return made


@pytest.fixture(scope="module")
def models(checkpoints):
    return {name: load(directory) for name, directory in checkpoints.items()}


ASKED = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "seed": 3},
    "cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4},
    "several": {"temperature": 1.0, "n": 3, "seed": 5},
    "presence": {"temperature": 0.7, "presence_penalty": 1.0, "seed": 6},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.8},
    "repetition": {"temperature": 0.9, "repetition_penalty": 1.3, "seed": 7},
    "biased": {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0}, "seed": 8},
    "allowed": {"temperature": 1.0, "allowed_token_ids": list(range(40, 90)), "seed": 9},
    "late end": {"temperature": 1.0, "min_tokens": 23, "stop_token_ids": list(range(0, 300, 7)), "seed": 10},
    "end": {"temperature": 1.0, "stop_token_ids": list(range(0, 300, 9)), "seed": 11},
    "more ends than the device knows": {"temperature": 1.0, "stop_token_ids": list(range(1, 300, 5)), "seed": 12},
    "scored": {"temperature": 1.0, "logprobs": 2, "prompt_logprobs": 1, "seed": 13},
    "words": {"temperature": 1.0, "bad_words": ["the", "is", "call"], "seed": 14},
    "text": {"temperature": 1.0, "stop": ["e", "12"], "include_stop_str_in_output": True, "seed": 15},
}


def prompt_of(name: str) -> list[int]:
    if name == "shipped":
        return shipped_tokenizer().encode("<|im_start|>user\nWhat is 12 plus 30?<|im_end|>\n<|im_start|>assistant\n")
    return text(5, 70)


def answers(model: Qwen3_5, name: str, **settings) -> tuple[list, Lab]:
    """Everything that is said to every request of ASKED, all of them at once."""
    lab, said = Lab(model, max_seqs=6, pages=96, slots=24, **settings), []
    for params in ASKED.values():
        talk = lab.submit(prompt_of(name), [], max_tokens=40, **params)
        news = []
        for generation in lab.engine._requests[talk.request.id]:
            take = generation.sink
            generation.sink = lambda update, take=take, news=news: (news.append(update), take(update))
        said.append((talk, news))
    lab.run()
    return [
        (
            talk.outputs,
            talk.reasons,
            ["".join(u.text for u in news if u.index == i) for i in range(len(talk.outputs))],
            [score.ids for u in news for score in u.scores],
            [u.stop_reason for u in news if u.finish_reason],
        )
        for talk, news in said
    ], lab


@pytest.fixture(scope="module")
def plain(checkpoints):
    """By a model's name, what it says without drafts."""
    return functools.cache(lambda name: answers(load(checkpoints[name], mtp=False), name)[0])


@pytest.mark.thinned(2, "name", "drafts")
@pytest.mark.parametrize("name", ["dense", "moe", "shipped"])
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_what_is_said_is_what_is_said_without_drafts(models, plain, name, drafts):
    found, lab = answers(models[name], name, drafts=drafts)
    for asked, ours, theirs in zip(ASKED, found, plain(name), strict=True):
        assert ours == theirs, asked
    fared = lab.engine.acceptance
    assert fared.steps > 0 and len(fared.drafted) == drafts
    assert name != "shipped" or fared.ids_a_step > 1.3, "the shipped model's drafts are worth something"


@pytest.mark.parametrize("name", ["dense", "shipped"])
def test_what_is_said_does_not_depend_on_when_it_is_drafted(models, plain, name):
    """The head's keys follow where nothing is drafted, too."""
    found, lab = answers(models[name], name, drafts=3, limits={"draft_costs": ((1, 2.0), (6, 2.5))})
    assert found == plain(name)
    assert lab.scheduler.drafting.left_out > 10 and lab.engine.acceptance.steps > 10
    assert lab.difference() <= TOLERANCE and lab.compared_drafts > 0


ON_A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
PLACE = {"city": {"type": "string", "maxLength": 9}, "n": {"type": "integer"}}
FORMATS = (
    (json_schema({"type": "object", "properties": PLACE, "required": ["city", "n"]}), {"temperature": 0.0}),
    (regex("(yes|no|maybe), because [a-z ]{5,30}"), {"temperature": 1.0, "seed": 3, "n": 2}),
    (json_object(), {"temperature": 0.7, "seed": 4, "bad_words": ["the", "1"], "logprobs": 1}),
    (regex("[0-9 ]{20,}"), {"temperature": 0.0, "frequency_penalty": 0.5}),
    (json_object(), {"temperature": 0.0}),
    (None, {"temperature": 1.0, "thinking_token_budget": 4, "seed": 6}),
)


def in_formats(model: Qwen3_5, **settings) -> tuple[list, Lab]:
    lab, said = Lab(model, max_seqs=8, pages=96, slots=24, **settings), []
    lab.engine.eos_ids = frozenset([shipped_tokenizer().token_to_id("<|im_end|>")])
    for spec, params in FORMATS:
        talk = lab.submit([*prompt_of("shipped"), *opening(params)], [], grammar=spec, max_tokens=40, **params)
        said.append(talk)
    lab.run()
    return [(talk.outputs, talk.reasons) for talk in said], lab


def opening(params: dict) -> list[int]:
    return [shipped_tokenizer().token_to_id("<think>")] if "thinking_token_budget" in params else []


@pytest.mark.parametrize(("mtp", "drafts"), [(True, 1), (True, 3), (False, 3)], ids=["one", "three", "looked up"])
def test_formats_are_spoken_as_without_drafts(models, mtp, drafts):
    plain, _ = in_formats(load(SHIPPED, mtp=False))
    found, lab = in_formats(models["shipped"] if mtp else load(SHIPPED, mtp=False), drafts=drafts)
    assert found == plain
    assert lab.engine.acceptance.ids_a_step > 1.03, "drafts within a format count"


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"))],
)
def test_a_conversation_has_the_same_answer_in_a_format_with_drafts(device):
    """By way of the whole engine: on a card drafts come to the host ahead of the forward pass that verifies them."""
    said, fared = [], None
    for drafts in (0, 3):
        settings = {"draft_tokens": drafts, "gpu_memory_utilization": 0.3, "validate": True}
        llm = LLM(progress=False, device=device, dtype="float32", **settings)
        asked = [[{"role": "user", "content": f"What is {n} plus 30?"}] for n in (12, 47, 219)]
        params = SamplingParams(temperature=0, max_tokens=40)
        answers = llm.chat(asked, params, progress=False, response_format={"type": "json_object"})
        said.append([answer.outputs[0].token_ids for answer in answers])
        fared = llm.engine.acceptance
    assert said[0] == said[1] and fared.ids_a_step > 1.1


def test_drafts_are_drawn_by_the_noise_of_the_outputs_that_they_may_be():
    """So hot that the noise decides: other noise would draft nothing right, 1.0 ids a step."""
    llm = LLM(progress=False, draft_tokens=3, threads=1)
    asked = [[{"role": "user", "content": f"What is {7 * i + 3} plus {5 * i + 9}?"}] for i in range(12)]
    llm.chat(asked, SamplingParams(temperature=5, max_tokens=40), progress=False)
    assert llm.engine.acceptance.ids_a_step > 2


@pytest.mark.parametrize("name", ["dense", "shipped"])
def test_what_is_said_is_what_is_said_without_looking_up(checkpoints, plain, name):
    looked_up, lab = answers(load(checkpoints[name], mtp=False), name, drafts=3)
    assert looked_up == plain(name) and lab.engine.acceptance.steps > 0


@pytest.mark.parametrize(("ids", "fp8"), [(300, False), (None, True), (300, True)])
def test_what_is_said_does_not_depend_on_the_head_that_drafts(plain, ids, fp8):
    model = load(SHIPPED)
    model.mtp.copy_head(None if ids is None else torch.arange(ids), fp8)
    said, lab = answers(model, "shipped", drafts=3)
    assert said == plain("shipped") and lab.engine.acceptance.ids_a_step > 1.5


def test_drafts_are_looked_up_where_the_same_was_said_before(checkpoints):
    lab = Lab(load(checkpoints["dense"], mtp=False), drafts=3)
    talk = lab.ask(text(1, 20) * 3, [], max_tokens=60, logit_bias={7: 100.0})  # says nothing but 7
    assert talk.outputs[0] == [7] * 60
    assert lab.engine.acceptance.ids_a_step > 3.3
    assert lab.scheduler.steps < 25


@pytest.mark.thinned(2, "drafts", "scenario")
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cached_logits_are_the_uncached_ones_drafts_included(models, scenario, drafts):
    lab = scenario(models["dense"], drafts=drafts)
    assert lab.difference() <= TOLERANCE and lab.compared_drafts > 0


@pytest.mark.thinned(2, "seed")
@pytest.mark.parametrize("seed", range(8))
def test_random_lives_with_drafts(models, seed):
    random = Random(seed)
    settings = {
        "pages": random.choice([8, 10, 14, 64]),
        "slots": random.choice([1, 2, 3, 6, 24]),
        "max_seqs": random.choice([3, 4, 6]),
        "max_num_batched_tokens": random.choice([33, 64, 256]),
        "drafts": random.choice([1, 3, 7]),
        "grid_tokens": random.choice([0, 50]),
    }
    lab = Lab(models["dense" if seed % 4 else "shipped"], **settings)
    live(lab, seed, turns=8)
    assert lab.difference() <= TOLERANCE, settings
    assert lab.compared_drafts > 0


@pytest.mark.thinned(2, "offset")
@pytest.mark.parametrize("offset", range(0, 64, 3))
def test_a_resume_at_any_offset_drafts_what_a_cold_start_drafts(models, offset):
    """The head's row of the first token after the prefix is its own, not that of whoever was there before."""
    lab, shared = Lab(models["dense"], drafts=3), text(1, 64 + offset)
    lab.ask(shared + text(2, 9), [len(shared)], max_tokens=6)
    talk = lab.ask(shared + text(3, 11), [], max_tokens=12)
    assert lab.admission(talk).match.state_tokens == len(shared)
    assert lab.difference() <= TOLERANCE and lab.compared_drafts > 0


def test_close_to_the_end_of_its_room_a_sequence_goes_on_token_by_token(models):
    lab = Lab(models["shipped"], pages=2, slots=1, max_seqs=1, drafts=3)
    prompt = prompt_of("shipped")
    talk = lab.ask(prompt, [], max_tokens=None, ignore_eos=True)
    assert len(talk.history()) == 128
    alone = Lab(load(SHIPPED, mtp=False), pages=2, slots=1, max_seqs=1)
    assert talk.outputs == alone.ask(prompt, [], max_tokens=None, ignore_eos=True).outputs


def test_many_sequences_are_drafted_for_less_deeply(models):
    limits = {"drafts": ((1, 3), (2, 1))}
    lab = Lab(models["shipped"], drafts=3, limits=limits)
    widths = []
    forward = lab.runner.forward
    lab.runner.forward = lambda step: (widths.append((len(step.decode), step.width)), forward(step))[1]
    for i in range(3):
        lab.submit([*prompt_of("shipped"), 40 + i], [], max_tokens=(10, 30, 60)[i], ignore_eos=True)
    lab.run()
    assert {width for rows, width in widths if rows == 3} == {1}
    first, *rest = [width for rows, width in widths if rows == 2]
    assert first == 1 and set(rest) == {2}  # behind a step without drafts, and to the end of the shorter one
    assert {width for rows, width in widths if rows == 1} >= {4}
    assert lab.difference() <= TOLERANCE


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_format_that_becomes_too_much_work_ends_its_own_request_alone(models, drafts):
    """Behind `[` each of many kinds of arrays may go on, more than a parser may hold: an id that the mask admits."""
    kinds = [{"type": "array", "items": {"type": "string", "maxLength": i}} for i in range(1, 800)]
    wide = json_schema({"type": "object", "properties": {"a": {"anyOf": kinds}}, "required": ["a"]})
    likely = {id: 100.0 for letter in '{"a:[' for id in shipped_tokenizer().encode(letter)}
    lab = Lab(models["shipped"], drafts=drafts)
    lab.engine.eos_ids = frozenset([shipped_tokenizer().token_to_id("<|im_end|>")])
    ends = lab.submit(prompt_of("shipped"), [], grammar=wide, max_tokens=40, temperature=0.0, logit_bias=likely)
    goes_on = lab.submit(prompt_of("shipped"), [], max_tokens=60, temperature=0.0, ignore_eos=True)
    lab.run()
    assert ends.reasons == {0: "error"} and "too much work" in str(ends.errors[0])
    assert goes_on.reasons == {0: "length"}
