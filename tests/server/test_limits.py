"""What clients may send and leave lying: every limit is told, and nobody else waits."""

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from launch import Server

from tokenspeed.engine.server.connections import Connections

KEY = {"x-api-key": "one"}


@pytest.fixture(scope="module")
def running():
    server = Server("--served-model-name", "tiny", "--api-key", "one", "--api-key", "two")
    yield server
    assert server.stop() == 0, "".join(server.log)


@pytest.fixture(scope="module")
def keyless():
    server = Server("--served-model-name", "tiny")
    yield server
    assert server.stop() == 0, "".join(server.log)


def connect(server, receive_buffer=None):
    address = urlsplit(server.url)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    return connection


def head(method="POST", path="/v1/completions", **headers):
    fields = {"host": "localhost", "content-type": "application/json"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode()


def said(connection):
    """All that comes until the server closes."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionError:
        pass
    return b"".join(pieces)


@contextmanager
def health_watched(server, most):
    """Fails where /health takes longer than `most` seconds meanwhile; the wide margin is for a machine under load."""
    worst, stop = [0.0], threading.Event()

    def watch():
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                start = time.monotonic()
                assert client.get(f"{server.url}/health").status_code == 200
                worst[0] = max(worst[0], time.monotonic() - start)
                time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    assert worst[0] < most, f"/health took {worst[0]:.2f} s"


def test_a_body_is_not_read_before_its_key_is_accepted(running):
    with connect(running) as connection:
        connection.sendall(head(**{"content-length": 30 << 20}))
        assert said(connection).startswith(b"HTTP/1.1 401"), "none of the body was sent"


@pytest.mark.parametrize("headers, status", [({}, 401), (KEY, 413)])
def test_a_client_that_sends_all_before_it_reads_gets_its_refusal_and_no_reset(running, headers, status):
    async def statuses() -> list[int]:
        async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=30) as client:
            return [(await client.post("/v1/completions", content=b"x" * (40 << 20))).status_code for _ in range(8)]

    assert asyncio.run(statuses()) == [status] * 8


def test_a_body_of_brackets_is_refused_by_the_number_of_its_values(running):
    body = b'{"prompt": "a", "x": [' + b"[]," * 9_000_000 + b"[]]}"
    with health_watched(running, 3):
        answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=KEY | JSON, timeout=60)
    assert answer.status_code == 413 and "JSON values" in answer.json()["error"]["message"]


JSON = {"content-type": "application/json"}
WRONG = {
    "a million wrong ids": {"prompt": [[]] * 380_000},
    "a million wrong biases": {"prompt": "a", "logit_bias": {str(i): "x" for i in range(300_000)}},
    "a million system blocks": {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 1,
        "system": [1] * 700_000,
    },
    "a million items": {"input": [1] * 700_000},
    "a million wrong names": {"input": "a", "include": [1] * 700_000},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_million_errors_are_told_as_one(running, name):
    body = WRONG[name]
    path = "/v1/messages" if "system" in body else "/v1/responses" if "input" in body else "/v1/completions"
    content = json.dumps(body).encode()
    with health_watched(running, 3):
        answer = httpx.post(f"{running.url}{path}", content=content, headers=KEY | JSON, timeout=60)
    assert answer.status_code == 400 and len(answer.text) < 1000


def test_half_a_body_is_given_up(running):
    with connect(running) as connection:
        connection.sendall(head(**{"content-length": 100}, **KEY) + b'{"prompt"')
        start = time.monotonic()
        assert said(connection).startswith(b"HTTP/1.1 408") and time.monotonic() - start < 40


def test_large_headers_and_many_of_them_are_refused(running):
    for fields in ({"x": "y" * 100_000}, {f"x-{i}": "y" for i in range(200)}):
        with connect(running) as connection:
            connection.sendall(head("GET", "/health", **fields))
            assert said(connection).startswith(b"HTTP/1.1 431")
    with connect(running) as connection:  # one field that never ends
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(1024):
                connection.sendall(b"y" * 65536)
    with connect(running) as connection:
        connection.sendall(b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\n\r\n")
        assert said(connection).startswith(b"HTTP/1.1 431")


def test_headers_that_come_slowly_are_given_up(running):
    with connect(running) as connection:
        start = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nx")
        assert said(connection).startswith(b"HTTP/1.1 408") and 5 < time.monotonic() - start < 30


@contextmanager
def small_server(**limits):
    """uvicorn with our protocol alone, in a thread; gives its address."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    settings = {"http": Connections(**limits), "log_config": None, "lifespan": "off", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield SimpleNamespace(url="http://{}:{}".format(*listener.getsockname()))
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def test_of_half_open_connections_the_longest_makes_room():
    with small_server(max_idle=5) as server:
        first = connect(server)
        first.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(0.2)
        others = [connect(server) for _ in range(5)]
        assert said(first).startswith(b"HTTP/1.1 408") and b"too many connections" not in others[0].recv(0)
        others[0].sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert others[0].recv(100).startswith(b"HTTP/1.1 204"), "a whole head in time is answered"
        for connection in (first, *others):
            connection.close()


def test_connections_have_a_number():
    with small_server(max_connections=16) as server:
        held = [connect(server) for _ in range(16)]
        time.sleep(0.2)
        with connect(server) as more:
            assert said(more).startswith(b"HTTP/1.1 503") or not said(more)
        for connection in held:
            connection.close()


def test_half_a_request_behind_a_stream_does_not_get_into_its_answer(running):
    body = json.dumps({"prompt": "a", "max_tokens": 20, "ignore_eos": True, "stream": True}).encode()
    with connect(running) as connection:
        connection.sendall(head(**{"content-length": len(body)}, **KEY) + body)
        answer = connection.recv(65536)
        fields = {f"x-{i}": "y" for i in range(200)}
        connection.sendall(head("GET", "/health", **fields)[:-2])
        answer += said(connection)
    assert answer.startswith(b"HTTP/1.1 200") and b"431" not in answer


def test_a_text_that_holds_the_searched_word_costs_no_more_than_another(running):
    body = {"messages": [{"role": "user", "content": "next" + "x" * 100_000}], "max_tokens": 1}
    start = time.monotonic()
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=KEY, timeout=60)
    assert answer.status_code == 400 and "maximum context length" in answer.text
    assert time.monotonic() - start < 4


def test_long_texts_are_encoded_beside_the_others(running):
    words = "what is the price of kelp and how many boxes are left in the harbour " * 60_000
    content = json.dumps({"prompt": words}).encode()
    with health_watched(running, 3):
        answer = httpx.post(f"{running.url}/tokenize", content=content, headers=KEY | JSON, timeout=120)
    assert answer.status_code == 200 and answer.json()["count"] > 1_000_000


def test_tokens_of_a_long_conversation_are_counted_beside_the_others(running):
    said = "what is the price of kelp and how many boxes are left in the harbour " * 20_000
    body = json.dumps({"messages": [{"role": "user", "content": said}]}).encode()
    with health_watched(running, 3):
        answer = httpx.post(f"{running.url}/v1/messages/count_tokens", content=body, headers=KEY | JSON, timeout=120)
    assert answer.status_code == 200 and answer.json()["input_tokens"] > 300_000


def test_work_whose_client_left_is_given_up(running):
    body = json.dumps({"prompt": "what is the price of kelp " * 400_000}).encode()
    for _ in range(6):
        with connect(running) as connection:
            connection.sendall(head("POST", "/tokenize", **{"content-length": len(body)}, **KEY) + body)
    start = time.monotonic()
    small = {"prompt": "what is the price of kelp " * 2000}
    assert httpx.post(f"{running.url}/tokenize", json=small, headers=KEY, timeout=60).status_code == 200
    assert time.monotonic() - start < 10, "six of them would take a minute"


def test_a_text_without_a_place_to_cut_is_refused_before_it_fills_the_memory(running):
    answer = httpx.post(f"{running.url}/tokenize", json={"prompt": "x" * (10 << 20)}, headers=KEY, timeout=60)
    assert answer.status_code == 400 and "without the end of a word" in answer.json()["error"]["message"]


def test_a_server_without_keys_answers_to_its_own_name_and_pages_alone(keyless):
    port = urlsplit(keyless.url).port

    def status(path="/v1/models", method="GET", **headers):
        return httpx.request(method, f"{keyless.url}{path}", headers=headers, timeout=30).status_code

    assert [status(host=host) for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}")] == [200] * 3
    assert [status(host=host) for host in ("attacker.example", "127.0.0.1.example", "[::", "")] == [403] * 4
    clear = {"path": "/reset_prefix_cache", "method": "POST", "content-type": "text/plain"}
    assert status(**clear, origin="http://attacker.example") == 403
    assert status(**clear, origin="null") == 403
    assert status(**clear, origin=f"http://127.0.0.1:{port}") == 200
    assert status("/health", host="attacker.example") == 403


def test_a_page_that_was_named_may_use_a_server_without_keys():
    server = Server("--allow-origin", "https://example.com")

    def ask(**headers):
        return httpx.get(f"{server.url}/v1/models", headers=headers, timeout=30)

    named = ask(origin="https://example.com")
    assert named.status_code == 200 and named.headers["access-control-allow-origin"] == "https://example.com"
    other = ask(origin="https://elsewhere.com")
    assert other.status_code == 403 and "--allow-origin" in other.text
    assert "access-control-allow-origin" not in other.headers
    assert ask(origin="https://example.com", host="attacker.example").status_code == 403
    assert server.stop() == 0, "".join(server.log)


def test_clients_that_never_read_give_their_places_back():
    server = Server("--max-requests", "4", "--request-timeout", "3")
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 20}
    content = json.dumps(body).encode()
    clients = [connect(server, receive_buffer=1024) for _ in range(4)]
    try:
        for client in clients:
            client.sendall(head(**{"content-length": len(content)}) + content)
        deadline = time.monotonic() + 30
        while (held := server.gauges()["requests_in_flight"]) < 4:
            assert time.monotonic() < deadline, held
        deadline = time.monotonic() + 15
        while held := server.gauges()["requests_in_flight"]:
            assert time.monotonic() < deadline, f"{held} places are held by clients that read nothing"
            time.sleep(0.1)
    finally:
        for client in clients:
            client.close()
        assert server.stop() == 0


def test_a_path_makes_no_line_of_the_log(keyless):
    httpx.get(f"{keyless.url}/a%0a2026-01-01%20INFO%20forged%0d%1b[2J", timeout=30)
    deadline = time.monotonic() + 10
    while not (lines := [line for line in keyless.log if "forged" in line]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert re.match(r"\S+ \S+ INFO GET /a%0A2026", lines[0]) and "\x1b" not in lines[0]
