"""FP8 beside bf16 on one GPU, in one run and by turns: weights at short contexts, pages at a long one.

    python -m benchmarks.fp8 [--size 35B-A3B 27B] [--drafts 3:3.3] [--kernels] [--json FILE]
    python -m benchmarks.fp8 --device cpu     a toy, to see that it runs

Random weights of one seed stand in memory in both formats. A row has the median time of rounds that alternate, the
bytes that a decode step must move, and the share of its floor: those bytes at the copy rate of this run. With drafts,
which count as often as they are told to, the bytes are left out: they depend on the experts that several tokens hit.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tokenspeed.engine.config import ModelConfig, MoeConfig
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.quantization import PRODUCTS
from tokenspeed.engine.schedule.step import Step
from tokenspeed.engine.sizes import PUBLISHED
from tokenspeed.ops.fp8 import FP8

from .card import CONTEXT, Sequences, decode_bytes, kernel_times, operators, pinned, random_model, speed
from .timing import Ceilings, measure_ceilings

DECODED = 16  # steps that are timed at a time
ROUNDS = 5
FILL_TOKENS = 8192  # of all sequences, in one step
TOY = replace(
    PUBLISHED["0.8B"],
    hidden=256,
    vocab=512,
    layer_types=PUBLISHED["0.8B"].layer_types[:4],
    q_heads=8,
    kv_heads=1,
    key_heads=2,
    value_heads=2,
    ffn=MoeConfig(experts=8, top_k=2, intermediate=128, shared_intermediate=128),
)


def by_turns(works: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each work: all once unmeasured, then ROUNDS times one after the other."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for measured in [False] + [True] * ROUNDS:
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if measured:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def decoding(
    model: Qwen3_5, batch: int, context: int, kv_dtype: torch.dtype | None, drafts: int, device: torch.device
) -> Sequences:
    """`batch` sequences behind `context` tokens, with the steps that are to come captured where that is possible."""
    sequences = Sequences(model, batch, context + DECODED * (ROUNDS + 2) * (1 + drafts), kv_dtype, drafts, device)
    while sequences.done < context:
        run(sequences, [sequences.prefill(min(max(FILL_TOKENS // batch, 1), context - sequences.done))])
    sequences.runner.capture(lambda count: drafts, progress=False)
    return sequences


def run(sequences: Sequences, steps: list[Step]) -> None:
    for step in steps:
        sequences.run(step)
    while sequences.runner.queue:  # on a CPU, what waits until somebody asks for its results
        sequences.runner.advance()
    sequences.runner.finish()


def product_flops(model: Qwen3_5, tokens: int) -> float:
    """Of the products of a prefill, without attention, scans and the head."""
    ffn, active = model.config.ffn, 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not name.endswith("scale"):
            active += parameter.numel() * ffn.top_k / ffn.experts
        elif parameter.dim() == 2 and parameter.shape[0] != model.config.vocab and not name.endswith("scale"):
            active += parameter.numel()
    return 2 * active * tokens


@torch.inference_mode()
def decode_row(
    models: Mapping[str, tuple[Qwen3_5, torch.dtype | None]],
    batch: int,
    context: int,
    ceilings: Ceilings,
    device: torch.device,
    drafts: int = 0,
    mean: float = 1.0,
    kernels: bool = False,
) -> dict:
    """models: by name, with the type of their pages. A decode step of each, by turns, with as many drafts behind each
    id, of which `mean` ids a step count; kernels: and by kernel."""
    with operators(**{"accept_tokens": pinned(mean, device)} if drafts else {}):
        running = {name: decoding(model, batch, context, kv, drafts, device) for name, (model, kv) in models.items()}
        works = {name: partial(run, sequences, [sequences.decode()] * DECODED) for name, sequences in running.items()}
        took = by_turns(works, device)
        launches = {name: kernel_times(sequences) for name, sequences in running.items() if kernels}
    row: dict = {"what": "decode", "batch": batch, "context": context, "drafts": drafts, "ids_a_step": mean}
    for name, (model, kv_dtype) in models.items():
        step = took[name] / DECODED
        row[name] = {"us": step * 1e6, "tok_s": mean * batch / step}
        if not drafts:
            must = decode_bytes(model, batch, context, kv_dtype)
            floor = sum(must.values()) / (ceilings.copy * 1e9)
            row[name] |= {"bytes": must, "floor_us": floor * 1e6, "of_floor": floor / step}
        if kernels:
            row[name]["kernels"] = launches[name]
    return row


@torch.inference_mode()
def prefill_row(models: Mapping[str, Qwen3_5], tokens: int, device: torch.device) -> dict:
    """A whole prompt in one step, by turns."""
    works = {}
    for name, model in models.items():
        sequences = Sequences(model, 1, tokens, None, device=device)
        works[name] = partial(run, sequences, [sequences.prefill(tokens)])
    row: dict = {"what": "prefill", "tokens": tokens}
    for name, took in by_turns(works, device).items():
        flops = product_flops(models[name], tokens)
        row[name] = {"us": took * 1e6, "tok_s": tokens / took, "tflops_of_products": flops / took / 1e12}
    return row


def told(size: str, row: dict) -> str:
    """A row as text: each contender, then how many times as fast as the first the others are."""
    names = [name for name in row if isinstance(row[name], dict)]
    if row["what"] == "decode":
        text = f"{size} decode, batch {row['batch']}, {row['context']} tokens:"
        if row["drafts"]:
            text = text[:-1] + f", {row['drafts']} drafts, {row['ids_a_step']:.1f} ids a step:"
    else:
        text = f"{size} prefill of {row['tokens']} tokens:"
    for name in names:
        one = row[name]
        text += f"  {name} {one['us']:.0f} us"
        if row["what"] == "decode" and row["drafts"]:
            text += f", {one['us'] / row['ids_a_step']:.0f} us an id;"
        elif "bytes" in one:
            text += f", {sum(one['bytes'].values()) / 1e9:.2f} GB, {100 * one['of_floor']:.0f}% of the floor;"
        else:
            text += f", {one['tok_s']:.0f} tok/s, products at {one['tflops_of_products']:.0f} TFLOP/s;"
    return text + "".join(f"  {name} x {row[names[0]]['us'] / row[name]['us']:.2f}" for name in names[1:])


def told_kernels(row: dict) -> list[str]:
    """Of a decode row, a line for each kernel: microseconds and launches in a step of each contender, side by side."""
    columns = {name: row[name]["kernels"] for name in row if isinstance(row[name], dict) and "kernels" in row[name]}
    lines = []
    for kernel in dict.fromkeys(kernel for times in columns.values() for kernel in times):
        cells = [(name, times.get(kernel, (0.0, 0))) for name, times in columns.items()]
        lines.append("".join(f"  {name} {us:8.1f} us {count:4d} x" for name, (us, count) in cells) + f"  {kernel}")
    return lines


def measure(
    size: str,
    config: ModelConfig,
    batches: list[int],
    prefill: int,
    long_context: int,
    long_batches: list[int],
    ceilings: Ceilings,
    device: torch.device,
    speeds: Sequence[tuple[int, float]] = (),
    kernels: bool = False,
) -> list[dict]:
    """All rows of one size, told as they come. long_context, long_batches: for pages in both formats, behind FP8
    weights; speeds: (drafts, ids a step) at which decode steps are measured again; kernels: decode steps by kernel."""
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append({"size": size} | row)
        print("\n".join([told(size, row), *told_kernels(row)]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    formats = {"bf16": frozenset(), "fp8": PRODUCTS}

    def draw(mtp: bool) -> dict[str, Qwen3_5]:
        return {name: random_model(replace(config, fp8=fp8), mtp, device=device) for name, fp8 in formats.items()}

    def plain() -> dict[str, tuple[Qwen3_5, None]]:
        return {name: (model, None) for name, model in models.items()}

    models = draw(mtp=False)
    for batch in batches:
        keep(decode_row(plain(), batch, CONTEXT, ceilings, device, kernels=kernels))
    keep(prefill_row(models, prefill, device))
    eight = {name: (models["fp8"], kv_dtype) for name, kv_dtype in {"kv bf16": None, "kv fp8": FP8}.items()}
    models.clear()
    for batch in long_batches:
        keep(decode_row(eight, batch, long_context, ceilings, device))
    eight.clear()
    models = draw(mtp=True) if speeds else {}
    for batch in batches if speeds else ():
        for drafts, mean in speeds:
            keep(decode_row(plain(), batch, CONTEXT, ceilings, device, drafts, mean, kernels))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=PUBLISHED, default=["35B-A3B", "27B"], help="published sizes")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="decode batch sizes (default 1 64)")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill (default 8192)")
    parser.add_argument("--long-context", type=int, default=50176, help="tokens behind which FP8 pages race")
    parser.add_argument("--long-batches", nargs="*", type=int, default=[1, 8], help="of those (default 1 8)")
    parser.add_argument("--drafts", nargs="*", default=[], metavar="K[:MEAN]", help="decode again with drafts, as card")
    parser.add_argument("--kernels", action="store_true", help="decode steps of --batches by kernel, too")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu runs a toy in place of the sizes"
    )
    parser.add_argument("--json", type=Path, help="append each row to this JSONL file")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.fp8 needs a GPU that torch can use; --device cpu shows that it runs.")
        return 2
    ceilings = measure_ceilings(options.device)
    print(f"copy {ceilings.copy:.0f} GB/s, bf16 product {ceilings.matmul:.0f} TFLOP/s", flush=True)
    configs = {size: PUBLISHED[size] for size in options.size} if device.type == "cuda" else {"toy": TOY}
    for size, config in configs.items():
        long = options.long_context, options.long_batches
        speeds = [speed(text) for text in options.drafts]
        rows = measure(size, config, options.batches, options.prefill, *long, ceilings, device, speeds, options.kernels)
        if options.json:
            with options.json.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
