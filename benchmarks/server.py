"""What the server adds to the engine: one client, one request at a time, beside the same engine in this process.

    python -m benchmarks.server [--rounds N] [--tokens N] [--json FILE]

Rounds of both alternate, so that a busy machine slows both alike; the medians are compared. The client is a plain
socket on loopback. What is added: HTTP, the engine process, two messages a token, JSON; the in-process engine renders
and tokenises the same conversation too.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams

MESSAGES = [{"role": "user", "content": "What is the price of kelp, and how many boxes are left in the harbour?"}]
GOALS = {"first_ms": 3.0, "token_us": 150.0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="of each, after two that warm up (default 20)")
    parser.add_argument("--tokens", type=int, default=200, help="generated in each round (default 200)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    llm = LLM(progress=False, device="cpu", threads=1)
    process, address = start()
    try:
        times = {"in process": [], "server": []}
        for _ in tqdm(range(options.rounds + 2), desc="rounds", unit="round", leave=False, disable=None):
            times["in process"].append(in_process(llm, options.tokens))
            times["server"].append(over_http(address, options.tokens))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    rows = {name: figures(samples[2:]) for name, samples in times.items()}
    rows["added"] = {key: rows["server"][key] - rows["in process"][key] for key in GOALS}
    for name, row in rows.items():
        print(f"{name:11} first token {row['first_ms']:7.2f} ms   each after it {row['token_us']:7.0f} us")
    print("goals:      first token    3.00 ms   each after it     150 us added")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def start() -> tuple[subprocess.Popen, tuple[str, int]]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "tokenspeed.engine", "serve", "--port", "0", "--device", "cpu", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " at http://" in line:
            # The log goes on; nobody reads it, and one line a request stays within the pipe.
            url = urlsplit(line.split(" at ")[1].strip())
            return process, (url.hostname, url.port)
    raise SystemExit("the server ended early:\n" + "".join(lines))


def in_process(llm: LLM, tokens: int) -> list[float]:
    """Seconds from the call to each token."""
    begin = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    encoded = llm.frontend.template.encode(MESSAGES, None, name_space="")
    # The server's own boundaries: where states are kept decides how much of the prompt the next round computes.
    request = llm.frontend.request(f"{begin}", encoded.ids, params, encoded.boundaries)
    return [time.perf_counter() - begin for _ in llm.follow([request])]


def over_http(address: tuple[str, int], tokens: int) -> list[float]:
    """Seconds from the connection to each token's event."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"return_token_ids": True}  # one event a token, also where it completes no text
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    )
    times = []
    begin = time.perf_counter()
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        with connection.makefile("rb") as lines:
            for line in lines:
                if line.startswith(b"data: ") and b'"token_ids":[' in line:
                    times.append(time.perf_counter() - begin)
    if len(times) != tokens:
        raise SystemExit(f"the server sent {len(times)} tokens of {tokens}")
    return times


def figures(rounds: list[list[float]]) -> dict[str, float]:
    """Medians over rounds: to the first token, and between tokens after it."""
    return {
        "first_ms": statistics.median(times[0] for times in rounds) * 1e3,
        "token_us": statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in rounds) * 1e6,
    }


if __name__ == "__main__":
    sys.exit(main())
