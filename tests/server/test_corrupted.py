"""A request whose logits are not finite, or to which no token is allowed, is answered with an error; others go on."""

import json
import shutil
import threading

import httpx
import pytest
from launch import Server
from safetensors.torch import load_file, save_file

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.text.tokenizer import Tokenizer

BAD = {"prompt": "The price of ~ is", "max_tokens": 8}  # no other text here has a tilde
GOOD = {"prompt": "The price of kelp is", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A server of the shipped model in which one token's embedding is not a number."""
    directory = tmp_path_factory.mktemp("broken")
    shutil.copytree(SHIPPED, directory, dirs_exist_ok=True)
    (token,) = Tokenizer.from_directory(SHIPPED).encode("~")
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    server = Server("--model", str(directory), "--served-model-name", "tiny")
    yield server
    assert server.stop() == 0, "".join(server.log)


def post(server: Server, path: str, body: dict) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60)


def events(answer: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_it_is_a_500_that_says_so_and_others_are_unaffected(broken):
    alone = post(broken, "/v1/completions", GOOD).json()["choices"][0]["text"]
    found: list[str] = []
    ask = lambda: found.append(post(broken, "/v1/completions", GOOD).json()["choices"][0]["text"])  # noqa: E731
    others = [threading.Thread(target=ask) for _ in range(3)]
    for other in others:
        other.start()
    before = broken.gauges()["corrupted_requests_total"]
    answers = [
        post(broken, "/v1/completions", BAD),
        post(broken, "/v1/completions", BAD | {"logprobs": 2, "n": 2}),
        post(broken, "/v1/chat/completions", {"messages": [{"role": "user", "content": "What is ~?"}]}),
        post(
            broken, "/v1/messages", {"messages": [{"role": "user", "content": "~"}], "max_tokens": 5, "model": "tiny"}
        ),
        post(broken, "/v1/responses", {"input": "What is ~?", "model": "tiny"}),
    ]
    for answer in answers:
        assert answer.status_code == 500, answer.text
        error = answer.json()["error"]
        assert error["type"] == "internal_error" and "not finite" in error["message"], answer.text
    for other in others:
        other.join()
    assert found == [alone] * 3
    assert broken.gauges()["corrupted_requests_total"] == before + len(answers)
    metrics = httpx.get(f"{broken.url}/metrics", timeout=30).text
    assert f'tokenspeed_requests_total{{outcome="error"}} {before + len(answers)}' in metrics


def test_a_stream_that_breaks_on_its_way_ends_with_an_error_event(broken):
    """The only token that is allowed is the broken one: it is said once."""
    body = GOOD | {"allowed_token_ids": Tokenizer.from_directory(SHIPPED).encode("~"), "stream": True}
    answer = post(broken, "/v1/completions", body)
    first, last = events(answer)
    assert answer.status_code == 200 and first["choices"][0]["text"] == "~"
    assert last["error"]["code"] == 500 and "not finite" in last["error"]["message"]
    early = post(broken, "/v1/completions", BAD | {"stream": True})  # nothing was said: the status still tells
    assert early.status_code == 500 and "not finite" in early.json()["error"]["message"]


@pytest.mark.parametrize("extra", [{}, {"stream": True}, {"n": 2, "logprobs": 1}])
def test_where_nothing_is_allowed_the_request_is_wrong(broken, extra):
    body = GOOD | {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1} | extra
    answer = post(broken, "/v1/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == 400 and error["type"] == "invalid_request_error"
    assert "allowed_token_ids" in error["message"]
