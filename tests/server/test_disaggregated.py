"""A prefiller, a decoder and a router, each in processes of their own, answer as one server does."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from launch import ROOT, START_SECONDS, Server

STORY = "Once there was a lake, and at the lake there was a house. " * 30
LEASE = 3


class Routing:
    """`route` with options, on a free port."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "tokenspeed.engine", "route", "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        limit = time.monotonic() + START_SECONDS
        while not (found := re.search(r"routing to \d+ backends at (http://\S+)/v1", "".join(self.log))):
            assert time.monotonic() < limit
            line = self.process.stderr.readline()
            assert line, "".join(self.log)
            self.log.append(line)
        self.url = found[1]
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        while httpx.get(f"{self.url}/health", timeout=30).status_code != 200:
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def parts():
    """A prefiller, a decoder that tells of its cache, and a router before them."""
    lease = ("--transfer-lease", str(LEASE), "--max-num-seqs", "16")
    events = ("--kv-events", f"tcp://127.0.0.1:{free_port()}")
    options = (("--role", "prefill", *lease), ("--role", "decode", *lease, *events))
    with ThreadPoolExecutor() as pool:
        prefill, decode = pool.map(lambda given: Server(*given), options)
    routing = Routing("--prefill", prefill.url, "--decode", decode.url, "--prefill-tokens", "100")
    yield prefill, decode, routing
    assert routing.stop() == 0, "".join(routing.log)
    assert decode.stop() == 0, "".join(decode.log)
    prefill.stop()


def ask(url: str, content: str, **body) -> dict:
    asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12} | body
    answer = httpx.post(f"{url}/v1/chat/completions", json=asked | {"return_token_ids": True}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: dict) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


def nothing_is_held(*servers: Server) -> None:
    names = ("pages_held", "slots_working", "slots_promised", "transfer_rooms", "transfer_pulls")
    limit = time.monotonic() + LEASE + 10
    for server in servers:
        while any((gauges := server.gauges())[name] for name in names):
            assert time.monotonic() < limit, {name: gauges[name] for name in names}
            time.sleep(0.1)


def test_answers_are_those_of_one_server(parts, server):
    prefill, decode, routing = parts
    kinds = [
        {},
        {"n": 2, "temperature": 1, "seed": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}},
    ]
    with ThreadPoolExecutor() as pool:
        through = list(pool.map(lambda pair: ask(routing.url, f"{pair[0]} {STORY}", **pair[1]), enumerate(kinds)))
    for number, (found, kind) in enumerate(zip(through, kinds, strict=True)):
        local = ask(server.url, f"{number} {STORY}", **kind)
        assert ids(found) == ids(local) and "kv_transfer_params" not in found
        tokens = found["usage"]["prompt_tokens"]
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens - 1, "it was brought"
        if kind.get("logprobs"):
            for one, other in zip(found["choices"], local["choices"], strict=True):
                pairs = zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=True)
                assert all(abs(a["logprob"] - b["logprob"]) < 1e-4 for a, b in pairs)
    nothing_is_held(prefill, decode)  # the prefiller hears of the last page's arrival behind the answer
    gauges = decode.gauges()
    assert gauges["transfers_pulled_total"] == len(kinds) and gauges["transfers_failed_total"] == 0
    assert gauges["draft_steps_total"] > 0, "the head drafts from what was brought"
    assert prefill.gauges()["transfers_offered_total"] == len(kinds)


def test_a_proxy_that_asks_one_after_the_other_passes_on_what_it_is_given(parts, server):
    prefill, decode, _ = parts
    none = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
    wanted = {"do_remote_decode": True, "do_remote_prefill": False} | dict.fromkeys(none)
    body = {"prompt": "sequential " + STORY, "max_tokens": 16, "temperature": 0}
    first = body | {"max_tokens": 1, "kv_transfer_params": wanted}
    answer = httpx.post(f"{prefill.url}/v1/completions", json=first, timeout=60).json()
    given = answer["kv_transfer_params"]
    assert given["do_remote_prefill"] and not given["do_remote_decode"] and answer["usage"]["completion_tokens"] == 0
    assert prefill.gauges()["transfer_rooms"] == 1
    second = body | {"kv_transfer_params": given}
    found = httpx.post(f"{decode.url}/v1/completions", json=second, timeout=60).json()
    local = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert found["choices"][0]["text"] == local["choices"][0]["text"]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == found["usage"]["prompt_tokens"] - 1
    nothing_is_held(prefill, decode)


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "reasoning": {"effort": "none"}}
FORMS = {
    "/v1/messages": lambda content: {"messages": [{"role": "user", "content": content}], "max_tokens": 12},
    "/v1/responses": lambda content: {"input": content, "max_output_tokens": 12} | LOGPROBS,
}


def said(answer: dict) -> list:
    """What an answer of one of these forms says, and of how many tokens of how long a prompt it was told."""
    usage = answer["usage"]
    if "content" in answer:
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        return [[block.get("text") or block.get("thinking") for block in answer["content"]], prompt]
    [part] = [part for item in answer["output"] for part in item["content"]]
    return [part["text"], [entry["bytes"] for entry in part["logprobs"]], usage["input_tokens"]]


def cached(answer: dict) -> int:
    usage = answer["usage"]
    return usage.get("cache_read_input_tokens") or usage["input_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("path", FORMS)
def test_messages_and_responses_are_prefilled_apart_too(parts, server, path):
    prefill, decode, routing = parts
    pulled = decode.gauges()["transfers_pulled_total"]
    post = lambda url, body: httpx.post(f"{url}{path}", json=body | {"temperature": 0}, timeout=60)  # noqa: E731

    body = FORMS[path](f"{path} one after the other {STORY}")
    first = post(prefill.url, body | {"kv_transfer_params": {"do_remote_decode": True}}).json()
    assert not first.get("content") and not first.get("output"), "nothing is generated there"
    found = post(decode.url, body | {"kv_transfer_params": first["kv_transfer_params"]}).json()
    local = post(server.url, body).json()
    assert said(found) == said(local) and cached(found) == said(found)[-1] - 1 and "kv_transfer_params" not in found

    body = FORMS[path](f"{path} through the router {STORY}")
    found, local = post(routing.url, body).json(), post(server.url, body).json()
    assert said(found) == said(local) and cached(found) == said(found)[-1] - 1
    told = post(routing.url, FORMS[path](f"{path} in pieces {STORY}") | {"stream": True})
    assert told.status_code == 200 and "event: " in told.text and "event: error" not in told.text
    assert decode.gauges()["transfers_pulled_total"] == pulled + 3
    nothing_is_held(prefill, decode)

    refused = post(prefill.url, body | {"stream": True, "kv_transfer_params": {"do_remote_decode": True}})
    assert refused.status_code == 400 and "nothing to stream" in refused.text
    if path == "/v1/responses":
        assert httpx.get(f"{prefill.url}{path}/{first['id']}").status_code == 400, "there is nothing to go on with"


def test_engines_of_two_ranks_exchange_state_rank_by_rank(server):
    options = ("--tp", "2", "--transfer-lease", "20", "--max-num-seqs", "16", "--validate")
    with ThreadPoolExecutor() as pool:
        prefill, decode = pool.map(lambda role: Server("--role", role, *options), ("prefill", "decode"))
    try:
        bodies = [{"prompt": f"{i} {STORY}", "max_tokens": 16, "temperature": 0} for i in range(2)]
        for number, body in enumerate(bodies):
            first = body | {"kv_transfer_params": {"do_remote_decode": True}}
            given = httpx.post(f"{prefill.url}/v1/completions", json=first, timeout=120).json()["kv_transfer_params"]
            second = body | {"kv_transfer_params": given}
            found = httpx.post(f"{decode.url}/v1/completions", json=second, timeout=120).json()
            local = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
            assert found["choices"][0]["text"] == local["choices"][0]["text"]
            assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == found["usage"]["prompt_tokens"] - 1
            assert decode.gauges()["transfers_pulled_total"] == number + 1
        nothing_is_held(prefill, decode)
    finally:
        assert [prefill.stop(), decode.stop()] == [0, 0], "".join(prefill.log + decode.log)


@pytest.mark.parametrize(
    "who, given, expected",
    [
        ("prefill", {}, "do_remote_decode alone"),
        ("prefill", {"do_remote_prefill": True}, "role is 'prefill'"),
        ("decode", {"do_remote_decode": True}, "role is 'decode'"),
        ("decode", {"do_remote_prefill": True, "do_remote_decode": True}, "both true"),
        ("decode", {"do_remote_prefill": True, "transfer_id": "x", "remote_host": "h"}, "remote_port; it is None"),
        (
            "decode",
            {"do_remote_prefill": True, "transfer_id": "x", "remote_host": "h", "remote_port": True},
            "remote_port; it is True",
        ),
        ("decode", {"do_remote_prefill": True, "transfer_id": "x" * 200}, "up to 128 characters"),
        ("decode", {"do_remote_prefill": "yes"}, "must be true or false"),
        ("neither", {"do_remote_decode": True}, "--role"),
    ],
)
def test_what_a_server_is_not_there_for_is_refused_by_name(parts, server, who, given, expected):
    url = {"prefill": parts[0], "decode": parts[1], "neither": server}[who].url
    body = {"prompt": "a", "max_tokens": 1, "kv_transfer_params": given}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400 and expected in answer.json()["error"]["message"]


def test_a_name_that_was_used_is_refused(parts):
    prefill = parts[0]
    body = {"prompt": "twice", "kv_transfer_params": {"do_remote_decode": True, "transfer_id": "once"}}
    assert httpx.post(f"{prefill.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{prefill.url}/v1/completions", json=body, timeout=60).status_code == 400
    nothing_is_held(prefill)  # nobody has come for it
    assert httpx.post(f"{prefill.url}/v1/completions", json=body, timeout=60).status_code == 409


def test_a_prefiller_that_is_killed_costs_time_and_no_answer(parts, server):
    prefill, decode, routing = parts
    contents = [f"kill {i} {STORY}" for i in range(3)]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, routing.url, content) for content in contents]
        time.sleep(0.1)
        os.kill(prefill.engine_pid(), signal.SIGKILL)
        found = [answer.result() for answer in answers]
    assert [ids(one) for one in found] == [ids(ask(server.url, content)) for content in contents]
    nothing_is_held(decode)
    assert ids(ask(routing.url, "afterwards " + STORY)) == ids(ask(server.url, "afterwards " + STORY))
