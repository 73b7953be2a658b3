"""Many clients that behave badly, for as long as you like, and then a look at what is left.

    python -m tests.server.soak [--seconds S] [--streams N]

The short form counts answers in place of seconds, so that no machine is too slow for it.

Clients stream, hang up at random moments, abort by id, send bodies that are too large or broken. At the end nothing may
be left over: no sequence, page or slot in use, no socket or file descriptor more than before, and memory that has
stopped growing in both processes.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from tests.server.launch import Server

SHOWN_SECONDS, WARM_UP_SECONDS, MAX_WARM_UPS, STEADY_KIB = 0.5, 4, 6, 2048
# Memory is looked at between rounds, when nothing runs: a step of many prompts takes 250 MiB for a moment.
# What the allocator gives back late, or once more, still shows, so the median of several looks counts.
ROUND_SECONDS, LEAST_ROUNDS = 20, 6
# The most that counts as flat. A short run is still warming up on a slow machine: it finds what leaks at every
# request, not more.
GROWTH_KIB_PER_MINUTE, SHORT_GROWTH_KIB_PER_MINUTE = 1536, 262144
FILLING_PROMPTS = 16
PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024
# Small arenas: they fill in the first seconds, and untouched memory would look like growth for as long as it lasts.
ARENAS = ("--kv-pages", "192", "--state-slots", "48", "--max-num-seqs", "32")
OPTIONS = (*ARENAS, "--max-requests", "400", "--max-body-mib", "1")
KINDS = ("whole", "hang up", "abort", "413", "400", "429")  # of answers
SHORT_ROUND_SECONDS = 600  # of a round that waits for answers: far more than any machine takes


@dataclass
class Report:
    """outcomes: answers by kind; memory: by process, (seconds, KiB) at rest; left: what should not be there."""

    outcomes: Counter = field(default_factory=Counter)
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: {"server": [], "engine": []})
    left: list[str] = field(default_factory=list)

    def growth(self, process: str) -> float:
        """KiB a minute, from the median of the first half to that of the second."""
        samples = self.memory[process]
        half, minutes = len(samples) // 2, (samples[-1][0] - samples[0][0]) / 60
        first, second = (median(kib for _, kib in part) for part in (samples[:half], samples[half:]))
        return 2 * (second - first) / minutes


def fill(server: Server) -> None:
    """Prompts that the engine refuses as too long, once they are encoded. What was encoded lately is remembered up to
    a size; that it grows to it would look like growth for many minutes."""
    for _ in range(FILLING_PROMPTS):
        words = " ".join(random.choices(WORDS, k=180_000))
        body = {"messages": [{"role": "user", "content": words}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text


def soak(
    server: Server, seconds: float, streams: int, seed: int = 0, progress: bool = True, each: int | None = None
) -> Report:
    """Run `streams` clients against a server for a time, or, in as few rounds as there may be, until so many answers of
    `each` kind came in every round. Rounds before it set the levels to come back to."""
    return asyncio.run(_soak(server, seconds, streams, seed, progress, each))


async def _soak(
    server: Server, seconds: float, streams: int, seed: int, progress: bool, each: int | None = None
) -> Report:
    report, host = Report(), urlsplit(server.url).netloc
    processes = {"server": server.process.pid, "engine": server.engine_pid()}
    for warm_up in range(MAX_WARM_UPS):  # pools, tables and arenas fill up
        resident = {pid: _resident_kib(pid) for pid in processes.values()}
        await _clients(host, WARM_UP_SECONDS, streams, random.Random(seed - warm_up), Report(), None)
        if all(_resident_kib(pid) - resident[pid] < STEADY_KIB for pid in resident):
            break
    before = await _idle(server, processes)
    rounds = LEAST_ROUNDS if each else max(LEAST_ROUNDS, int(seconds / ROUND_SECONDS))
    long = SHORT_ROUND_SECONDS if each else seconds / rounds
    with tqdm(total=int(seconds), unit="s", desc=f"{streams} clients", disable=not progress, file=sys.stderr) as bar:
        for number in range(rounds):
            wanted = {kind: report.outcomes[kind] + each for kind in KINDS} if each else None
            await _clients(host, long, streams, random.Random(seed + 1 + number), report, bar, wanted)
            after = await _idle(server, processes)
            for name, pid in processes.items():
                report.memory[name].append((time.monotonic(), _resident_kib(pid)))
    more = [name for name in before if after[name] > before[name]]
    report.left = [f"{name}: {before[name]} before, {after[name]} after" for name in more]
    return report


async def _clients(
    host: str,
    seconds: float,
    streams: int,
    luck: random.Random,
    report: Report,
    bar: tqdm | None,
    wanted: dict[str, int] | None = None,
) -> None:
    """Clients for a time, or until the report has the outcomes that are wanted; those that still read then hang up all
    at once."""

    async def client(own: random.Random) -> None:
        while True:
            report.outcomes[await _visit(host, own)] += 1

    clients = [asyncio.create_task(client(random.Random(luck.random()))) for _ in range(streams)]
    start, shown = time.monotonic(), bar.n if bar is not None else 0
    while (passed := time.monotonic() - start) < seconds and not any(task.done() for task in clients):
        if wanted is not None and all(report.outcomes[kind] >= count for kind, count in wanted.items()):
            break
        await asyncio.sleep(min(SHOWN_SECONDS, seconds - passed))
        if bar is not None:
            bar.set_postfix(answers=report.outcomes.total(), refresh=False)
            bar.update(min(shown + int(time.monotonic() - start), bar.total) - bar.n)
    for task in clients:
        task.cancel()
    for result in await asyncio.gather(*clients, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError):
            raise result  # a client was answered otherwise than it may be


async def _visit(host: str, luck: random.Random) -> str:
    """One connection; how it ended."""
    name, port = host.split(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    id = f"soak-{luck.getrandbits(64):x}"
    body = {
        "messages": [{"role": "user", "content": " ".join(luck.choices(WORDS, k=luck.randrange(1, 60)))}],
        "max_tokens": luck.choice((1, 4, 16, 100)),
        "ignore_eos": True,
        "stream": luck.random() < 0.9,
        "temperature": 1,
        "request_id": id,
    }
    try:
        kind = luck.choices(("whole", "hang up", "abort", "oversize", "broken"), (4, 4, 2, 1, 1))[0]
        if kind == "oversize":
            return await _refused(reader, writer, b"x" * 65536, 2 << 20, 413)
        if kind == "broken":
            return await _refused(reader, writer, b'{"messages": [', 14, 400)
        _request(writer, "/v1/chat/completions", json.dumps(body).encode())
        if kind == "hang up" and luck.random() < 0.3:
            await asyncio.sleep(luck.random() * 0.2)
            return kind  # before a byte was read
        status = int((await reader.readline()).split()[1])
        if status != 200:
            assert status == 429, (status, await reader.read())
            await asyncio.sleep(luck.random() * 0.3)
            return "429"
        read = b"".join([await reader.readline() for _ in range(luck.randrange(20) if kind != "whole" else 0)])
        if kind == "abort":
            await _abort(name, port, id)
        if kind == "hang up":
            return kind
        read += await reader.read()
        assert not body["stream"] or b"data: [DONE]" in read, read[-200:]
        return kind
    finally:
        writer.transport.abort() if luck.random() < 0.5 else writer.close()


def _request(writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def _refused(reader, writer, piece: bytes, length: int, status: int) -> str:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    fields = f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    writer.write((head + fields).encode() + piece)
    found = int((await reader.readline()).split()[1])
    assert found == status, f"{found} instead of {status}"
    return str(status)


async def _abort(name: str, port: str, id: str) -> None:
    reader, writer = await asyncio.open_connection(name, int(port))
    try:
        _request(writer, "/v1/abort", json.dumps({"request_id": id}).encode())
        assert b"200" in await reader.readline()
    finally:
        writer.close()


def _resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_KIB


async def _idle(server: Server, processes: dict[str, int], patience: float = 30) -> dict[str, int]:
    """What is held once everything has ended; waits for that, but not forever."""
    deadline = time.monotonic() + patience
    while True:
        gauges = await asyncio.to_thread(server.gauges)
        busy = ("waiting_requests", "running_sequences", "requests_in_flight", "server_tasks")
        used = ("pages_held", "slots_working", "slots_promised", "slots_draining")
        held = {name: int(gauges[name]) for name in (*busy, *used)}
        held |= {f"descriptors of the {name}": len(os.listdir(f"/proc/{pid}/fd")) for name, pid in processes.items()}
        quiet = not any(held[name] for name in (*busy[:3], *used))
        if quiet or time.monotonic() > deadline:
            await asyncio.sleep(0.5)  # the last sockets close
            held |= {f"descriptors of the {n}": len(os.listdir(f"/proc/{pid}/fd")) for n, pid in processes.items()}
            return held
        await asyncio.sleep(0.1)


WORDS = "what is the price of kelp and how many boxes are left in the harbour".split()  # noqa: SIM905


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=1200, help="how long (default 1200)")
    parser.add_argument("--streams", type=int, default=500, help="clients at once (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="what the clients do (default 0)")
    options = parser.parse_args()
    server = Server(*OPTIONS)
    try:
        fill(server)
        report = soak(server, options.seconds, options.streams, options.seed)
    finally:
        status = server.stop()
    growth = {name: report.growth(name) for name in report.memory}
    for name, kib in growth.items():
        first, last = report.memory[name][0][1], report.memory[name][-1][1]
        print(
            f"{name:7} {first / 1024:.0f} MiB at first, {last / 1024:.0f} MiB at last, growth {kib:+.0f} KiB a minute"
        )
    print(f"answers: {dict(report.outcomes)}")
    print(f"left over: {report.left or 'nothing'}; exit status {status}")
    return int(bool(report.left) or status != 0 or max(growth.values()) > GROWTH_KIB_PER_MINUTE)


if __name__ == "__main__":
    sys.exit(main())
