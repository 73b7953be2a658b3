"""Bodies that were right once, changed at random, against every route: no 5xx, nobody else waits, nothing grows.

    python -m tests.server.fuzz [--bodies 100000] [--seed 1]

A body that is answered with a 5xx, or not at all, is printed as it was sent.
"""

import argparse
import asyncio
import copy
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tests.server.launch import Server

# An answer without a bound, where its name was changed, ends by the time limit: 504, or an event in a stream.
MEMORY = ("--kv-pages", "192", "--state-slots", "48", "--max-body-mib", "1", "--request-timeout", "20")
ARENAS = (*MEMORY, "--max-num-seqs", "32", "--max-num-batched-tokens", "256")  # short steps: /health waits for one
CLIENTS = 16
MAX_TOKENS = 3  # a body that asks for thousands is a load test
MAX_PLACES, MAX_DEPTH = 10_000, 300  # of a body that is changed once more
SHORT, GROWTH_MIB = 400, 64  # bodies of the short form; what may be added between the middle and the end
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)

TOOL = {
    "type": "function",
    "function": {
        "name": "price",
        "description": "The price of something.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "what": {"type": "string", "enum": ["kelp", "salt"]},
                "boxes": {"anyOf": [{"type": "integer", "minimum": 1}, {"$ref": "#/$defs/all"}]},
            },
            "required": ["what"],
            "additionalProperties": False,
            "$defs": {"all": {"const": "all"}},
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "price", "arguments": '{"what": "kelp"}'}}
CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "You sell <|im_start|> things."},
        {"role": "user", "content": [{"type": "text", "text": "What is the price of kelp?"}]},
        {"role": "assistant", "content": "", "reasoning_content": "Look.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "551"},
        {"role": "user", "content": "And of salt?"},
    ],
    "max_tokens": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.7,
    "tools": [TOOL],
    "tool_choice": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "stop": ["\n\n"],
    "logit_bias": {"5": -1.5},
    "n": 2,
    "seed": 3,
    "chat_template_kwargs": {"enable_thinking": True},
}
SCHEMA = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Say it in JSON."}],
    "max_tokens": 2,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "answer",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "^[a-c]+$"}, "b": {"type": ["integer", "null"]}},
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    },
}
COMPLETION = {
    "prompt": ["The price of", "kelp is"],
    "max_tokens": 2,
    "echo": True,
    "logprobs": 1,
    "prompt_logprobs": 1,
    "min_tokens": 1,
    "stop_token_ids": [5],
    "bad_words": ["salt"],
    "allowed_token_ids": [5, 6, 7],
    "top_k": 3,
    "priority": 1,
    "timeout": 20,
    "request_id": "fuzz",
    "cache_salt": "salt",
}
ANTHROPIC = {
    "model": "tiny",
    "max_tokens": 2,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "What is the price?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "price", "input": {"what": "kelp"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "551"}]},
    ],
    "tools": [{"name": "price", "description": "d", "input_schema": TOOL["function"]["parameters"]}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "stop_sequences": ["x"],
    "stream": True,
}
FUNCTION = {"type": "function"} | TOOL["function"]
RESPONSE = {
    "model": "tiny",
    "instructions": "You sell <|im_start|> things.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "What is the price of kelp?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "price", "arguments": '{"what": "kelp"}'},
        {"type": "function_call_output", "call_id": "c", "output": "551"},
        {"type": "custom_tool_call", "id": "ctc_1", "call_id": "d", "name": "shell", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "kelp"}]},
        {"type": "message", "role": "user", "content": "And of salt?"},
    ],
    "tools": [FUNCTION, {"type": "custom", "name": "shell", "format": {"type": "grammar", "definition": "a: /b/"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object", "properties": {"a": {}}}}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content", "message.output_text.logprobs"],
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "max_output_tokens": 2,
    "stream": True,
}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", SCHEMA),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 1}),
    ("/v1/messages", ANTHROPIC),
    ("/v1/messages/count_tokens", ANTHROPIC),
    ("/v1/responses", RESPONSE),
    ("/tokenize", {"prompt": "The price of kelp", "return_token_strs": True}),
    ("/tokenize", {"messages": CHAT["messages"], "tools": [TOOL], "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/abort", {"request_id": "fuzz"}),
    ("/reset_prefix_cache", {}),
]
ANSWERS = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}
ODD = [
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**65), 0.5, -0.0, 1e308, 5e-324, 10**400),
    *("", "x", "none", "auto", "\x00", "\u2028", "<|im_end|>", "</think>", "<tool_call>", "e\u0301", "🙂" * 40),
    *("nextxxxx", "^(a+)+$", "a" * 2000, "#/$defs/all", "#", "http://attacker.example/x", "__class__", "{{ 7 * 7 }}"),
    *([], {}, [[]], [{}], {"": ""}, [None], {"type": []}, {"type": {}}, {"type": "text", "text": 5}, ["a", 1]),
    *({"allOf": [{"type": "string"}, {"pattern": "(a|b)*c"}]}, {"anyOf": []}, {"$ref": "#"}, {"not": {}}),
    *({"enum": []}, {"enum": [1, "1", None]}, {"type": "array", "minItems": 9, "maxItems": 3}, {"minLength": -1}),
]


@dataclass
class Report:
    """statuses: by route and status; failures: what should not have happened; worst: seconds of the slowest /health;
    growth: by process, MiB between the middle and the end."""

    statuses: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0
    growth: dict[str, float] = field(default_factory=dict)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside a JSON value, down to MAX_DEPTH."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items if len(path) < MAX_DEPTH else ():
        found += places(item, (*path, key))
    return found


def mutated(body: dict[str, Any], luck: random.Random) -> bytes:
    """A copy with a few of its values replaced, moved, repeated, wrapped or taken out; at times its text as well."""
    body = copy.deepcopy(body)
    for _ in range(luck.choice((0, 1, 1, 1, 2, 3, 6))):
        if not 0 < len(all_places := places(body)) < MAX_PLACES:  # copies of copies would fill the memory
            break
        if max(map(len, all_places)) > MAX_DEPTH // 2:  # and this process could not write what is nested deeper
            break
        *way, last = luck.choice(all_places)
        inside: Any = body
        for key in way:
            inside = inside[key]
        match luck.randrange(9):
            case 0:
                del inside[last]
            case 1:
                inside[last] = [inside[last]] * luck.choice((1, 2, 40))
            case 2:
                inside[last] = {"type": inside[last]}
            case 3:
                for _ in range(luck.choice((5, 70, 200))):
                    inside[last] = [inside[last]] if luck.random() < 0.5 else {"items": inside[last]}
            case 4:
                *other, name = luck.choice(all_places)
                source: Any = body
                try:
                    for key in (*other, name):
                        source = source[key]
                except (KeyError, IndexError, TypeError):  # it is gone already
                    continue
                inside[last] = copy.deepcopy(source)
            case 5 if isinstance(inside, dict):
                name = luck.choice(("$ref", "type", "extra", "", "pattern", "role", "content"))
                inside[name] = copy.deepcopy(luck.choice(ODD))
            case _:
                inside[last] = copy.deepcopy(luck.choice(ODD))
    for name in ("max_tokens", "max_output_tokens"):
        asked = body.get(name)
        if not isinstance(asked, str | list | dict):
            body[name] = min(asked, MAX_TOKENS) if isinstance(asked, int) else MAX_TOKENS
    if isinstance(body.get("max_completion_tokens"), int):
        del body["max_completion_tokens"]
    data = bytearray(json.dumps(body).encode())
    if luck.random() < 0.05:
        data = bytearray(
            luck.choice((b"", b"null", b"[]", b'"x"', b"NaN", b'{"prompt": "\\ud800"}', b"\xff\xfe", b"{" * 500))
        )
    elif luck.random() < 0.1:
        for _ in range(luck.randrange(1, 4)):
            at = luck.randrange(len(data))
            data[at : at + luck.randrange(3)] = luck.choice(
                (b"", b"\x00", b'"', b"\\u", b"{", b",", b"\xc3", b"1e999", b"NaN")
            )
    return bytes(data)


async def _fuzz(server: Server, bodies: int, seed: int, progress: bool) -> Report:
    report, numbers = Report(), iter(range(bodies))
    resident: list[dict[str, float]] = []
    processes = {"server": server.process.pid, "engine": server.engine_pid()}
    done = asyncio.Event()

    def fail(what: str) -> None:
        report.failures.append(what)
        tqdm.write(what[:20_000])

    async def client(bar: tqdm, session: httpx.AsyncClient) -> None:
        for number in numbers:
            luck = random.Random(seed * 1_000_003 + number)
            path, body = luck.choice(SEEDS)
            data = mutated(body, luck)
            kind = luck.choice(("application/json",) * 9 + ("text/plain",))
            try:
                answer = await session.post(path, content=data, headers={"content-type": kind})
                if answer.status_code >= 500 and answer.status_code != 504:  # which many a body asks for: `timeout`
                    fail(f"{answer.status_code} {path} {data!r}: {answer.text[:300]}")
                elif answer.status_code >= 400 and not isinstance(answer.json()["error"]["message"], str):
                    fail(f"no message: {path} {data!r}: {answer.text[:300]}")
                elif answer.status_code == 200 and b'"code":500' in answer.content:
                    fail(f"500 in a stream: {path} {data!r}: {answer.text[-300:]}")
                report.statuses[path, answer.status_code] += 1
            except Exception as error:  # whatever it is: this body did it
                fail(f"{type(error).__name__}: {error}: {path} {data!r}")
            if number in (bodies // 2, bodies - 1):
                resident.append({name: _resident_mib(pid) for name, pid in processes.items()})
            bar.update()

    async def watch(session: httpx.AsyncClient) -> None:
        while not done.is_set():
            start = time.monotonic()
            answer = await session.get("/health")
            report.worst = max(report.worst, time.monotonic() - start)
            if answer.status_code != 200:
                fail(f"/health: {answer.status_code} {answer.text}")
            await asyncio.sleep(0.02)

    bar = tqdm(total=bodies, unit="body", disable=not progress, file=sys.stderr)
    with bar:
        async with httpx.AsyncClient(base_url=server.url, timeout=90) as session:
            watching = asyncio.create_task(watch(session))
            await asyncio.gather(*(client(bar, session) for _ in range(CLIENTS)))
            done.set()
            await watching
    report.growth = {name: resident[-1][name] - resident[0][name] for name in processes}
    return report


def fuzz(server: Server, bodies: int, seed: int = 1, progress: bool = True) -> Report:
    return asyncio.run(_fuzz(server, bodies, seed, progress))


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_MIB


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--bodies", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--seed", type=int, default=1, help="which (default 1)")
    options = parser.parse_args()
    server = Server(*ARENAS)
    try:
        report = fuzz(server, options.bodies, options.seed)
    finally:
        status = server.stop()
    codes = Counter()
    for (_, code), count in report.statuses.items():
        codes[code] += count
    print(f"{options.bodies} bodies: {dict(codes)}; {len(report.failures)} failures; exit status {status}")
    print(f"worst /health {1000 * report.worst:.0f} ms; growth of the second half in MiB: {report.growth}")
    return int(bool(report.failures) or status != 0 or max(report.growth.values()) > GROWTH_MIB)


if __name__ == "__main__":
    sys.exit(main())
