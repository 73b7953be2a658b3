"""The host tier on one GPU: a published size with random weights, its cache over the device and pinned host memory.

    python -m benchmarks.tiers --size 35B-A3B --tokens 50000 [--json FILE]

In one run: what the link carries (one large pinned copy each way), what moves carry beside it; the next turn of a long
conversation brought back from host memory beside computing it again; and decode steps with and without moves under way.
Without a GPU the shipped model shows that the script works, and no more.
"""

import argparse
import json
import statistics
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import PAGE_TOKENS, ModelConfig
from tokenspeed.engine.executor.loading import decodes_by_kernel, slot_sizes
from tokenspeed.engine.executor.memory import HostMemory, Memory, MemoryLayout
from tokenspeed.engine.executor.mover import Mover
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights
from tokenspeed.engine.request import Request, SamplingParams
from tokenspeed.engine.schedule.cache import CacheConfig, PrefixCache
from tokenspeed.engine.schedule.scheduler import Continuation, Leaving, Limits, Planned, Scheduler, State
from tokenspeed.engine.schedule.step import Begin, Move
from tokenspeed.engine.sizes import PUBLISHED

from .card import random_model

DECODING = 8  # sequences of the decode steps
CONTEXT = 1024  # tokens before them
STEPS = 100
MOVED = 64  # pages of each move beside them
NEVER = (1e9, 1e9, 1e-9)  # costs under which everything is computed again
ALWAYS = (0.0, 0.0, 1.0)


class Bench:
    """A scheduler over a runner with a host tier, as an Engine drives them, without text.

    spare: pages and a slot of both arenas behind those of the cache, which moves of no consequence may use.
    """

    def __init__(self, model: Qwen3_5, device: torch.device, dtype: torch.dtype, tokens: int):
        longest = max(tokens, CONTEXT + 4 * STEPS) + 4 * PAGE_TOKENS
        # Five conversations: what moves out ahead of need starts when less than a quarter is free.
        pages, slots = (5 * longest + DECODING * (CONTEXT + 4 * STEPS)) // PAGE_TOKENS, 12
        layout = MemoryLayout(model.share, dtype, *slot_sizes(model.config, 0, decodes_by_kernel(device)))
        host_pages, host_slots = 2 * pages, 2 * slots
        self.layout, self.device, self.pages, self.slots = layout, device, pages, slots
        self.host_pages, self.host_slots = host_pages, host_slots
        self.memory = Memory(layout, pages + 2 * MOVED, slots + 2, device)
        self.host = HostMemory(layout, host_pages + 2 * MOVED, host_slots + 2, device)
        self.mover = Mover(self.memory, self.host)
        self.runner = Runner(model, self.memory, DECODING, min(longest, model.config.max_context), mover=self.mover)
        self.captured = self.runner.capture(progress=False)
        self.cache = PrefixCache(
            CacheConfig(pages=pages, slots=slots, host_pages=host_pages, host_slots=host_slots, ghost_nodes=4 * pages)
        )
        self.scheduler = Scheduler(self.cache, Limits(DECODING, 2048, longest), self)
        self._in_flight: list[tuple[Planned, object]] = []
        self._own_moves: set[int] = set()

    # ---- what the scheduler asks

    def begin(self, sequence: Continuation) -> Begin:
        return Begin(sequence.index, 0.0, 0, 1.0, 0.0, 0, prompt_tokens=sequence.prompt_tokens, left=sequence.limit)

    def edits(self, sequence: Continuation, output: int) -> bool:
        return False

    def judge(self, sequence: Continuation, ids: list[int]) -> tuple[int, bool]:
        room = sequence.limit - sequence.outputs
        return min(len(ids), room), len(ids) >= room

    # ---- use

    def submit(self, prompt: Sequence[int], outputs: int) -> Continuation:
        boundaries = (len(prompt) - 1,)
        request = Request(str(time.perf_counter()), tuple(prompt), SamplingParams(max_tokens=outputs), boundaries)
        return self.scheduler.submit(request, [0])[0]

    def step(self) -> None:
        for number in self.mover.finished():
            if number in self._own_moves:
                self._own_moves.remove(number)
            else:
                self.scheduler.moved(number)
        planned = self.scheduler.plan()
        launched = None
        if planned:
            launched = self.runner.launch(planned.step)
            launched.sample()
        if self._in_flight:
            before, running = self._in_flight.pop(0)
            self.scheduler.reconcile(before, running.read().ids)
        if planned:
            self._in_flight.append((planned, launched))

    def run(self, sequence: Continuation) -> float:
        """Seconds until its first id is known; then all of it is run to its end."""
        start, first = time.perf_counter(), 0.0
        while sequence.state is not State.ENDED or self._in_flight:
            self.step()
            if not first and sequence.outputs:
                first = time.perf_counter() - start
        return first

    def settle(self) -> None:
        """Until nothing is under way."""
        while self.cache.stats()["moves_under_way"] or self._own_moves:
            self.step()

    def move_something(self, number: int, out: bool) -> None:
        """A move beside the cache's, of pages that nobody uses."""
        device = tuple(range(self.pages + MOVED * out, self.pages + MOVED * (out + 1)))
        host = tuple(range(self.host_pages + MOVED * out, self.host_pages + MOVED * (out + 1)))
        slots = (self.slots + out, self.host_slots + out)
        ends = (device, host, *slots) if out else (host, device, *reversed(slots))
        self._own_moves.add(number)
        self.mover.launch([Move(number, out, *ends)])


def link(device: torch.device, size: int) -> dict[str, float]:
    """GB/s of one large copy between device and pinned host memory, each way: the ceiling."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    data = torch.zeros(size, dtype=torch.uint8, device=device)
    rates = {}
    for name, source, target in (("out", data, host), ("in", host, data)):
        times = []
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            synchronize(device)
            times.append(time.perf_counter() - start)
        rates[name] = size / min(times) / 1e9
    return rates


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def move_rates(bench: Bench) -> dict[str, float]:
    """GB/s of moves of `MOVED` pages and a slot, eight in a row, each way."""
    rates = {}
    for name, out in (("out", True), ("in", False)):
        times = []
        for attempt in range(4):
            synchronize(bench.device)
            start = time.perf_counter()
            for i in range(8):
                bench.move_something(-1 - 8 * attempt - i, out)
            bench.settle()
            synchronize(bench.device)
            times.append(time.perf_counter() - start)
        size = 8 * (MOVED * bench.layout.page_bytes + bench.layout.slot_bytes)
        rates[name] = size / min(times) / 1e9
    return rates


def there_and_back(bench: Bench, tokens: int) -> dict:
    """Seconds to the first id of a conversation's next turn: from host memory, and computed again."""
    vocabulary = bench.runner.model.config.vocab
    random = torch.Generator().manual_seed(1)

    def text(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=random).tolist()

    conversation = text(tokens)
    cold = bench.run(bench.submit(conversation, 4))
    found = {"cold_s": cold}
    for name, costs in (("moved_s", ALWAYS), ("computed_s", NEVER)):
        for _ in range(40):  # others come, until the conversation is in host memory alone
            match = bench.cache.probe("", array("i", conversation + text(1)))
            if match.moved_tokens:
                break
            bench.run(bench.submit(text(tokens), 4))
            bench.settle()
        bench.cache.set_costs(*costs)
        turn = bench.submit(conversation + text(100), 4)
        found[name] = bench.run(turn)
        found[name.replace("_s", "_reuse")] = str(turn.reuse)
        if (turn.reuse.moved_tokens > 0) != (costs is ALWAYS):
            raise SystemExit(f"{name}: {turn.reuse}; before it {match}")
        bench.cache.set_costs(*ALWAYS)
    found["times_faster"] = found["computed_s"] / found["moved_s"]
    return found


def decode_beside_moves(bench: Bench) -> dict[str, float]:
    """Median milliseconds of a decode step of `DECODING` sequences: alone, and with moves both ways under way."""
    bench.settle()
    vocabulary = bench.runner.model.config.vocab
    random = torch.Generator().manual_seed(2)
    sequences = [
        bench.submit(torch.randint(vocabulary, (CONTEXT,), generator=random).tolist(), 4 * STEPS)
        for _ in range(DECODING)
    ]
    while any(sequence.outputs < 8 for sequence in sequences):
        bench.step()
    number, times = -1_000_000, {"alone": [], "beside moves": []}
    for _ in range(2):
        for name, taken in times.items():
            for _ in range(STEPS // 2):
                start = time.perf_counter()
                while name != "alone" and len(bench._own_moves) < 4:
                    bench.move_something(number, number % 2 == 0)
                    number -= 1
                bench.step()
                taken.append(time.perf_counter() - start)
            while bench._own_moves:
                bench.step()
    for sequence in sequences:
        bench.scheduler.end(sequence, Leaving.ABORTED)
    while not bench.scheduler.idle or bench._in_flight:
        bench.step()
    return {name: statistics.median(taken) * 1e3 for name, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers", description=__doc__)
    parser.add_argument("--size", choices=list(PUBLISHED), default="35B-A3B")
    parser.add_argument("--tokens", type=int, default=50_000, help="of the conversation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the row there")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    if on_gpu:
        model = random_model(PUBLISHED[options.size])
    else:
        print("No CUDA device: the shipped model on the CPU shows that the script works, and nothing of a link.")
        model = Qwen3_5.empty(ModelConfig.from_directory(SHIPPED), dtype, device)
        load_weights(model, SHIPPED, progress=False)
    bench = Bench(model, device, dtype, options.tokens)
    row = {"size": options.size if on_gpu else "shipped", "tokens": options.tokens, "graphs": bench.captured}
    row["page_bytes"], row["slot_bytes"] = bench.layout.page_bytes, bench.layout.slot_bytes
    row["link_gb_s"] = link(device, (1 << 30) if on_gpu else (64 << 20))
    row["moves_gb_s"] = move_rates(bench)
    row["share_of_link"] = {name: row["moves_gb_s"][name] / row["link_gb_s"][name] for name in row["link_gb_s"]}
    print(f"link {row['link_gb_s']}, moves {row['moves_gb_s']} GB/s, share {row['share_of_link']}", flush=True)
    row["turn"] = there_and_back(bench, options.tokens)
    print(f"next turn of {options.tokens:,} tokens: {row['turn']}", flush=True)
    row["decode_ms"] = decode_beside_moves(bench)
    print(f"decode step of {DECODING}: {row['decode_ms']} ms", flush=True)
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
