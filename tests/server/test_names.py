"""A client's name for a request means something inside its key, and nothing on its way to one reaches another."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from launch import Server

from tokenspeed.engine.chat.formats import Format
from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.request import Request, SamplingParams, Update
from tokenspeed.engine.server.formats import Compiled
from tokenspeed.engine.server.metrics import Metrics
from tokenspeed.engine.server.names import Names
from tokenspeed.engine.server.service import Service, ServiceConfig, caller

STREAM = {"prompt": "The price of kelp", "max_tokens": 3000, "ignore_eos": True, "stream": True, "request_id": "same"}


@pytest.fixture(scope="module")
def url():
    server = Server("--served-model-name", "tiny", "--api-key", "one", "--api-key", "two")
    yield server.url
    assert server.stop() == 0, "".join(server.log)


def post(url, key, path="/v1/completions", **body):
    return httpx.post(f"{url}{path}", json=body, headers={"x-api-key": key}, timeout=30)


def streaming(url, key, **more):
    return httpx.stream("POST", f"{url}/v1/completions", json=STREAM | more, headers={"x-api-key": key}, timeout=30)


def test_two_keys_use_one_name_at_a_time_and_each_aborts_its_own(url):
    with streaming(url, "one") as first, streaming(url, "two") as second:
        lines = [response.iter_lines() for response in (first, second)]
        assert (first.status_code, second.status_code) == (200, 200)
        for its in lines:
            next(its)
        assert post(url, "two", "/v1/abort", request_id="same").json() == {"aborted": True}
        ended = [json.loads(line[6:]) for line in lines[1] if line.startswith("data: {")]
        assert ended[-1]["choices"][0]["finish_reason"] == "abort"
        assert "abort" not in next(line for line in lines[0] if line), "the other key's goes on"
        assert post(url, "two", "/v1/abort", request_id="same").json() == {"aborted": False}
        assert post(url, "one", "/v1/abort", request_id="same").json() == {"aborted": True}


def test_who_takes_over_a_name_hears_nothing_of_who_had_it(url):
    asked = {
        "prompt": "How many boxes",
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    alone = post(url, "two", **asked).json()["choices"][0]["token_ids"]
    for _ in range(25):
        with streaming(url, "one") as response:
            next(response.iter_lines())
        found = post(url, "two", **asked, request_id="same")
        assert found.status_code == 200 and found.json()["choices"][0]["token_ids"] == alone


def test_an_abort_ends_every_prompt_of_a_completion(url):
    with streaming(url, "one", prompt=["One", "Two"], request_id="pair") as response:
        lines = response.iter_lines()
        next(lines)
        assert post(url, "one", "/v1/abort", request_id="pair").json() == {"aborted": True}
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    ends = [event["choices"][0] for event in events if event["choices"][0]["finish_reason"]]
    assert {(end["index"], end["finish_reason"]) for end in ends} == {(0, "abort"), (1, "abort")}


def test_a_response_is_its_keys_alone(url):
    mine = post(url, "one", "/v1/responses", input="Remember: The price of kelp is 551.").json()
    item = {"type": "item_reference", "id": mine["output"][0]["id"]}
    asked = {"max_output_tokens": 2, "input": "And of salt?"}
    assert post(url, "two", "/reset_prefix_cache").json() == {"reset": True}, "responses are no cache"
    for more in ({"previous_response_id": mine["id"]}, {"input": [item]}):
        assert post(url, "one", "/v1/responses", **asked | more).status_code == 200
        other = post(url, "two", "/v1/responses", **asked | more)
        assert other.status_code == 400 and "not found" in other.json()["error"]["message"]
    for method in ("GET", "DELETE"):
        path = f"{url}/v1/responses/{mine['id']}"
        assert httpx.request(method, path, headers={"x-api-key": "two"}).status_code == 400
        assert httpx.request(method, path, headers={"x-api-key": "one"}).status_code == 200
    assert httpx.get(path, headers={"x-api-key": "one"}).status_code == 400, "it was deleted"


def test_an_item_is_referenced_once(url):
    mine = post(url, "one", "/v1/responses", input="Remember: The price of kelp is 551.").json()
    item = {"type": "item_reference", "id": mine["output"][0]["id"]}
    answer = post(url, "one", "/v1/responses", input=[item, item])
    assert answer.status_code == 400 and "input[1]" in answer.text and "twice" in answer.text


def test_an_abort_ends_a_response(url):
    body = {"input": "How many boxes are left?", "stream": True}
    with httpx.stream("POST", f"{url}/v1/responses", json=body, headers={"x-api-key": "one"}, timeout=30) as response:
        lines = response.iter_lines()
        begun = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
        name = begun["response"]["id"]
        assert post(url, "two", "/v1/abort", request_id=name).json() == {"aborted": False}
        post(url, "one", "/v1/abort", request_id=name)
        assert any(line.startswith("event: response.") for line in lines), "it ends in order"


class Recorder:
    """Stands where the engine is: tells each request one token and keeps the ids it was given."""

    def __init__(self):
        self.ids: list[str] = []
        self.ready = SimpleNamespace(transfer=None)

    async def abort(self, id):
        return id in self.ids

    async def generate(self, submit, timeout=None):
        self.ids.append(submit.request.id)
        await asyncio.sleep(0)
        yield Update(submit.request.id, 0, [1], "a", finish_reason="length")


def test_the_engine_s_ids_are_never_the_same_and_never_the_client_s():
    engine = Recorder()
    service = object.__new__(Service)
    service.engine, service.config, service.names, service.metrics = engine, ServiceConfig("m"), Names(), Metrics()

    async def ask(key, name):
        caller.set(key)
        return [update async for update in service.run(Request(name, (1,), SamplingParams()))]

    async def everybody():
        tasks = [asyncio.create_task(ask(key, "x")) for key in ("one", "two", None)]
        await asyncio.gather(*tasks)
        await ask("one", "x")

    asyncio.run(everybody())
    assert len(set(engine.ids)) == 4 and "x" not in engine.ids


def test_a_name_is_free_again_however_its_request_ends():
    names = Names()
    with names.used("k", "n") as first:
        assert names.ids("k", "n") == [first] and names.ids("other", "n") == []
        with pytest.raises(RequestError, match="'n' is in use"), names.used("k", "n"):
            pass
        with names.used("k", "n", 1) as second:
            assert names.ids("k", "n") == [first, second]
    with pytest.raises(ValueError), names.used("k", "n") as third:
        raise ValueError
    assert third not in (first, second) and names.ids("k", "n") == [] and not names._running


def test_a_request_whose_format_is_being_compiled_can_be_aborted():
    engine, started, go_on = Recorder(), asyncio.Event(), asyncio.Event()
    service = object.__new__(Service)
    service.engine, service.config, service.names, service.metrics = engine, ServiceConfig("m"), Names(), Metrics()
    service._compiling = set()

    async def compile(*arguments):
        started.set()
        await go_on.wait()
        return Compiled(None, 0)

    service.formats = SimpleNamespace(compile=compile)

    async def ask(name, **params):
        request = Request(name, (1,), SamplingParams(**params))
        return [update.finish_reason async for update in service.run(request, Format())]

    async def everybody():
        asking = [asyncio.create_task(ask("x", n=2)), asyncio.create_task(ask("y"))]
        await started.wait()
        assert await service.abort("x") and not await service.abort("z")
        go_on.set()
        return await asyncio.gather(*asking)

    assert asyncio.run(everybody()) == [["abort", "abort"], ["length"]]
    assert len(engine.ids) == 1, "the engine never heard of the other"
