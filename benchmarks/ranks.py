"""Several GPUs of one host: the same model over 1 and over N of them, random weights, in one run.

    python -m benchmarks.ranks --size 27B --tp 2 [--ep 2] [--batches 1 8 64] [--drafts 0 3] [--json FILE]

Of each decode step its time and tokens per second, the time with the collectives left out (the difference is what they
cost, waiting included), and the share of the time that a rank's own bytes take at the copy bandwidth of this run. And
of the collectives alone: a sum of decode's sizes, the norm behind it, and the draw of ids.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.executor.ranks import free_port
from tokenspeed.engine.executor.sampling import Vocabulary
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator, ProcessCommunicator, join_ranks
from tokenspeed.engine.parallel.costs import ALL_REDUCE, IN_PARTS, always_in_parts, never_in_parts
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.quantization import PRODUCTS
from tokenspeed.engine.sizes import PUBLISHED

from .card import CUDA, Sequences, measure_decode, random_model, seconds, speed
from .timing import measure_ceilings

SUM_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128)
DRAW_ROWS = (1, 8, 64)
CHAIN = 32  # sums in one graph
DRAW_CHAIN = 4
DRAWS = (  # name, temperature, top-k, top-p
    ("greedy", 0.0, 0, 1.0),
    ("temperature", 1.0, 0, 1.0),
    ("top-k 20, top-p 0.95", 1.0, 20, 0.95),
    ("top-p 0.95", 0.5, 0, 0.95),
)
ROUNDS = 15


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=PUBLISHED, default=["27B"], help="published sizes (default 27B)")
    parser.add_argument("--tp", type=int, default=1, help="ranks that split heads, columns and vocabulary")
    parser.add_argument("--ep", type=int, default=1, help="ranks that split the experts")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="decode batch sizes")
    parser.add_argument(
        "--prefill", type=int, default=0, help="tokens of a prefill that is timed too (default 0: none)"
    )
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none", help="of weights (default none)")
    parser.add_argument("--drafts", nargs="+", default=["0"], metavar="K[:MEAN]", help="as in benchmarks.card")
    parser.add_argument("--skip-one", action="store_true", help="leave out the run on one GPU")
    parser.add_argument("--skip-sums", action="store_true", help="leave out the collectives alone")
    parser.add_argument("--seconds", type=float, default=290, help="ranks that take longer are ended (default 290)")
    parser.add_argument("--nccl-alone", action="store_true", help="no sums and draws by peer memory")
    parser.add_argument("--draws-alone", action="store_true", help="measure the draw of ids and nothing else")
    parser.add_argument("--json", type=Path, help="append each size's figures to this JSONL file")
    parser.add_argument("--worker", nargs=2, metavar=("RANK", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options, int(options.worker[0]), options.worker[1])
    try:
        mesh = Mesh(options.tp, options.ep)
    except ConfigError as error:
        parser.error(str(error))
    if torch.cuda.device_count() < mesh.world:
        print(f"tp {mesh.tp} and ep {mesh.ep} need {mesh.world} GPUs; torch finds {torch.cuda.device_count()}.")
        return 2
    failed = False
    for size in options.size:
        for ranks in ((1, 1), (options.tp, options.ep)):
            if ranks == (1, 1) and options.skip_one and mesh.world > 1:
                continue
            failed |= run_ranks(size, *ranks)
            if mesh.world == 1:
                break
    return int(failed)


def run_ranks(size: str, tp: int, ep: int) -> bool:
    """This command's other options, over the ranks as processes. Whether one failed."""
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.ranks",
        *sys.argv[1:],
        "--size",
        size,
        "--tp",
        str(tp),
        "--ep",
        str(ep),
    ]
    processes = [subprocess.Popen([*command, "--worker", str(rank), address]) for rank in range(max(tp, ep))]
    while None in (states := [process.poll() for process in processes]):
        if any(states):  # one failed, and the others wait for it in a collective
            for process in processes:
                process.kill()
        time.sleep(0.2)
    return any(states)


def work(options: argparse.Namespace, rank: int, address: str) -> int:
    """One rank's part. Rank 0 tells."""
    mesh = Mesh(options.tp, options.ep, rank)
    faulthandler.dump_traceback_later(options.seconds, exit=True)
    torch.cuda.set_device(rank)
    communicator = join_ranks(mesh, torch.device("cuda", rank), address) if mesh.world > 1 else ONE_RANK
    [size] = options.size
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        result = measure(size, communicator, options)
    if options.json and rank == 0:
        with options.json.open("a") as out:
            out.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # graphs hold collectives, and their groups would wait for them


class Alone(Communicator):
    """Collectives left out: each rank draws ids from its own slice, by the kernel of one rank."""

    def draws(self, logits: Tensor) -> "Alone":
        return self

    def sample(self, logits: Tensor, *values: Tensor) -> Tensor:
        return ops.sample(logits, *values)


@torch.inference_mode()
def measure(size: str, communicator: Communicator, options: argparse.Namespace) -> dict:
    mesh, alone = communicator.mesh, Alone(communicator.mesh)
    config = replace(PUBLISHED[size], fp8=PRODUCTS if options.quantization == "fp8" else frozenset())
    speeds = [speed(text) for text in options.drafts]
    ceilings = measure_ceilings("cuda")
    named = f"{size} tp {mesh.tp} ep {mesh.ep}"
    result: dict = {"size": size, "tp": mesh.tp, "ep": mesh.ep, "weights": options.quantization}
    result |= {"device": torch.cuda.get_device_name(), "copy_gbps": ceilings.copy, "decode": [], "sums": []}
    communicator.prepare(config.hidden, torch.device("cuda", torch.cuda.current_device()), options.prefill)
    if options.nccl_alone and mesh.world > 1:
        communicator = communicator.without_peers()
    print(f"{named}: {communicator.describe()}, copy {ceilings.copy:.0f} GB/s", flush=True)
    if options.draws_alone:
        result["draws"] = measure_draws(named, config.vocab // mesh.tp, communicator)
        return result
    if mesh.world > 1 and not options.skip_sums:
        result["sums"] = measure_sums(communicator, config.hidden)
    model = random_model(config, any(drafts for drafts, _ in speeds), communicator)
    result["draws"] = measure_draws(named, model.share.vocab, communicator)
    if options.prefill:
        result["prefill"] = measure_forms(named, model, options.prefill)
    for batch in options.batches:
        for drafts, mean in speeds:
            decode = (batch, None, drafts, mean, ceilings)
            row = measure_decode(named, model, *decode)
            row["collective_kernels_us"] = sum(us for name, (us, _) in row["kernels"].items() if is_collective(name))
            if mesh.world > 1:
                model.link(alone)
                row["us_alone"] = measure_decode(f"{named} ALONE (collectives left out)", model, *decode)["us"]
                model.link(communicator)
                print(
                    f"{named}: batch {batch}, {drafts} drafts: {row['us'] / 1e3:.3f} ms a step, of which collectives "
                    f"{(row['us'] - row['us_alone']) / 1e3:.3f} ms ({row['collective_kernels_us'] / 1e3:.3f} ms in "
                    "their kernels)",
                    flush=True,
                )
            result["decode"].append(row)
            torch.cuda.empty_cache()
    return result


def is_collective(kernel: str) -> bool:
    return kernel.startswith(("nccl", "all_reduce"))


def measure_forms(named: str, model, tokens: int) -> list[dict]:
    """A prefill as it is, and where the sums over ranks have two forms, of either form."""
    measured = model.communicator.costs
    if measured is None:
        return [measure_prefill(named, model, tokens)]
    print(f"{named}: {measured}", flush=True)
    rows = []
    for form, costs in ((ALL_REDUCE, never_in_parts(model.mesh)), (IN_PARTS, always_in_parts(model.mesh))):
        model.communicator.costs = costs
        model.link()
        rows.append({"sums": form} | measure_prefill(f"{named}, {form}", model, tokens))
    model.communicator.costs = measured
    model.link()
    return rows


def measure_prefill(named: str, model, tokens: int) -> dict:
    sequences = Sequences(model, 1, tokens + 64, None)
    sequences.run(sequences.prefill(64))
    sequences.done = 0
    step = sequences.prefill(tokens)
    sequences.run(step)
    took = seconds(lambda: sequences.run(step), 3)
    print(f"{named}: prefill of {tokens} tokens {took * 1e3:.2f} ms, {tokens / took:.0f} tok/s", flush=True)
    return {"tokens": tokens, "ms": took * 1e3}


def graph_us(work: Callable[[], None], repeats: int = CHAIN) -> float:
    """Median microseconds of `work`, as often in one graph as `repeats` says. Alike on every rank."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(repeats):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return seconds(graph.replay, ROUNDS) * 1e6 / repeats


def measure_sums(communicator: ProcessCommunicator, hidden: int) -> list[dict]:
    """Of decode's sizes: the sum over ranks, and the sum with the residual and the norm behind it."""
    rows = []
    weight = torch.zeros(hidden, device=CUDA, dtype=torch.bfloat16)
    for count in SUM_ROWS:
        x, residual = (torch.randn(count, hidden, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
        row = {"rows": count, "hidden": hidden}
        for name, each in contenders(communicator).items():
            row[f"{name}_us"] = graph_us(partial(each.all_reduce, x, "world"))
            row[f"{name}_norm_us"] = graph_us(partial(normed, each, x, residual, weight))
        rows.append(row)
        times = ", ".join(f"{key[:-3]} {value:.1f} us" for key, value in row.items() if key.endswith("_us"))
        print(f"    sum of {count:3d} x {hidden}: {times}", flush=True)
    return rows


def contenders(communicator: ProcessCommunicator) -> dict[str, ProcessCommunicator]:
    """By torch.distributed alone, and with the sums that peer memory serves."""
    return {"nccl": communicator.without_peers(), "ours": communicator}


def normed(communicator: Communicator, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    done = communicator.add_rms_norm(x, residual, weight, 1e-6, "world")
    return (done or ops.add_rms_norm(communicator.all_reduce(x, "world"), residual, weight, 1e-6))[0]


def measure_draws(named: str, width: int, communicator: Communicator) -> list[dict]:
    """Of a step's ids: greedy, by temperature, and by top-k and top-p; over ranks also without peer memory. And how
    many rows get another id than one rank draws from the whole row."""
    rows = []
    torch.manual_seed(1 + communicator.mesh.rank)
    ways = contenders(communicator) if communicator.mesh.tp > 1 else {"ours": communicator}
    for batch in DRAW_ROWS:
        logits = torch.randn(batch, width, device=CUDA, dtype=torch.bfloat16) * 3
        ones, seed = torch.ones(batch, device=CUDA), torch.arange(batch, device=CUDA)
        whole = communicator.all_gather(logits, 1, "tp") if len(ways) > 1 else logits
        row: dict = {"batch": batch, "width": width}
        for name, temperature, top_k, top_p in DRAWS:
            k = torch.full((batch,), top_k, device=CUDA, dtype=torch.int32)
            values = (temperature * ones, k, top_p * ones, 0 * ones, seed, seed)
            expected = ops.sample(whole, *values)
            told = []
            for way, each in ways.items():
                vocabulary = Vocabulary(width, each)
                greedy = vocabulary.split and temperature == 0
                work = partial(vocabulary.likeliest, logits) if greedy else partial(vocabulary.sample, logits, *values)
                row[f"{name}_{way}_us"] = graph_us(work, DRAW_CHAIN)
                row[f"{name}_{way}_apart"] = int((work() != expected).sum())
                told.append(f"{way} {row[f'{name}_{way}_us']:.1f} us ({row[f'{name}_{way}_apart']} rows apart)")
            print(f"{named}: ids of {batch:3d} rows of {width}, {name}: {', '.join(told)}", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
