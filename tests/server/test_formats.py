"""Grammars that would never end, or fill the memory: their client is told which limit, and nobody else notices."""

import asyncio
import itertools
import threading
import time
from pathlib import Path

import httpx
import pytest
from launch import Server

from tokenspeed.engine.chat.formats import Format
from tokenspeed.engine.checkpoint import resolve
from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.server.formats import Formats
from tokenspeed.engine.server.shares import Shares
from tokenspeed.engine.text.grammar import json_schema
from tokenspeed.engine.text.tool_grammar import ToolGrammars

SMALL = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*x{i}.*"} for i in range(20)]}
REFERENCES = {
    "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 10} for i in range(6)} | {"d6": {"type": "integer"}},
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/d0"}},
}
LISTS = {"type": "object", "properties": {"p": {"type": "array", "items": PATTERNS}}}


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(parameters):
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}


LIMIT = "needs more than"  # and then 256 MiB of memory, 2 s of computing or, on a busy machine, 30 s
BOMBS = {
    "patterns": ({"response_format": schema_format(PATTERNS)}, LIMIT),
    "patterns in a strict tool": (
        {"tools": [tool(LISTS)]},
        LIMIT,
    ),
    "references in a strict tool": ({"tools": [tool(REFERENCES)]}, "more than 1000 alternatives"),
    "a required list": ({"tools": [tool({"type": "object", "required": [[]]})]}, "required names [], which is no"),
    "too many characters": (
        {"response_format": schema_format({"type": "object", "description": "word " * 300_000})},
        "at most 1048576 are supported",
    ),
}


@pytest.fixture(scope="module")
def running():
    server = Server("--served-model-name", "tiny", "--api-key", "one", "--api-key", "two")
    yield server
    assert server.stop() == 0, "".join(server.log)


def ask(server, key="one", path="/v1/chat/completions", **more):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **more}
    return httpx.post(f"{server.url}{path}", json=body, headers={"x-api-key": key}, timeout=60)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_the_limit_and_nobody_waits(running, name):
    asked, expected = BOMBS[name]
    ask(running, "two", response_format=schema_format(SMALL))
    slowest, stop, numbers = [0.0, 0.0], threading.Event(), itertools.count()

    def look() -> tuple[float, float]:
        """Seconds of a /health, and of a small format that is new."""
        start = time.monotonic()
        assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
        between = time.monotonic()
        fresh = SMALL | {"description": f"{name} {next(numbers)}"}
        assert ask(running, "two", response_format=schema_format(fresh)).status_code == 200
        return between - start, time.monotonic() - between

    def watch() -> None:
        while not stop.is_set():
            slowest[:] = map(max, slowest, look())
            time.sleep(0.01)

    alone = look()
    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = ask(running, **asked)
    stop.set()
    watcher.join()
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert expected in message, message
    # For ever, where it waits; and a machine that is slow without a bomb is slow with one.
    assert slowest[0] < max(2, 20 * alone[0]) and slowest[1] < max(8, 20 * alone[1]), (slowest, alone)


def test_a_completion_and_an_anthropic_tool_meet_the_same_limits(running):
    prompt = {"prompt": "Hi", "max_tokens": 4, "response_format": schema_format(PATTERNS)}
    answer = httpx.post(f"{running.url}/v1/completions", json=prompt, headers={"x-api-key": "one"}, timeout=60)
    assert answer.status_code == 400 and "needs more than" in answer.json()["error"]["message"]
    tools = [{"name": "f", "input_schema": LISTS}]
    answer = ask(running, path="/v1/messages", tools=tools, tool_choice={"type": "any"})
    assert answer.status_code == 400 and "needs more than" in answer.json()["error"]["message"]
    form = {"type": "json_schema", "schema": PATTERNS}
    answer = ask(running, path="/v1/messages", output_config={"format": form})
    assert answer.status_code == 400 and "needs more than" in answer.json()["error"]["message"]


def test_a_response_and_structured_outputs_meet_the_same_limits(running):
    function = {"type": "function", "name": "f", "strict": True, "parameters": LISTS}
    form = {"type": "json_schema", "name": "n", "schema": PATTERNS}
    for path, asked in (
        ("/v1/responses", {"input": "Hi", "text": {"format": form}}),
        ("/v1/responses", {"input": "Hi", "tools": [function]}),
        ("/v1/chat/completions", {"structured_outputs": {"json": PATTERNS}}),
        ("/v1/chat/completions", {"response_format": {"type": "json_object", "schema": PATTERNS}}),
    ):
        answer = ask(running, path=path, **asked)
        assert answer.status_code == 400 and "needs more than" in answer.json()["error"]["message"], answer.text


@pytest.fixture
def formats():
    """`run(work)`: with a worker of its own on a fresh event loop."""

    def run(work):
        async def whole():
            formats = Formats(resolve(None))
            try:
                return await work(formats)
            finally:
                await formats.close()

        return asyncio.run(whole())

    return run


def test_what_is_compiled_is_what_the_text_side_makes(formats):
    strict = [tool(SMALL)]

    async def both(formats):
        asked = (Format(True, schema_format(SMALL)), Format(tools=strict, choice="required"))
        return [await formats.compile("k", "n", format) for format in asked]

    answer, call = formats(both)
    assert answer.spec == json_schema(SMALL, reasoning=True) and call.spec == ToolGrammars().spec(strict, "required")
    assert 0 <= answer.size < 64 << 20


def test_a_bomb_whose_client_goes_away_is_killed_and_others_compile_meanwhile(formats):
    async def leave(formats):
        await formats.compile("one", "", Format(False, schema_format(SMALL)))
        bombs = [Format(False, schema_format(PATTERNS | {"title": str(i)})) for i in range(6)]
        tasks = [asyncio.ensure_future(formats.compile("one", "", bomb)) for bomb in bombs]
        await asyncio.sleep(0.1)
        await formats.compile("two", "", Format(False, schema_format(SMALL | {"title": "other"})))
        unfinished = sum(not task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        children = Path(f"/proc/{formats._process.pid}/task/{formats._process.pid}/children")
        deadline = time.monotonic() + 60
        while (left := children.read_text().split()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return unfinished, left

    unfinished, left = formats(leave)
    assert unfinished > 0 and left == [], "a bomb takes seconds of computing wherever it runs"


def test_the_worker_comes_back_when_it_is_killed(formats):
    async def kill(formats):
        await formats.compile(None, "", Format(False, schema_format(SMALL)))
        formats._process.kill()
        await formats._process.wait()
        await asyncio.sleep(0.05)
        return await formats.compile(None, "", Format(False, schema_format(SMALL | {"title": "again"})))

    assert formats(kill).spec is not None


def test_what_is_remembered_is_remembered_for_its_name_space_alone(formats):
    async def jobs(formats):
        counts = []
        for name_space in ("mine", "mine", "yours"):
            await formats.compile(None, name_space, Format(False, schema_format(SMALL)))
            counts.append(next(formats._numbers))
        return counts

    first, again, other = formats(jobs)
    assert again == first + 1 and other == again + 2, "the same again starts no job, another's does"


def test_a_key_s_share_is_its_own():
    async def work():
        shares, order = Shares(1), []

        async def one(key, name, until=None):
            async with shares.one(key):
                order.append(name)
                if until:
                    await until.wait()

        async def other():
            await one("b", "b1")
            other_done.set()

        other_done = asyncio.Event()
        await asyncio.gather(one("a", "a1", other_done), one("a", "a2"), other())
        return order, shares._running

    order, left = asyncio.run(work())
    assert order == ["a1", "b1", "a2"] and left == {}


def test_a_branching_schema_is_refused_where_no_process_protects():
    with pytest.raises(RequestError, match="more than 1000 alternatives"):
        ToolGrammars().spec([tool(REFERENCES)])
