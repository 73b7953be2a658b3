"""`generate --jsonl`: every line has its result, in order, and a broken one fails alone."""

import io
import json
import signal
import sys
from types import SimpleNamespace

import pytest

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.bench.drive import drive
from tokenspeed.engine.core import Engine
from tokenspeed.engine.errors import EngineError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams

TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"properties": {"a": {"type": "number"}}}}}
ARGUMENTS = ["generate", "--max-tokens", "6", "--max-num-seqs", "4", "--quiet", "--validate"]


def generate(tmp_path, lines, *more):
    (tmp_path / "in").write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    status = main([*ARGUMENTS, "--jsonl", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more])
    return status, [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]


def test_every_line_has_its_result_in_order_and_broken_ones_fail_alone(tmp_path):
    user = {"role": "user", "content": "What is 12 plus 30?"}
    good = [
        {"id": "a", "prompt": "Hello!", "max_tokens": 40},
        {"id": 7, "messages": [user], "tools": [TOOL], "n": 3},
        {"prompt": [1, 2, 3], "logprobs": 1, "temperature": 1.5, "logit_bias": {"5": 100}},
        {"id": ["any"], "prompt": "Hello!", "enable_thinking": False, "stop": "e"},
    ]
    broken = [
        (b"{", "line 5"),
        (b"[1]", "list"),
        (b'\xff"', "line 7"),
        (b"[" * 100_000, "line 8"),
        ({"prompt": "x", "more": 1}, "'more'"),
        ({}, "'prompt' and 'messages'"),
        ({"prompt": "x", "messages": []}, "not both"),
        ({"prompt": [1.5]}, "1.5"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": [640]}, "640"),
        ({"prompt": []}, "empty"),
        ({"prompt": [1], "tools": [TOOL]}, "tools need"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "'alien'"),
        ({"messages": [user], "tools": [{}]}, "tools[0]"),
        ({"prompt": "x", "enable_thinking": 5}, "enable_thinking"),
        ({"prompt": "x", "temperature": "hot"}, "'hot'"),
        ({"prompt": "x", "logit_bias": [5]}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"a": 5}}, "logit_bias"),
        ({"prompt": "x", "n": 5}, "4 sequences"),
        ({"prompt": "x", "max_tokens": 10**6}, "1000000"),
    ]
    status, records = generate(tmp_path, [*good, *(line for line, _ in broken), b"", good[0]])
    assert status == 1
    results, errors, last = records[: len(good)], records[len(good) : -1], records[-1]
    assert [record["id"] for record in results] == ["a", 7, "line-3", ["any"]]
    assert [len(record["outputs"]) for record in results] == [1, 3, 1, 1]
    assert results[2]["outputs"][0]["token_ids"] == [5] * 6 and len(results[2]["outputs"][0]["logprobs"]) == 6
    assert "message" not in results[2]["outputs"][0]
    assert results[3]["outputs"][0]["stop_reason"] == "e"
    assert last["outputs"] == results[0]["outputs"]
    assert last["outputs"][0]["message"]["content"] == "Hello! How can I help?"
    assert last["usage"] == {"prompt_tokens": 14, "cached_tokens": 9, "completion_tokens": 16}
    assert [error["line"] for error in errors] == list(range(5, 5 + len(broken)))
    for error, (_, expected) in zip(errors, broken, strict=True):
        assert expected in error["error"]["message"], error
        assert error["error"]["type"] in ("RequestError", "CapacityError")


def test_a_line_gets_what_it_gets_alone_and_lines_differ_in_noise(tmp_path):
    hot = {"prompt": "Hello!", "temperature": 3.0}
    status, (first, second) = generate(tmp_path, [hot, hot])
    assert status == 0
    assert first["outputs"] != second["outputs"]
    assert generate(tmp_path, [hot])[1][0]["outputs"] == first["outputs"]
    (alone,) = generate(tmp_path, [hot | {"seed": 5}])[1]
    assert generate(tmp_path, [hot, hot | {"seed": 5}])[1][1]["outputs"] == alone["outputs"]


def test_standard_input_and_output_serve_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a raw text"}\n')))
    assert main([*ARGUMENTS, "--jsonl", "-", "--raw"]) == 0
    assert "message" not in json.loads(capsys.readouterr().out)["outputs"][0]


def test_an_interrupt_keeps_what_has_ended(tmp_path, monkeypatch):
    step, steps = Engine.step, []

    def interrupted(engine):
        steps.append(engine)
        if len(steps) == 12:
            signal.raise_signal(signal.SIGINT)
        step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    long = {"prompt": "x", "max_tokens": 500, "ignore_eos": True}
    status, records = generate(tmp_path, [long, {"id": "short", "prompt": "x", "max_tokens": 2}])
    assert status == 130
    assert [record["id"] for record in records] == ["short"]
    assert steps[0].cache.stats()["running"] == 0


@pytest.fixture(scope="module")
def llm():
    return LLM(progress=False, max_num_seqs=2)


def test_drive_bounds_what_runs_and_stops_at_what_a_sink_raises(llm):
    running, most = set(), []

    def requests(count):
        for i in range(count):
            request = llm.frontend.request(
                f"r{i}", [1, 2, i], SamplingParams(max_tokens=3, n=1 + i % 2, ignore_eos=True)
            )
            running.add(request.id)
            most.append(len(running))
            left = [request.params.n]

            def take(update, left=left):
                left[0] -= update.finish_reason is not None
                if not left[0]:
                    running.discard(update.request_id)

            yield request, take, None

    drive(llm.engine, requests(9), max_running=3)
    assert len(most) == 9 and max(most) == 3 and not running

    def broken(update):
        raise ZeroDivisionError("a sink's own fault")

    with pytest.raises(ZeroDivisionError):
        drive(llm.engine, ((request, broken, None) for request, *_ in requests(9)), max_running=3)
    assert not llm.engine.has_work and llm.engine.cache.stats()["running"] == 0


def test_a_failing_engine_ends_the_run(llm):
    broken = LLM(progress=False, max_num_seqs=2)
    broken.engine.runner.launch = lambda step: 1 // 0
    request = broken.frontend.request("a", [1], SamplingParams())
    news = []
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        drive(broken.engine, iter([(request, news.append, None)]), max_running=1)
    assert news[-1].finish_reason == "error"
