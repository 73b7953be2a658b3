"""Two engines, on one card or on one each: what long prefills in one do to the time between tokens in the other.

    python -m benchmarks.disaggregation --model DIRECTORY [--prompt-tokens 50000] [--mps 50 30] [--json FILE]

Streams decode on a server of role decode; meanwhile a server of role prefill, a process of its own on the same device,
prefills long prompts, first for nobody and then for requests that are decoded beside the streams. The last row is one
server that does both. With --mps both are clients of CUDA's multi-process service instead, which is started for them:
work of both runs at once, the prefilling server's on a part of the multiprocessors.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

import httpx
import numpy as np

_START_SECONDS = 900
_IDS = 256  # of prompts, which every vocabulary has
_SERVING = re.compile(r"serving \S+ at (http://\S+)/v1")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disaggregation", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint (default: the shipped one)")
    add("--load-format", help="dummy: random weights, of whatever the checkpoint's config.json says")
    add("--device", default="auto", help="of both servers (default auto)")
    add("--prefill-device", help="of the prefilling server, as cuda:1 beside cuda:0 (default: --device)")
    add("--prompt-tokens", type=int, default=50_000, help="of each prompt that is prefilled meanwhile (default 50000)")
    add("--prompts", type=int, default=3, help="of them, one after the other (default 3)")
    add("--streams", type=int, default=8, help="sequences that decode meanwhile (default 8)")
    add("--stream-tokens", type=int, default=200, help="of each stream's prompt (default 200)")
    add("--max-tokens", type=int, default=4000, help="of each stream, then it begins anew (default 4000)")
    add(
        "--memory",
        type=float,
        help="of the device's memory for each of two servers, as 0.44 on a GPU (default: theirs)",
    )
    add("--batch-tokens", type=int, default=2048, help="of one step of the prefilling server (default 2048)")
    add("--draft-tokens", default="0", help="of all servers (default 0: one token a step, so that times compare)")
    add("--seconds", type=float, default=10, help="idle measurement (default 10)")
    add(
        "--mps",
        type=int,
        nargs="+",
        choices=range(1, 101),
        metavar="PERCENT",
        help="of the multiprocessors, the most that the prefilling server uses under CUDA's multi-process service; "
        "measured once for each",
    )
    add(
        "--mps-decode",
        type=int,
        choices=range(1, 101),
        metavar="PERCENT",
        help="with --mps, the most that the decoding server uses (default 100)",
    )
    add("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    common = ["--draft-tokens", options.draft_tokens, "--threads", "1"]
    common += ["--model", options.model] if options.model else []
    common += ["--gpu-memory-utilization", str(options.memory)] if options.memory else []
    common += ["--load-format", options.load_format] if options.load_format else []
    device, prefill_device = ["--device", options.device], ["--device", options.prefill_device or options.device]
    batch = ["--max-num-batched-tokens", str(options.batch_tokens)]
    rows = {}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(multi_process_service()) if options.mps else {}
        decode = stack.enter_context(
            server(*common, *device, "--role", "decode", **at_most(service, options.mps_decode))
        )
        for share in options.mps or [None]:
            of = f", {share} %" if share else ""
            with server(*common, *prefill_device, *batch, "--role", "prefill", **at_most(service, share)) as prefill:
                if "idle" not in rows:
                    rows["idle"] = measure(options, decode, lambda: time.sleep(options.seconds))
                beside = measure(options, decode, lambda prefill=prefill: prompts(options, prefill, None))
                for_it = measure(options, decode, lambda prefill=prefill: prompts(options, prefill, decode))
                rows |= {f"prefill beside{of}": beside, f"prefill for it{of}": for_it}
    if not options.mps:
        with server(*common, *device, *batch) as both:
            rows["one server"] = measure(options, both, lambda: prompts(options, None, both))
    idle = rows["idle"]["p99"]
    print(f"{'':22}{'ITL p50':>10}{'p99':>10}{'max':>10}{'p99 / idle':>12}{'tokens':>8}{'a prompt, s':>13}")
    for name, row in rows.items():
        times = "".join(f"{1000 * row[key]:>7.1f} ms" for key in ("p50", "p99", "max"))
        print(f"{name:22}{times}{row['p99'] / idle:>11.2f}x{row['tokens']:>8}{row['seconds']:>13.2f}")
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"json": None, "rows": rows}, indent=1))
    return 0


@contextlib.contextmanager
def multi_process_service():
    """CUDA's multi-process service, with a folder of its own; what its clients need in their environment."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        raise SystemExit("--mps needs nvidia-cuda-mps-control, a part of NVIDIA's driver, on the PATH")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        clients = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in clients.values():
            os.mkdir(path)
        environment = os.environ | clients
        subprocess.run([control, "-d"], env=environment, check=True)
        try:
            yield clients
        except BaseException:
            for path in sorted(Path(folder, "log").iterdir()):
                print(f"{path.name}:", *path.read_text().splitlines()[-20:], sep="\n", file=sys.stderr)
            raise
        finally:
            subprocess.run([control], input="quit -t 10\n", text=True, env=environment, check=True)


def at_most(service: dict[str, str], percent: int | None) -> dict[str, str]:
    """The environment of a client that uses so much of the multiprocessors, where there is a service and a bound."""
    return service | ({"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent)} if service and percent else {})


@contextlib.contextmanager
def server(*given: str, **environment: str):
    """A server with these options, and with these variables added to the environment; its URL."""
    command = [sys.executable, "-m", "tokenspeed.engine", "serve", "--port", "0", *given]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        lines: list[str] = []
        begin = time.monotonic()
        while not (found := _SERVING.search(lines[-1] if lines else "")):
            line = process.stderr.readline()
            if not line or time.monotonic() - begin > _START_SECONDS:
                raise SystemExit("a server did not start:\n" + "".join(lines[-20:]))
            lines.append(line)
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


def measure(options: argparse.Namespace, url: str, meanwhile) -> dict[str, float]:
    """Seconds between the tokens of streams that decode while something is done; seconds: of each prompt of it."""
    random, ended = Random(1), threading.Event()
    times: list[list[float]] = [[] for _ in range(options.streams)]
    failed: list[str] = []

    def stream(number: int) -> None:
        ids = [random.randrange(_IDS) for _ in range(options.stream_tokens)]
        body = {"prompt": ids, "stream": True, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        body["max_tokens"] = options.max_tokens
        with httpx.Client(timeout=None) as client:
            while not ended.is_set():
                with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        failed.append(answer.read().decode())
                        return
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            times[number].append(time.monotonic())
                        if ended.is_set():
                            break

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(options.streams)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < 20 and not failed:  # all of them decode
        time.sleep(0.05)
    if failed:
        raise SystemExit(f"{url}: {failed[0][:500]}")
    begin = time.monotonic()
    spent = meanwhile() or []
    end = time.monotonic()
    ended.set()
    for thread in threads:
        thread.join()
    gaps = np.concatenate([np.diff([t for t in found if begin <= t <= end]) for found in times])
    return {
        "p50": float(np.quantile(gaps, 0.5)),
        "p99": float(np.quantile(gaps, 0.99)),
        "max": float(gaps.max()),
        "tokens": len(gaps),
        "seconds": float(np.median(spent)) if spent else 0.0,
    }


def prompts(options: argparse.Namespace, prefill: str | None, decode: str | None) -> list[float]:
    """Long prompts, one after the other: prefilled here or there, decoded there if anywhere. Seconds of each to its
    first token."""
    spent = []
    with httpx.Client(timeout=None) as client:
        about = client.get(f"{prefill}/kv_transfer").json()["transfer"] if prefill else None
        for number in range(options.prompts):
            random = Random(f"{prefill} {decode} {number}")
            name = f"benchmark-{random.getrandbits(64)}"
            body = {"prompt": [random.randrange(_IDS) for _ in range(options.prompt_tokens)], "max_tokens": 1}
            wanted = {"do_remote_decode": True, "transfer_id": name}
            given = {"do_remote_prefill": True, "transfer_id": name}
            if about:
                given |= {f"remote_{key}": about[key] for key in ("engine_id", "host", "port")}
            begin = time.monotonic()
            asked = [(prefill, body | {"kv_transfer_params": wanted})] if prefill else []
            asked += [(decode, body | ({"kv_transfer_params": given} if prefill else {}))] if decode else []
            threads = [threading.Thread(target=_post, args=pair) for pair in asked]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            spent.append(time.monotonic() - begin)
    return spent


def _post(url: str, body: dict) -> None:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=None)
    if answer.status_code != 200:
        raise SystemExit(f"{url}: {answer.status_code} {answer.text[:500]}")


if __name__ == "__main__":
    sys.exit(main())
