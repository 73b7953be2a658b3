"""One rank's decode step, alone: what a rank of a split model computes, timed on one device without the others.

    python -m benchmarks.rank --size 35B-A3B --tp 8 --ep 8 [--batch 1 8 64] [--sums local] [--json FILE]

Weights are random, collectives are local no-ops: the time is that of the rank's own work, and what it leaves out stands
beside it. With `--sums local` each sum over ranks is one over as many terms in this device's memory: its bytes and its
launch, without the way between cards.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import PAGE_TOKENS, ModelConfig
from tokenspeed.engine.errors import CapacityError, TokenSpeedError
from tokenspeed.engine.executor.device import pick_device, pick_dtype, use_threads
from tokenspeed.engine.executor.loading import check_weights
from tokenspeed.engine.executor.memory import Memory, MemoryLayout, free_memory
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import fill_with_noise
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.parallel.program import traffic
from tokenspeed.engine.schedule.step import DecodeRow, NewPages, Step
from tokenspeed.engine.sizes import PUBLISHED

ROUNDS = 21


class LocalSums(Communicator):
    """One rank alone, whose sums read as many terms as there are ranks. The others' terms are zeros."""

    def __init__(self, mesh: Mesh):
        super().__init__(mesh)
        self._zeros: dict[tuple[torch.Size, int], tuple[Tensor, Tensor]] = {}

    def describe(self) -> str:
        return (
            f"rank {self.mesh.rank} of {self.mesh.world} ALONE: a sum reads the terms of all ranks from this device, "
            "so times and bytes are real but for the way between devices, and results are not the model's"
        )

    def all_reduce(self, x: Tensor, group: str, largest: bool = False) -> Tensor:
        others = self.mesh.size(group) - 1
        if largest or others == 0 or not x.is_floating_point():
            return x
        if (x.shape, others) not in self._zeros:
            self._zeros[x.shape, others] = x.new_ones(1, others), x.new_zeros(others, x.numel())
        row = x.view(1, -1)
        torch.addmm(row, *self._zeros[x.shape, others], out=row)
        return x


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="shipped", help=f"shipped (default) or one of {', '.join(PUBLISHED)}")
    parser.add_argument("--tp", type=int, default=1, help="ranks that split heads, columns and vocabulary")
    parser.add_argument("--ep", type=int, default=1, help="ranks that split the experts")
    parser.add_argument("--rank", type=int, default=0, help="which of the ranks to be (default 0)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="sequences a step (default 1 8 64)")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the step (default 4096)")
    parser.add_argument("--sums", choices=["none", "local"], default="none", help="sums over ranks (default none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if options.size != "shipped" and options.size not in PUBLISHED:
        parser.error(f"--size {options.size!r} is not published; it must be shipped or one of {', '.join(PUBLISHED)}")
    config = ModelConfig.from_directory(SHIPPED) if options.size == "shipped" else PUBLISHED[options.size]
    try:
        use_threads(options.threads)
        made = LocalSums if options.sums == "local" else Communicator
        communicator = made(Mesh(options.tp, options.ep, options.rank))
        rows = measure(options.size, config, communicator, options.batch, options.context, pick_device(options.device))
    except TokenSpeedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    size: str, config: ModelConfig, communicator: Communicator, batches: list[int], context: int, device: torch.device
) -> list[dict]:
    """A row for each batch size, printed as it comes. Raises CapacityError, before anything is allocated, where the
    rank's weights and the memory of its largest batch do not fit."""
    dtype, mesh = pick_dtype("auto", device), communicator.mesh
    check_fits(config, dtype, communicator, max(batches), context, device)
    model = random_model(config, dtype, device, communicator)
    weights = sum(p.nbytes for p in model.parameters())
    sent = traffic(model.compiled, mesh, config.hidden * dtype.itemsize, model.share.vocab * dtype.itemsize)
    print(f"{size}, {str(dtype)[6:]} on {device}: {communicator.describe()}")
    local = isinstance(communicator, LocalSums)
    part = "the way between devices of " if local else ""
    print(f"{weights / 2**30:.2f} GiB of weights; left out of every time: {part}{sent.collectives} collectives a step")
    rows = []
    for batch in batches:
        runner, step = decode_step(model, dtype, batch, context, device)
        graph = runner.capture(progress=False)
        times = [timed(runner, step, device) for _ in range(ROUNDS + 2)][2:]  # the first ones warm up
        payload = batch * (sent.token + sent.logit_row)
        row = {"size": size, "tp": mesh.tp, "ep": mesh.ep, "rank": mesh.rank, "batch": batch, "context": context}
        row |= {
            "device": str(device),
            "graph": graph,
            "alone": mesh.world > 1,
            "local_sums": local,
            "ms": statistics.median(times),
        }
        rows.append(row | {"collectives": sent.collectives, "payload_bytes": payload})
        print(
            f"batch {batch:4d}, context {context}: {row['ms']:9.3f} ms a step{' as a graph' if graph else ''}, "
            f"without the others; it would put {payload / 2**10:.0f} KiB into collectives"
        )
        del runner  # its memory, before the next one's
    return rows


def check_fits(
    config: ModelConfig, dtype: torch.dtype, communicator: Communicator, batch: int, context: int, device: torch.device
) -> None:
    """Raises CapacityError with the numbers where it does not."""
    free, empty = free_memory(device), Qwen3_5.empty(config, dtype, torch.device("meta"), communicator)
    check_weights(empty, free, device.type)
    layout = MemoryLayout(empty.share, dtype)
    weights = sum(p.nbytes for p in empty.parameters())
    needed = batch * (-(-(context + 1) // PAGE_TOKENS) * layout.page_bytes + layout.slot_bytes)
    if weights + needed > free:
        raise CapacityError(
            f"{batch} sequences of {context} tokens take {needed / 2**30:.2f} GiB beside {weights / 2**30:.2f} GiB of "
            f"weights, and {free / 2**30:.2f} GiB of {device.type} memory are free: ask for fewer or shorter ones."
        )


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, communicator: Communicator) -> Qwen3_5:
    model = Qwen3_5.empty(config, dtype, device, communicator)
    fill_with_noise(model)
    return model


def decode_step(
    model: Qwen3_5, dtype: torch.dtype, batch: int, context: int, device: torch.device
) -> tuple[Runner, Step]:
    """A runner whose sequences have pages for `context` tokens of zeros, and a step of one token for each."""
    each = -(-(context + 1) // PAGE_TOKENS)
    memory = Memory(MemoryLayout(model.share, dtype), batch * each, batch, device)
    runner = Runner(model, memory, max_seqs=batch, max_tokens=each * PAGE_TOKENS)
    runner.tables.length.fill_(context)
    runner.tables.left.fill_(1)
    pages = tuple(NewPages(i, 0, tuple(range(i * each, (i + 1) * each))) for i in range(batch))
    return runner, Step(decode=tuple(DecodeRow(i, i, i) for i in range(batch)), pages=pages)


def timed(runner: Runner, step: Step, device: torch.device) -> float:
    """Milliseconds of one step, from its start on the host to its last result on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    runner.forward(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
