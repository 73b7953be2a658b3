"""Where requests go, and what becomes of them when servers come and go."""

import asyncio
import socket
import threading

import httpx
import pytest
from fakes import PAGE, Fake, routed, until

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.router import backends
from tokenspeed.engine.router.backends import Peer, _reachable
from tokenspeed.engine.router.cached_blocks import CachedBlocks
from tokenspeed.engine.router.main import backend_client
from tokenspeed.engine.router.policy import split
from tokenspeed.engine.server.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

TEXT = "abcdefgh" * 300  # long enough to be asked about
PEER = {"engine_id": "e1", "host": "10.0.0.1", "port": 7777}


def ask(caller: httpx.Client, content: str = TEXT, **body) -> httpx.Response:
    return caller.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]} | body)


def known(caller: httpx.Client, fake: Fake) -> int:
    return len(caller.backends[fake.url].cached)


def tell(caller: httpx.Client, fake: Fake, text: str) -> None:
    """Until the router has heard it: what is published before somebody listens is lost."""
    tokens = [ord(c) for c in text]

    def heard() -> bool:
        fake.store(tokens)
        return known(caller, fake) >= len(tokens) // PAGE

    until(heard)


def test_a_prompt_goes_where_its_prefix_is():
    fakes = [Fake("a"), Fake("b"), Fake("c")]
    with routed(replica=fakes) as caller:
        tell(caller, fakes[1], TEXT)
        assert {ask(caller, TEXT + f" turn {i}").json()["who"] for i in range(5)} == {"b"}
        tell(caller, fakes[2], TEXT + " and more" * 40)
        assert ask(caller, TEXT + " and more" * 40 + "!").json()["who"] == "c"


def test_a_silent_connection_is_asked_after():
    """A host that is gone says nothing, not even that a connection is no more."""
    fake = Fake("a")

    async def connected() -> dict[str, int]:
        async with backend_client() as client, client.stream("GET", f"{fake.url}/health") as answer:
            own = answer.extensions["network_stream"].get_extra_info("socket")
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            of_tcp = {name: own.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names}
            return of_tcp | {"SO_KEEPALIVE": own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)}

    found = asyncio.run(connected())
    fake.stop()
    assert found.pop("SO_KEEPALIVE") == 1
    assert found["TCP_KEEPIDLE"] + found["TCP_KEEPCNT"] * found["TCP_KEEPINTVL"] <= 30
    assert found["TCP_USER_TIMEOUT"] == 30_000


def test_what_nobody_knows_is_spread_and_who_has_much_to_do_gets_less():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        assert [ask(caller, f"{i}" + TEXT).json()["who"] for i in range(4)] == ["a", "b", "a", "b"]
        fakes[0].gate.clear()
        busy = [threading.Thread(target=ask, args=(caller, f"busy {i}" + TEXT * 9)) for i in range(1)]
        for thread in busy:
            thread.start()
        until(lambda: len(fakes[0].asked) == 3)
        assert {ask(caller, f"x{i}" + TEXT).json()["who"] for i in range(4)} == {"b"}
        tell(caller, fakes[0], TEXT)
        assert ask(caller, TEXT).json()["who"] == "b", "a long wait costs more than a prefix"
        fakes[0].gate.set()
        for thread in busy:
            thread.join()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
def test_a_conversation_without_tokens_stays_where_it_began(path):
    fakes = [Fake("a"), Fake("b"), Fake("c")]
    with routed(replica=fakes) as caller:
        for opening in ("one", "two", "three"):
            said = [{"role": "user", "content": opening}]
            name = "input" if path.endswith("responses") else "messages"
            homes = set()
            for turn in range(3):
                homes.add(caller.post(path, json={name: said, "system": "be brief"}).json()["who"])
                said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"go on {turn}"}]
            assert len(homes) == 1
        spread = {fake.name for fake in fakes if fake.asked}
        assert spread == {"a", "b", "c"}


def test_a_response_that_is_gone_on_with_finds_who_stores_it():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        found = caller.post("/v1/responses", json={"input": "hi"}).json()
        for _ in range(3):
            next_one = caller.post("/v1/responses", json={"input": "and", "previous_response_id": found["id"]}).json()
            assert next_one["who"] == found["who"]


def test_a_response_is_gone_on_with_where_it_is_stored_however_much_there_is_to_do():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        found = caller.post("/v1/responses", json={"input": "hello"}).json()
        home, other = sorted(fakes, key=lambda fake: fake.name != found["who"])
        caller.backends[home.url].work += 100_000
        more = {"input": "and", "previous_response_id": found["id"]}
        assert caller.post("/v1/responses", json=more).json()["who"] == home.name
        home.status = 429
        assert caller.post("/v1/responses", json=more).status_code == 429 and not other.asked


def test_pieces_come_as_they_are_sent_and_a_client_that_leaves_ends_its_request():
    fake = Fake("a")
    with routed(replica=[fake]) as caller:
        fake.gate.clear()
        with caller.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer:
            assert next(answer.iter_raw()) == b'data: {"id": "resp_a"}\n\n', "and the rest is not there yet"
            assert answer.headers["content-type"].startswith("text/event-stream")
        until(lambda: fake.left == 1)
        with pytest.raises(httpx.ReadTimeout):
            caller.post("/v1/completions", json={"prompt": "x"}, timeout=0.3)
        until(lambda: fake.left == 2)
        until(lambda: caller.backends[fake.url].in_flight == 0 and caller.backends[fake.url].work == 0)


def test_a_server_that_is_gone_is_left_out_and_comes_back():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        port = fakes[0].served.port
        fakes[0].stop()
        assert [ask(caller, f"{i}" + TEXT).json()["who"] for i in range(4)] == ["b"] * 4
        assert caller.get("/health").json()["backends"][fakes[0].url] == "lost"
        fakes[0] = Fake("again", port)
        until(lambda: caller.backends[fakes[0].url].alive)
        assert {ask(caller, f"new {i}" + TEXT).json()["who"] for i in range(4)} == {"again", "b"}


def test_nobody_left_is_a_typed_error_and_an_unhealthy_router():
    fake = Fake("a")
    with routed(replica=[fake]) as caller:
        assert caller.get("/health").status_code == 200 and caller.get("/v1/models").json() == {"data": ["a"]}
        fake.stop()
        answer = ask(caller)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "service_unavailable_error"
        assert "retry-after" in answer.headers and caller.get("/health").status_code == 503
        assert caller.get("/v1/models").status_code == 503


def test_a_server_with_too_much_to_do_is_not_the_last_word():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        fakes[0].status = 429
        assert [ask(caller, f"{i}" + TEXT).json().get("who") for i in range(12)] == ["b"] * 12
        fakes[1].status = 429
        assert ask(caller).status_code == 429 and ask(caller).headers["x-who"] in "ab"
        assert all(fake.served.connections <= 3 for fake in fakes), "an answer that nobody got holds its connection"
        fakes[0].status = fakes[1].status = 400
        before = len(fakes[0].asked) + len(fakes[1].asked)
        assert ask(caller).status_code == 400 and len(fakes[0].asked) + len(fakes[1].asked) == before + 1


def test_a_request_without_an_answer_goes_elsewhere_when_its_server_falls_silent(monkeypatch):
    monkeypatch.setattr(backends, "_CHECK_TIMEOUT", 1.0)
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        fakes[0].gate.clear()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(caller)))
        thread.start()
        until(lambda: fakes[0].asked)
        fakes[0].silent = True
        thread.join(10)
        assert answers and answers[0].json()["who"] == "b"
        fakes[0].silent = False
        until(lambda: caller.backends[fakes[0].url].alive)
        fakes[0].gate.set()
        assert {ask(caller, f"{i}" + TEXT).json()["who"] for i in range(2)} == {"a", "b"}


def test_a_server_that_has_started_anew_is_known_by_what_it_says_of_itself():
    prefill, decode = Fake("p", peer=PEER), Fake("d", peer=PEER)
    with routed(least_prefill=500, prefill=[prefill], decode=[decode]) as caller:
        prefill.about = prefill.about | {"transfer": PEER | {"engine_id": "e2"}}
        until(lambda: caller.backends[prefill.url].about.transfer.engine_id == "e2")
        ask(caller)
        assert decode.asked[0]["kv_transfer_params"]["remote_engine_id"] == "e2"


ABOUT = [[], {"transfer": "x"}, {"transfer": {"port": 3}}, {"kv_events": 3}, {"kv_events": "nonsense"}]


@pytest.mark.parametrize("about", ABOUT)
@pytest.mark.parametrize("tokens", [[], {"tokens": 5}, {"tokens": ["a"]}, {"tokens": [2**40]}])
def test_a_server_that_says_something_else_is_asked_all_the_same(about, tokens):
    fakes = [Fake("a", peer=PEER), Fake("b", peer=PEER)]
    for fake in fakes:
        fake.about, fake.tokens = about, tokens
    with routed(prefill=fakes[:1], decode=fakes[1:]) as caller:
        assert ask(caller).json()["who"] == "b"


@pytest.mark.parametrize("title", [b"with a space behind \t", "caf\u00e9".encode("latin-1"), b""])
def test_what_is_odd_in_a_request_costs_no_server(title):
    fake = Fake("a")
    with routed(replica=[fake]) as caller, socket.create_connection(("127.0.0.1", caller.base_url.port)) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 2\r\n"
        connection.sendall(head + b"x-title: " + title + b"\r\n\r\n{}")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200") and b"x-title: " + title.strip() + b"\r\n" in answer
        assert caller.backends[fake.url].alive


def test_a_path_is_passed_on_as_it_came():
    fake = Fake("a")
    with routed(replica=[fake]) as caller:
        assert caller.post("/v1/a%2Fb%3Fc", json={}).json()["who"] == "a"
        assert fake.asked[0]["path"] == "/v1/a%2Fb%3Fc"


def test_a_connection_has_the_limits_of_a_servers():
    with routed(replica=[Fake("a")]) as caller:
        assert caller.get("/health", headers={"x-long": "x" * 70_000}).status_code == 431


def test_a_server_that_breaks_off_in_the_middle_is_an_event():
    fake = Fake("a")
    with routed(replica=[fake]) as caller:
        fake.breaks = True
        answer = caller.post("/v1/completions", json={"prompt": "x", "stream": True})
        assert answer.status_code == 200 and "backend_lost_error" in answer.text and "event: error" in answer.text


def test_bodies_and_keys_are_checked_before_anybody_is_asked():
    fake = Fake("a")
    with routed(keys=("secret",), replica=[fake]) as caller:
        assert ask(caller).status_code == 401 and not fake.asked
        caller.headers["authorization"] = "Bearer secret"
        assert ask(caller).status_code == 200 and fake.asked[-1]["key"] == "Bearer secret"
        for body in (b"{", b"[]", b"[" * 100_000):
            answer = caller.post("/v1/chat/completions", content=body)
            assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        assert len(fake.asked) == 1


def test_a_long_new_prompt_is_prefilled_apart_under_one_name_and_a_short_or_known_one_is_not():
    prefill, decode = Fake("p", peer=PEER), Fake("d", peer={"engine_id": "e2", "host": "10.0.0.2", "port": None})
    with routed(least_prefill=500, prefill=[prefill], decode=[decode]) as caller:
        answer = ask(caller, stream=False, max_tokens=50, stream_options={"include_usage": True})
        assert answer.json()["who"] == "d"
        until(lambda: prefill.asked)
        (first,), (second,) = prefill.asked, decode.asked
        assert first["max_tokens"] == 1 and not first["stream"] and second["max_tokens"] == 50
        asked, given = first["kv_transfer_params"], second["kv_transfer_params"]
        assert asked["do_remote_decode"] and given["do_remote_prefill"] and given["transfer_id"] == asked["transfer_id"]
        assert (given["remote_engine_id"], given["remote_host"], given["remote_port"]) == ("e1", "10.0.0.1", 7777)
        assert "stream_options" not in first
        ask(caller)
        until(lambda: len(prefill.asked) == 2)
        assert prefill.asked[1]["kv_transfer_params"]["transfer_id"] != asked["transfer_id"]
        ask(caller, "short " * 40)
        tell(caller, decode, TEXT)
        ask(caller, TEXT + " and a little more")
        assert len(prefill.asked) == 2 and len(decode.asked) == 4


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_conversation_without_tokens_is_prefilled_apart_where_much_of_it_is_new(path):
    prefill, decode = Fake("p", peer=PEER), Fake("d", peer=PEER)
    name = "input" if path.endswith("responses") else "messages"
    with routed(least_prefill=500, prefill=[prefill], decode=[decode]) as caller:
        said = [{"role": "user", "content": TEXT}]
        for more in ("short", "word " * 1000, "short"):
            assert caller.post(path, json={name: said, "stream": False}).json()["who"] == "d"
            said += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": more}]
        until(lambda: len(prefill.asked) == 2)
        apart = [body for body in decode.asked if "kv_transfer_params" in body]
        assert [len(body[name]) for body in apart] == [1, 5] == [len(body[name]) for body in prefill.asked]
        for first, second in zip(prefill.asked, apart, strict=True):
            assert first["path"] == second["path"] == path
            asked, given = first["kv_transfer_params"], second["kv_transfer_params"]
            assert asked["transfer_id"] == given["transfer_id"] and given["remote_engine_id"] == PEER["engine_id"]
        if name == "input":
            answer = {"input": TEXT, "previous_response_id": "resp_d"}
            referred = {"input": [{"type": "item_reference", "id": "x"}, {"role": "user", "content": TEXT}]}
            thought = {"input": [{"type": "reasoning", "id": "x", "summary": []}, {"role": "user", "content": TEXT}]}
            assert {caller.post(path, json=body).json()["who"] for body in (answer, referred, thought)} == {"d"}
            assert len(prefill.asked) == 2, "the prefiller does not know what is referred to"


@pytest.mark.parametrize("how", ["refuses", "is gone", "was never there"])
def test_without_who_prefills_the_decoder_does_all_of_it(how):
    prefill, decode = Fake("p", peer=PEER), Fake("d", peer=PEER)
    if how == "was never there":
        prefill.stop()
    with routed(least_prefill=500, prefill=[prefill], decode=[decode]) as caller:
        decode.gate.clear()
        if how == "refuses":
            prefill.status = 400
        if how == "is gone":
            prefill.stop()
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(caller)))
        thread.start()
        # The decoder waits for what does not come, and is asked again without it.
        until(lambda: decode.asked and "kv_transfer_params" not in decode.asked[-1])
        decode.gate.set()
        thread.join()
        assert answers[0].json()["who"] == "d"


def test_what_concerns_all_goes_to_all_and_metrics_tell_of_each():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        told = caller.post("/v1/abort", json={"request_id": "x"}).json()
        assert set(told["backends"]) == {fake.url for fake in fakes}
        text = caller.get("/metrics").text
        assert all(f'tokenspeed_router_up{{backend="{fake.url}",kind="replica"}} 1' in text for fake in fakes)


def test_an_index_follows_what_comes_and_goes_in_any_name_space():
    cached = CachedBlocks()
    cached.apply(BlockStored([11, 12], None, [1, 2, 3, 4], 2))
    cached.apply(BlockStored([21], None, [1, 2], 2))  # the same tokens, of somebody else
    cached.apply(BlockStored([22], 21, [3, 5], 2))
    assert cached.match([1, 2, 3, 4, 9]) == 4 and cached.match([1, 2, 3, 5]) == 4 and cached.match([1, 2, 9, 9]) == 2
    assert cached.match([1]) == cached.match([2, 1]) == 0
    cached.apply(BlockRemoved([12, 99]))
    assert cached.match([1, 2, 3, 4]) == 2
    cached.apply(BlockRemoved([11]))
    assert cached.match([1, 2, 3, 5]) == 4
    for wrong in (BlockStored([1, 2], None, [1, 2, 3], 2), BlockStored([1], None, [2**31, -1], 2)):
        cached.apply(wrong)
    cached.apply(BlockStored([21], None, [8, 9], 2))  # which was said to be another
    assert cached.match([1, 2]) == 0 and cached.match([8, 9]) == 2
    cached.apply(AllBlocksCleared())
    assert cached.match([1, 2]) == 0 and len(cached) == 0


def test_after_a_gap_in_the_events_only_what_is_heard_anew_counts():
    fakes = [Fake("a"), Fake("b")]
    with routed(replica=fakes) as caller:
        tell(caller, fakes[0], TEXT)
        fakes[0].store([1] * PAGE, skip=3)
        until(lambda: known(caller, fakes[0]) == 1)


def test_an_endpoint_that_listens_everywhere_is_reached_at_its_server():
    assert _reachable("tcp://*:5557", "http://10.1.2.3:8000") == "tcp://10.1.2.3:5557"
    assert _reachable("tcp://0.0.0.0:1", "http://[::1]:8000") == "tcp://[::1]:1"
    assert _reachable("tcp://10.0.0.9:1", "http://10.1.2.3:8000") == "tcp://10.0.0.9:1"


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], "--replica URL or --decode URL is needed"),
        (["--replica", "localhost:1"], "'localhost:1' is no server's URL"),
        (["--replica", "http://a:1/v1"], "without a path"),
        (["--replica", "http://a:1", "--replica", "http://a:1/"], "given 2 times"),
        (["--prefill", "http://a:1", "--replica", "http://b:1"], "nobody would decode"),
        (["--replica", "http://a:1", "--prefill-tokens", "0"], "--prefill-tokens is 0; it must be at least 1"),
        (["--replica", "http://a:1", "--check-seconds", "nan"], "--check-seconds is nan"),
        (["--replica", "http://a:1", "--host", "0.0.0.0"], "give an --api-key"),
        (["--replica", "http://a:1", "--port", "70000"], "--port is 70000"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(options, expected, capsys):
    assert main(["route", *options]) == 1
    assert expected in capsys.readouterr().err


def test_a_prefill_is_asked_for_no_more_than_its_prompt():
    helper = Peer("e", "h", 1)
    body = {"prompt": "a", "max_tokens": 9, "min_tokens": 5, "logprobs": 3, "stream": True, "seed": 4}
    prefill, decode = split("/v1/completions", body, helper)
    assert prefill["max_tokens"] == 1 and not prefill["stream"] and prefill["seed"] == 4
    assert not {"min_tokens", "logprobs"} & set(prefill), "a prefiller would refuse more tokens than it may have"
    assert body.items() <= decode.items()
    prefill, _ = split("/v1/responses", {"input": "a", "max_output_tokens": 9}, helper)
    assert prefill["max_output_tokens"] == 1 and prefill["store"] is False
