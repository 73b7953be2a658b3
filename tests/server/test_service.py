"""Keys, limits, disconnects, the end: what a server does beside answering."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from launch import ROOT, Server

from tokenspeed.engine.request import Request, SamplingParams
from tokenspeed.engine.server.messages import Abort, Submit, decode_from_engine
from tokenspeed.engine.server.process import EngineProcess
from tokenspeed.engine.text import grammar

LONG = {
    "messages": [{"role": "user", "content": "Hello!"}],
    "max_tokens": 4000,
    "ignore_eos": True,
    "stream": True,
    "temperature": 1.5,
}


def eventually(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_client_that_goes_away_ends_its_request(server):
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG, timeout=30) as response:
        lines = response.iter_lines()  # kept: without it the client hangs up
        next(lines)
        assert server.gauges()["running_sequences"] >= 1
    eventually(lambda: server.gauges()["running_sequences"] == 0)
    gauges = server.gauges()
    assert gauges["pages_held"] == gauges["slots_working"] == 0


def test_a_waiting_client_that_goes_away_ends_its_request_too(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=LONG | {"stream": False}, timeout=0.5)
    eventually(lambda: server.gauges()["running_sequences"] == 0)


def test_abort_by_id_closes_the_stream_with_its_reason(server):
    body = LONG | {"request_id": "doomed"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        assert httpx.post(f"{server.url}/v1/abort", json={"request_id": "doomed"}).json() == {"aborted": True}
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "abort"
    assert httpx.post(f"{server.url}/v1/abort", json={"request_id": "doomed"}).json() == {"aborted": False}


def test_an_id_in_use_is_refused_and_its_owner_goes_on(server):
    body = LONG | {"request_id": "twin", "max_tokens": 100}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        second = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"stream": False}, timeout=30)
        assert second.status_code == 400 and "twin" in second.json()["error"]["message"]
        assert list(lines)[-2] == "data: [DONE]"
    again = httpx.post(f"{server.url}/v1/chat/completions", json=body | {"stream": False, "max_tokens": 1}, timeout=30)
    assert again.status_code == 200, "an id that has ended is free again"


def test_an_abort_while_the_grammar_compiles_is_told():
    sent = []

    class Socket:
        def send(self, data: bytes) -> None:
            sent.append(decode_from_engine(data))

    class Engine:
        grammars = SimpleNamespace(compile=lambda *_: time.sleep(0.2))

        def abort(self, id: str) -> bool:
            return False

    process = EngineProcess(Engine(), Socket())
    request = Request("slow", (1,), SamplingParams(n=2))
    process._take(Submit(request, grammar.response_format({"type": "json_object"})))
    process._take(Abort("slow"))
    (news,) = sent
    assert [(update.index, update.finish_reason) for update in news.updates] == [(0, "abort"), (1, "abort")]


def test_a_deadline_ends_a_request(server):
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json=LONG | {"stream": False, "timeout": 0.3}, timeout=30
    )
    assert response.status_code == 504 and "0.3 s" in response.json()["error"]["message"]


def test_tokens_there_and_back(server):
    found = httpx.post(
        f"{server.url}/tokenize", json={"prompt": "The price of kelp is 551.", "return_token_strs": True}
    )
    assert "".join(found.json()["token_strs"]) == "The price of kelp is 551."
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": found.json()["tokens"]})
    assert back.json() == {"prompt": "The price of kelp is 551."}
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_the_prefix_cache_can_be_cleared(server):
    body = LONG | {"stream": False, "max_tokens": 2}

    def cached() -> int:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert httpx.post(f"{server.url}/reset_prefix_cache").json() == {"reset": True}
    assert cached() == 0


def test_errors_have_one_form(server):
    for method, path, status in (("POST", "/v1/embeddings", 404), ("GET", "/v1/chat/completions", 405)):
        response = httpx.request(method, f"{server.url}{path}")
        error = response.json()["error"]
        assert response.status_code == error["code"] == status and error["type"] == "not_found_error"
        assert method in error["message"] and path in error["message"]
    broken = httpx.post(
        f"{server.url}/v1/completions", content=b"{not json", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):  # curl's, where none is given
        untold = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a"}', headers=kind)
        assert untold.status_code == 400 and "must be application/json" in untold.json()["error"]["message"]


@pytest.fixture(scope="module")
def guarded():
    options = ("--api-key", "one", "--api-key", "two", "--max-requests", "2", "--max-body-mib", "1")
    running = Server(*options, "--drain-seconds", "120")
    yield running
    running.stop()


def test_keys_limits_and_an_orderly_end(guarded):
    url, good = f"{guarded.url}/v1/chat/completions", {"authorization": "Bearer two"}
    short = LONG | {"stream": False, "max_tokens": 3}
    assert httpx.post(url, json=short).status_code == 401
    assert httpx.post(url, json=short, headers={"authorization": "Bearer three"}).status_code == 401
    assert httpx.post(url, json=short, headers=good, timeout=30).status_code == 200
    assert httpx.post(url, json=short, headers={"x-api-key": "one"}, timeout=30).status_code == 200
    again = httpx.post(url, json=short, headers=good, timeout=30).json()
    other = httpx.post(url, json=short | {"cache_salt": "mine"}, headers=good, timeout=30).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "a salt is a cache of its own"

    large = {"messages": [{"role": "user", "content": "x" * (2 << 20)}]}
    assert httpx.post(url, json=large, headers=good, timeout=30).status_code == 413
    pieces = httpx.post(url, content=(b"x" * 65536 for _ in range(32)), headers=good, timeout=30)
    assert pieces.status_code == 413, "also where no length is announced"

    statuses, texts = [], []

    def run() -> None:
        with httpx.stream("POST", url, json=LONG | {"max_tokens": 300}, headers=good, timeout=60) as response:
            statuses.append(response.status_code)
            texts.append(response.read())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(statuses) == 2)
    full = httpx.post(url, json=short, headers=good, timeout=30)
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1

    guarded.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert statuses == [200, 200] and all(text.rstrip().endswith(b"[DONE]") for text in texts), "what runs is finished"
    assert guarded.process.wait(60) == 0


def test_the_engine_s_end_is_told_and_ends_the_server():
    server = Server()
    said = []

    def run() -> None:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG, timeout=60) as response:
            said.extend(response.iter_lines())

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: server.gauges()["running_sequences"] == 1)
    os.kill(server.engine_pid(), signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive() and any("engine process ended" in line for line in said)
    assert server.process.wait(30) == 1
    assert any("engine process ended" in line for line in server.log)


def test_a_public_address_needs_a_key():
    command = [sys.executable, "-m", "tokenspeed.engine", "serve", "--host", "0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "--api-key" in done.stderr and "0.0.0.0" in done.stderr
