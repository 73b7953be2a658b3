"""How long others wait while a server is attacked: the slowest /health under each attack, and under all at once.

    python -m tests.server.siege [--seconds S] [--streams N]

Attackers share a key; another key is watched from a process of its own: /health, which the engine answers between two
steps, and /v1/models, which the event loop answers alone.
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

from tests.server.launch import ROOT, Server

OPTIONS = (
    "--api-key",
    "attacker",
    "--api-key",
    "other",
    "--max-requests",
    "600",
    "--kv-pages",
    "192",
    "--state-slots",
    "48",
)
JSON_HEAD = "Host: localhost\r\nContent-Type: application/json\r\nX-Api-Key: attacker\r\nConnection: close\r\n"
READ_NOTHING = 1024  # bytes of a receive buffer
PROBE = """
import json, sys, threading, time, httpx
url, times, stop = sys.argv[1], {"/health": [], "/v1/models": []}, threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
with httpx.Client(base_url=url, headers={"x-api-key": "other"}, timeout=120) as client:
    print("ready", flush=True)
    while not stop.is_set():
        for path, taken in times.items():
            start = time.monotonic()
            client.get(path).raise_for_status()
            taken.append(time.monotonic() - start)
        time.sleep(0.02)
print(json.dumps(times))
"""
numbers = itertools.count()


async def _post(
    address: tuple[str, int], path: str, body: bytes, read: bool = True, buffer: int | None = None
) -> bytes:
    """One request on a connection of its own; what was answered, or nothing where it is not read."""
    connection = socket.socket()
    connection.setblocking(False)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await asyncio.get_running_loop().sock_connect(connection, address)
    reader, writer = await asyncio.open_connection(sock=connection, limit=buffer or 65536)
    try:
        writer.write(f"POST {path} HTTP/1.1\r\n{JSON_HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        if read:
            return await reader.read()
        writer.transport.pause_reading()
        await asyncio.sleep(3600)
        return b""
    finally:
        writer.transport.abort()


def _stream(tokens: int, **more) -> bytes:
    return json.dumps({"prompt": "kelp", "max_tokens": tokens, "ignore_eos": True, "stream": True} | more).encode()


async def streams(address) -> None:
    await _post(address, "/v1/completions", _stream(50))


async def bombs(address) -> None:
    patterns = {"allOf": [{"type": "string", "pattern": f".*x{i}.*"} for i in range(20)], "title": str(next(numbers))}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": patterns}}
    await _post(address, "/v1/completions", json.dumps({"prompt": "a", "response_format": format}).encode())


async def tokenizes(address) -> None:
    await _post(address, "/tokenize", json.dumps({"prompt": "what is the price of kelp " * 320_000}).encode())


async def slow_readers(address) -> None:
    await _post(address, "/v1/completions", _stream(3000, logprobs=20), read=False, buffer=READ_NOTHING)


async def slow_heads(address) -> None:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(b"GET /health HTTP/1.1\r\n")
        while not reader.at_eof():
            writer.write(b"x: y\r\n")
            await asyncio.sleep(1)
    finally:
        writer.transport.abort()


async def large_bodies(address) -> None:
    body = b'{"prompt": "a", "x": [' + b"[]," * 380_000 + b"[]]}"
    await _post(address, "/v1/completions", body)


Attack = Callable[[tuple[str, int]], Awaitable[None]]


async def _siege(server: Server, attacks: list[tuple[Attack, int]], seconds: float) -> dict[str, list[float]]:
    """Seconds that the probe waited, by path, while so many clients of each attack repeat it."""
    url = urlsplit(server.url)
    address = url.hostname, url.port

    async def client(attack: Attack) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await attack(address)
            await asyncio.sleep(0.01)

    probe = subprocess.Popen(
        [sys.executable, "-c", PROBE, server.url], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert probe.stdout.readline() == "ready\n"
    clients = [asyncio.create_task(client(attack)) for attack, count in attacks for _ in range(count)]
    await asyncio.sleep(seconds)
    times, _ = await asyncio.to_thread(probe.communicate, "")
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return json.loads(times)


def _processor() -> str:
    """Its name, where the system tells."""
    told = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", told.read_text()) if told.exists() else None
    return found[1] if found else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server.siege", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=30, help="of each attack (default 30)")
    parser.add_argument("--streams", type=int, default=500, help="streams at once (default 500)")
    options = parser.parse_args()
    single: list[tuple[str, Attack, int]] = [
        (f"{options.streams} streams", streams, options.streams),
        ("8 grammars that never end", bombs, 8),
        ("8 tokenizes of 8 MB", tokenizes, 8),
        ("50 clients that read nothing", slow_readers, 50),
        ("300 heads that never end", slow_heads, 300),
        ("4 bodies of 380,000 arrays", large_bodies, 4),
    ]
    sieges = [("nothing", [])] + [(name, [(attack, count)]) for name, attack, count in single]
    sieges.append(("all of them", [(attack, count) for _, attack, count in single]))
    print(f"{_processor()}, {os.cpu_count()} cores, {datetime.date.today():%d %B %Y}\n")
    print(
        f"| attack ({options.seconds:g} s each) | /health ms: median | worst | /v1/models ms: median | worst | load |"
    )
    print("|---|---|---|---|---|---|")
    for name, attacks in sieges:
        server = Server(*OPTIONS)
        try:
            times = asyncio.run(_siege(server, attacks, options.seconds))
        finally:
            server.stop(120)
        cells = [f"{1000 * of(times[path]):.0f}" for path in times for of in (statistics.median, max)]
        print(f"| {name} | {' | '.join(cells)} | {os.getloadavg()[0]:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
