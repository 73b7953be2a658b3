"""What a caller can do wrong, or a device: a typed error that names it, and everything else goes on."""

import math
from dataclasses import replace

import pytest
from hash_device import EOS, VOCAB
from schedules import Bench, Setting
from test_loop import finish, prompt_of, request

from tokenspeed.engine.errors import CapacityError, EngineError, RequestError
from tokenspeed.engine.request import MAX_BIASES, MAX_SEQUENCES, MAX_STRINGS, Request, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, -1, MAX_SEQUENCES + 1, 1.5, True, "2")),
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, "1", None)),
        *(("top_p", value) for value in (0, -0.5, 1.01, math.nan)),
        *(("top_k", value) for value in (-2, 1.5, "5")),
        *(("min_p", value) for value in (-0.01, 1.5, math.nan)),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)),
        *(("repetition_penalty", value) for value in (0, -1, math.inf, math.nan)),
        *(("seed", value) for value in (-1, 2**63, 1.0)),
        *(("max_tokens", value) for value in (0, -1, 1.5, True)),
        *(("min_tokens", value) for value in (-1, 17)),
        *((name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, True)),
        *(("stop", value) for value in ("", [""], [1], ["a"] * (MAX_STRINGS + 1), "a" * 2000, 7)),
        *(("bad_words", value) for value in ([""], [1], 7)),
        *(("stop_token_ids", value) for value in ([-1], ["a"], [True], [1] * (MAX_BIASES + 1), 7)),
        *(("allowed_token_ids", value) for value in ([-1], [1.0])),
        *(("logit_bias", value) for value in ({-1: 1}, {1: 101}, {1: math.nan}, {"a": 1}, [(1,)], 7, [3])),
        ("thinking_token_budget", -1),
    ],
)
def test_a_value_outside_its_range_is_named(name, value):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name} is ") and "must be" in str(error.value)


def runs_on(bench: Bench) -> None:
    """The engine still serves."""
    finish(bench, request("after", prompt_of(30), max_tokens=3))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (Request("a", (), SamplingParams()), ["empty"]),
        (Request("a", (1, VOCAB), SamplingParams()), [str(VOCAB), "position 1"]),
        (Request("a", (1, -5), SamplingParams()), ["-5", "position 1"]),
        (Request("a", (1,), SamplingParams(stop_token_ids=[VOCAB])), [str(VOCAB), "vocabulary"]),
        (Request("a", (1,), SamplingParams(allowed_token_ids=[1, VOCAB + 3])), [str(VOCAB + 3)]),
        (Request("a", (1,), SamplingParams(logit_bias={VOCAB: 1.0})), [str(VOCAB)]),
        (Request("a", prompt_of(120), SamplingParams(max_tokens=9)), ["120", "9", "128"]),
        (Request("a", prompt_of(128), SamplingParams(max_tokens=None)), ["128"]),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_leaves_nothing(wrong, expected):
    bench = Bench(Setting(pages=2, slots=1))
    with pytest.raises(RequestError) as error:
        bench.submit(wrong)
    for word in expected:
        assert word in str(error.value)
    assert not bench.engine.has_work and not bench.engine.abort("a")
    runs_on(bench)


def test_more_continuations_than_run_at_once_are_refused():
    bench = Bench(Setting(seqs=3))
    with pytest.raises(CapacityError, match=r"4.*3"):
        bench.submit(request("a", prompt_of(9), n=4))
    runs_on(bench)


def test_a_thinking_budget_needs_a_model_that_thinks():
    bench = Bench(Setting())
    bench.engine.tokenizer.token_to_id = lambda token: None
    with pytest.raises(RequestError, match="thinking_token_budget"):
        bench.submit(request("a", prompt_of(9), thinking_token_budget=3))
    runs_on(bench)


def test_an_id_in_use_is_refused_and_its_owner_goes_on():
    bench = Bench(Setting())
    bench.submit(request("a", prompt_of(9), max_tokens=5))
    with pytest.raises(RequestError, match="'a' is in use"):
        bench.engine.submit(request("a", prompt_of(20, 1)), lambda update: None)
    bench.run()
    bench.check()
    bench.submit(request("a", prompt_of(20, 1), max_tokens=2))  # free again


# ---- sinks


class Broken(Exception):
    pass


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_sink_that_raises_ends_its_own_request_alone(n, at):
    bench, calls = Bench(Setting()), []

    def sink(update):
        calls.append(update)
        if len(calls) > at:
            raise Broken

    bench.engine.submit(request("broken", prompt_of(70), n=n, max_tokens=5), sink)
    finish(bench, request("fine", prompt_of(40, 1), max_tokens=30))
    assert len(calls) == at + 1, "who raised hears nothing more"


def test_a_sink_that_raises_at_the_last_news_of_one_continuation_ends_the_others():
    bench, last = Bench(Setting()), []

    def sink(update):
        if update.finish_reason:
            last.append(len(bench.device.steps))
            raise Broken

    bench.engine.submit(Request("a", prompt_of(9), SamplingParams(n=3, max_tokens=200, temperature=1.0, seed=3)), sink)
    bench.run()
    bench.check()
    assert len(last) == 1 and len(bench.device.steps) <= last[0] + 1, "the others went on, unheard"


def test_a_sink_may_abort_any_request_and_every_continuation_hears_its_end_last():
    bench = Bench(Setting(seqs=4))
    hear = bench._sink

    def sink(update):
        hear(update)
        if update.request_id == "a" and len(bench.news["a", 0]) == 3:
            bench.abort("b")
            bench.abort("a")

    bench._sink = sink
    bench.submit(request("a", prompt_of(30), n=2, max_tokens=20))
    bench.submit(request("b", prompt_of(40, 1), n=2, max_tokens=20))
    bench.run()
    bench.check()
    for continuation, said in bench.news.items():
        assert [update.finish_reason for update in said][-1] == "abort", continuation


def test_a_sink_may_submit_the_next_request_of_the_same_id():
    bench, turns = Bench(Setting()), []

    def sink(update):
        if update.finish_reason:
            turns.append(update)
            if len(turns) < 3:
                bench.engine.submit(request("a", prompt_of(20 + len(turns)), max_tokens=2), sink)
                raise Broken  # concerns the one that ended, not its successor

    bench.engine.submit(request("a", prompt_of(20), max_tokens=2), sink)
    bench.run()
    bench.check()
    assert [update.finish_reason for update in turns] == ["length"] * 3


# ---- the device


@pytest.mark.parametrize("where", ["launch", "forward", "choose"])
def test_when_the_device_fails_everyone_is_told_and_nobody_is_served_afterwards(where):
    bench = Bench(Setting(seqs=2, batch_tokens=64))
    for i in range(4):
        bench.submit(request(str(i), prompt_of(100, i), max_tokens=50, n=1 + (i == 1)))
    for _ in range(9):
        bench.step()

    def fail(*arguments):
        raise Broken("lost the device")

    setattr(bench.device, where, fail)
    with pytest.raises(EngineError, match="Broken: lost the device"):
        bench.run()
    for said in bench.news.values():
        assert (
            said[-1].finish_reason == "error"
            and "lost the device" in said[-1].error.message
            and said[-1].error.kind == "EngineError"
        )
    for call in (bench.engine.step, lambda: bench.submit(request("x", prompt_of(9)))):
        with pytest.raises(EngineError, match=r"stopped.*lost the device"):
            call()
    assert not bench.engine.abort("0")


def test_a_sink_that_raises_while_the_failure_is_told_hides_it_from_nobody():
    bench = Bench(Setting())

    def sink(update):
        raise Broken

    bench.engine.submit(request("a", prompt_of(9), n=2), sink)
    bench.submit(request("b", prompt_of(9), max_tokens=5))
    bench.device.forward = lambda step: (_ for _ in ()).throw(Broken("lost"))
    with pytest.raises(EngineError, match="lost"):
        bench.run()
    assert bench.news["b", 0][-1].finish_reason == "error"


def test_end_ids_that_are_not_generated_end_nothing():
    bench = finish(Bench(Setting()), request("a", (EOS, EOS), max_tokens=4))
    assert bench.outcome("a").reason == "length"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"boundaries": (2**40,)}, str(2**40)),
        ({"boundaries": (-1,)}, "-1"),
        ({"boundaries": (1.5,)}, "1.5"),
        ({"name_space": "\ud800"}, "name space"),
        ({"prompt": (1, "2")}, "no integer"),
    ],
)
def test_a_malformed_request_is_refused_and_the_engine_goes_on(change, word):
    bench = Bench(Setting())
    good = Request("a", (1, 2, 3), SamplingParams(max_tokens=3, ignore_eos=True))
    with pytest.raises(RequestError) as error:
        bench.submit(replace(good, **change))
    assert word in str(error.value)
    bench.submit(good)
    bench.run()
    bench.check()
