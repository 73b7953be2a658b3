"""The engine on one GPU: a published size with random weights, end to end on the compiled kernels.

    python -m benchmarks.card --size 0.8B [--json FILE]

In one run: logits beside those of the torch implementations on the same card, prefill and decode speed at several batch
sizes, and where one decode step spends its time, kernel by kernel, beside the bytes that the step must move.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.config import PAGE_TOKENS, DenseConfig, ModelConfig
from tokenspeed.engine.executor.device import pick_kv_dtype
from tokenspeed.engine.executor.loading import copy_head_to_draft, slot_sizes
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.parameters import Weight
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator
from tokenspeed.engine.quantization import PRODUCTS
from tokenspeed.engine.schedule.step import Begin, DecodeRow, NewPages, PrefillRow, Sample, Step
from tokenspeed.engine.sizes import PUBLISHED
from tokenspeed.ops.fp8 import FP8, quantise_blocks

from .timing import Ceilings, measure_ceilings

CONTEXT = 1024  # tokens before the decode steps that are timed
CUDA = torch.device("cuda")


def random_model(
    config: ModelConfig, mtp: bool = False, communicator: Communicator = ONE_RANK, device: torch.device = CUDA
) -> Qwen3_5:
    """Weights drawn on the device so that activations keep their size and every decay is a plausible one; those in FP8
    are quantised as they are drawn. Every rank draws the same, so all route alike. An MTP head drafts by the copy of
    the head that an engine makes."""
    model = Qwen3_5.empty(config, torch.bfloat16, device, communicator, mtp=mtp)
    torch.manual_seed(0)
    for weight in (module for module in model.modules() if isinstance(module, Weight) and module.scale is not None):
        for data, scale in [weight] if weight.data.dim() == 2 else zip(*weight, strict=True):
            values, by_block = quantise_blocks(torch.randn(data.shape, device=device) * data.shape[-1] ** -0.5)
            data.copy_(values)
            scale.copy_(by_block)
    for name, parameter in model.named_parameters():
        if parameter.dtype == FP8 or name.endswith(".scale"):
            continue
        if name.endswith("a_log"):
            parameter.uniform_(-4, 1)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-4, 0)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.1)
        else:
            parameter.normal_(0, 0.5 if name.endswith("conv") else parameter.shape[-1] ** -0.5)
    copy_head_to_draft(model, None, kernel=device.type == "cuda")
    return model


class Sequences:
    """B sequences of one length in a runner's memory, and the Steps that move them on."""

    def __init__(
        self,
        model: Qwen3_5,
        batch: int,
        tokens: int,
        kv_dtype: torch.dtype | None,
        drafts: int = 0,
        device: torch.device = CUDA,
    ):
        """drafts: behind each id, of the model's MTP head."""
        config = model.config
        pages = -(-tokens // PAGE_TOKENS)
        sizes = slot_sizes(config, drafts, kernel=device.type == "cuda")
        layout = MemoryLayout(model.share, torch.bfloat16, *sizes, kv_dtype=kv_dtype)
        memory = Memory(layout, batch * pages, batch, device)
        self.runner = Runner(model, memory, max_seqs=batch, max_tokens=pages * PAGE_TOKENS, drafts=drafts)
        self.batch, self.vocab, self.done, self.drafts = batch, config.vocab, 0, drafts
        self.runner.tables.begin(begins := tuple(Begin(i, 0.0, 0, 1.0, 0.0, 0) for i in range(batch)))
        self.runner.sampler.begin(begins)
        self.runner.tables.add_pages([NewPages(i, 0, tuple(range(i * pages, (i + 1) * pages))) for i in range(batch)])
        self._samples = tuple(Sample(i, i) for i in range(batch))
        self._decode = tuple(DecodeRow(i, i, i) for i in range(batch))

    def prefill(self, tokens: int) -> Step:
        generator = torch.Generator().manual_seed(self.done)
        ids = torch.randint(0, self.vocab, (self.batch, tokens), generator=generator).tolist()
        rows = tuple(PrefillRow(tuple(ids[i]), self.done, i, i, index=i) for i in range(self.batch))
        self.done += tokens
        return Step(prefill=rows, samples=self._samples)

    def decode(self) -> Step:
        return Step(decode=self._decode, width=1 + self.drafts, samples=self._samples, drafts=self.drafts)

    def run(self, step: Step) -> Tensor:
        """Logits, after the ids were sampled. Waits for nothing."""
        forwarded = self.runner.forward(step)
        self.runner.choose(step, forwarded, ())
        return forwarded.logits


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Median seconds of `work`, by device events around each."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@contextmanager
def operators(**replacements: Callable) -> Iterator[None]:
    """Operators of the model, and those that others are made of, replaced by functions of the same signature."""
    modules = (ops, *(sys.modules[operator.__module__] for operator in (ops.linear, ops.moe_block, ops.ffn_block)))
    before = [(module, name, vars(module)[name]) for module in modules for name in replacements if name in vars(module)]
    try:
        for module, name, _ in before:
            setattr(module, name, replacements[name])
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def pinned(mean: float, device: torch.device = CUDA) -> Callable:
    """An `accept_tokens` under which as many ids count a step as `mean` says, in a fixed order, whatever was chosen:
    random weights draft nothing right, and what a step costs depends on how far sequences move."""
    counts = [int(mean * (i + 1)) - int(mean * i) for i in range(10)]
    pattern = torch.tensor(counts, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def accept(chosen, tokens, outputs, context_lens, index, min_tokens, stops, length, left, ids) -> Tensor:
        count = pattern[step % len(counts)].expand_as(context_lens).clamp(max=chosen.shape[1])
        step.add_(1)
        count.masked_fill_(context_lens < 0, 0)
        length[index] = torch.where(context_lens < 0, length[index], context_lens + count).int()
        ids[index, 0] = chosen[:, 0]
        return count

    return accept


@torch.inference_mode()
def compare_logits(model: Qwen3_5, tokens: int, kv_dtype: torch.dtype | None) -> dict:
    """Relative distance of logits from those of the torch implementations: after a prefill and three decode steps.

    Where experts nearly tie, rounding decides who is chosen, and the chosen decide the rest. So a second run of the
    kernels takes the choices of the torch implementations: what is left is rounding.
    """

    def logits() -> list[Tensor]:
        sequences = Sequences(model, 2, tokens + 8, kv_dtype)
        steps = [sequences.run(sequences.prefill(tokens)).float().clone()]
        for _ in range(3):
            sequences.runner.tables.ids.fill_(7)  # the same ids whatever was sampled
            steps.append(sequences.run(sequences.decode()).float().clone())
        return steps

    def distances(ours: list[Tensor]) -> list[float]:
        return [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]

    routes: list[tuple[Tensor, ...]] = []
    torch_ops = {name: getattr(ops, name).__wrapped__ for name in ops.__all__}

    def route(*arguments) -> tuple[Tensor, ...]:
        routes.append(torch_ops["moe_route"](*arguments))
        return routes[-1]

    ours = logits()
    with operators(**torch_ops | {"moe_route": route}):
        theirs = logits()
    agree = [(a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in zip(ours, theirs, strict=True)]
    result = {"relative_distance": distances(ours), "same_argmax": agree}
    if routes:
        replay = iter(routes)
        # What does the routing itself cannot be told the choices.
        with operators(moe_route=lambda *arguments: next(replay), moe_block=torch_ops["moe_block"]):
            result["relative_distance_by_the_same_experts"] = distances(logits())
    return result


def decode_bytes(model: Qwen3_5, batch: int, context: int, kv_dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes a decode step must move, by what they are. Of experts, those that as many random choices hit."""
    config, layout = model.config, MemoryLayout(model.share, torch.bfloat16, kv_dtype=kv_dtype)
    experts = sum(p.nbytes for n, p in model.named_parameters() if p.dim() == 3)
    embedding = 0 if config.tied else model.program[0].weight.nbytes
    dense = sum(p.nbytes for p in model.parameters()) - experts - embedding
    hit = 0
    if not isinstance(config.ffn, DenseConfig):
        ffn = config.ffn
        hit = int(experts * (1 - (1 - ffn.top_k / ffn.experts) ** batch))
    return {
        "dense weights": dense,
        "experts hit": hit,
        "KV": batch * context * layout.kv_token_bytes,
        "state read": batch * layout.recurrent_bytes,
    }


@torch.inference_mode()
def kernel_times(sequences: Sequences) -> dict[str, tuple[float, int]]:
    """Microseconds and launches by kernel of one decode step; none on a CPU."""
    if sequences.runner.device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sequences.run(sequences.decode())
        torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.split(r"[<(]", event.name.replace("(anonymous namespace)::", ""))[0].split("::")[-1].split()[-1]
            found[name] = found[name][0] + event.device_time, found[name][1] + 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


@torch.inference_mode()
def measure(
    size: str,
    batches: list[int],
    prefill: int,
    check: bool,
    speeds: list[tuple[int, float]],
    fp8: bool,
    kv_dtype: torch.dtype | None,
    draft_vocabulary: int | None = None,
) -> dict:
    """speeds: (drafts, ids a step) to measure decode steps at; fp8: weights; kv_dtype: of the pages, None for bf16;
    draft_vocabulary: how many of the lowest ids are drafted, None for all."""
    config = replace(PUBLISHED[size], fp8=PRODUCTS if fp8 else frozenset())
    model = random_model(config, mtp=any(drafts for drafts, _ in speeds))
    if draft_vocabulary is not None:
        copy_head_to_draft(model, draft_vocabulary, kernel=True)
    ceilings = measure_ceilings("cuda")
    formats = {"weights": "fp8" if fp8 else "bf16", "kv": "fp8" if kv_dtype else "bf16"}
    result: dict = {"size": size, **formats, "device": torch.cuda.get_device_name(), "copy_gbps": ceilings.copy}
    result["compiled"] = ops.compiled_operators()
    if check:
        result["logits"] = compare_logits(model, 300, kv_dtype)
        print(f"{size}: logits beside torch's: {result['logits']}", flush=True)
    one = Sequences(model, 1, prefill + 64, kv_dtype)
    one.run(one.prefill(64))
    one.done = 0
    step = one.prefill(prefill)
    one.run(step)

    def again(sequences: Sequences = one) -> None:
        sequences.run(step)

    took = seconds(again, 3)
    result["prefill"] = {"tokens": prefill, "ms": took * 1e3, "tok_s": prefill / took}
    print(f"{size}: prefill of {prefill} tokens {took * 1e3:.2f} ms, {prefill / took:.0f} tok/s", flush=True)
    del one
    result["decode"] = []
    for batch in batches:
        for depth, mean in speeds:
            result["decode"].append(measure_decode(size, model, batch, kv_dtype, depth, mean, ceilings))
            torch.cuda.empty_cache()
    return result


def measure_decode(
    size: str,
    model: Qwen3_5,
    batch: int,
    kv_dtype: torch.dtype | None,
    drafts: int,
    mean: float,
    ceilings: Ceilings,
) -> dict:
    """A decode step of `batch` sequences with as many drafts behind each id, of which `mean` ids a step count."""
    replaced = {"accept_tokens": pinned(mean)} if drafts else {}
    with operators(**replaced):
        sequences = Sequences(model, batch, CONTEXT + 1024, kv_dtype, drafts)
        for _ in range(0, CONTEXT, 256):
            sequences.run(sequences.prefill(256))
        captured = sequences.runner.capture(lambda count: drafts, progress=False)
        for _ in range(4):
            sequences.run(sequences.decode())
        torch.cuda.synchronize()

        def many() -> None:
            for _ in range(16):
                sequences.run(sequences.decode())

        took = seconds(many, 5) / 16
        row = {"batch": batch, "drafts": drafts, "ids_a_step": mean, "graph": captured, "us": took * 1e6}
        row["tok_s"] = mean * batch / took
        told = f"{size}: batch {batch:3d}, {drafts} drafts, {mean:3.1f} ids a step: {took * 1e6:9.1f} us a step, "
        told += f"{1e6 * took / mean:8.1f} us an id, {row['tok_s']:8.1f} tok/s"
        if not drafts:
            must = decode_bytes(model, batch, CONTEXT, kv_dtype)
            floor = sum(must.values()) / (ceilings.copy * 1e9)
            row |= {"bytes": must, "floor_us": floor * 1e6, "of_floor": floor / took}
            told += f", floor {floor * 1e6:8.1f} us ({100 * floor / took:.0f}%)"
        print(f"{told}, graph {'yes' if captured else 'no'}", flush=True)
        row["kernels"] = {name: list(value) for name, value in kernel_times(sequences).items()}
        for name, (us, launches) in list(row["kernels"].items())[:14]:
            print(f"    {us:9.1f} us {launches:5d} x {name}")
    return row


def speed(text: str) -> tuple[int, float]:
    """Of "K" or "K:MEAN". Without a mean 23 of 30 drafts count: 3.3 ids a step for three."""
    drafts, _, mean = text.partition(":")
    return int(drafts), float(mean) if mean else 1 + int(drafts) * 23 / 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=PUBLISHED, default=["0.8B"], help="published sizes (default 0.8B)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64], help="decode batch sizes")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prefill that is timed (default 8192)")
    parser.add_argument("--quantization", choices=["none", "fp8"], default="none", help="of weights (default none)")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="of KV pages (default bf16)")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with torch's logits")
    parser.add_argument(
        "--drafts",
        nargs="+",
        default=["0"],
        metavar="K[:MEAN]",
        help="drafts behind each id, and the mean of ids a step to pin acceptance to (default 0; 3 means 3:3.3)",
    )
    parser.add_argument(
        "--draft-vocabulary", type=int, metavar="N", help="draft the N lowest ids alone (default: all of them)"
    )
    parser.add_argument("--json", type=Path, help="append each size's figures to this JSONL file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.card needs a GPU that torch can use; python -m benchmarks.engine measures on a CPU.")
        return 2
    speeds = [speed(text) for text in options.drafts]
    for size in options.size:
        formats = options.quantization == "fp8", pick_kv_dtype(options.kv_cache_dtype)
        check, vocabulary = not options.no_check, options.draft_vocabulary
        result = measure(size, options.batches, options.prefill, check, speeds, *formats, vocabulary)
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps(result) + "\n")
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
