"""This engine beside `transformers.generate`: the same weights, machine and prompts, in one run.

    python -m benchmarks.engine [--json FILE] [--plot FILE]

Each contender lives in a process of its own, so that its peak memory is its own; they take turns, round by round, and
the medians are compared. Greedy, a fixed number of tokens, no stop. The shipped model goes on with conversations of the
kind that it knows, so that its drafts are as good as in use; random weights get random ids, and have nothing to draft.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.tiny_agent.data import HELD_OUT_SEEDS
from examples.tiny_agent.dataset import example
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.sizes import PUBLISHED

from .overhead import report_overhead

CONTENDERS = ("tokenspeed", "transformers")
# model: prompt tokens, generated tokens, dtype, rounds, CPU threads
MODELS = {"shipped": (128, 65, "float32", 7, 1), "0.8B": (64, 9, "bfloat16", 3, os.cpu_count())}
BATCHES = (1, 8)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models (default: all)")
    parser.add_argument("--threads", type=int, help="CPU threads of each contender (default: 1 shipped, all 0.8B)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to this PNG")
    parser.add_argument("--worker", nargs=3, metavar=("CONTENDER", "DIRECTORY", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--overhead", action="store_true", help="measure the Python cost of a step in place of all that"
    )
    options = parser.parse_args()
    if options.overhead:
        report_overhead()
        return 0
    if options.worker:
        return work(*options.worker, options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for model in options.models:
            checkpoint = SHIPPED if model == "shipped" else random_checkpoint(PUBLISHED[model], Path(directory) / model)
            rows += compare(model, checkpoint, options.threads)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)
    return 0


def random_checkpoint(config: ModelConfig, directory: Path) -> Path:
    """A checkpoint of a published shape with random bf16 weights and the shipped model's text files."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(SHIPPED / name, directory)
    described = json.loads((SHIPPED / "config.json").read_text())
    described |= {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn.intermediate,
        "vocab_size": config.vocab,
        "num_hidden_layers": len(config.layer_types),
        "layer_types": list(config.layer_types),
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "linear_num_key_heads": config.key_heads,
        "linear_num_value_heads": config.value_heads,
        "linear_key_head_dim": config.key_dim,
        "linear_value_head_dim": config.value_dim,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_context,
        "rope_parameters": described["rope_parameters"] | {"mrope_section": [11, 11, 10]},
    }
    (directory / "config.json").write_text(json.dumps(described))
    empty = Qwen3_5.empty(config, torch.bfloat16, torch.device("meta"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for source in tqdm(list(empty.sources("model.")), desc="writing random weights", unit="tensor", leave=False):
        scale, dtype = 0.02 if len(source.shape) > 1 else 0.1, source.regions[0].part.dtype
        tensors[source.key] = (torch.randn(source.shape, generator=generator) * scale).to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def compare(model: str, checkpoint: Path, threads: int | None) -> list[dict]:
    """Both contenders on one model, every batch size; prints a table and returns its rows."""
    rounds, threads = MODELS[model][3], threads or MODELS[model][4]
    workers = {name: start(name, checkpoint, model, threads) for name in CONTENDERS}
    rows = []
    try:
        for batch in BATCHES:
            taken = {name: [] for name in CONTENDERS}
            for _ in tqdm(range(rounds + 1), desc=f"{model}, batch {batch}", unit="round", leave=False):
                for name, worker in workers.items():
                    taken[name].append(ask(worker, batch))
            rows += [row(model, batch, name, samples[1:]) for name, samples in taken.items()]  # the first warms up
            report(rows[-2:])
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return rows


def start(name: str, checkpoint: Path, model: str, threads: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.engine", "--threads", str(threads)]
    command += ["--worker", name, str(checkpoint), model]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, batch: int) -> dict:
    worker.stdin.write(f"{batch}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"a contender ended early:\n{worker.stderr.read()[-2000:]}")
    return json.loads(answer)


def row(model: str, batch: int, name: str, samples: list[dict]) -> dict:
    """Medians: time to the first token of all sequences, and tokens a second after it over all sequences."""
    _, tokens, dtype, *_ = MODELS[model]
    first = statistics.median(s["first_s"] for s in samples)
    rest = statistics.median(s["all_s"] - s["first_s"] for s in samples)
    speed = batch * (tokens - 1) / rest
    peak = max(s["peak_bytes"] for s in samples)
    return {"model": model, "dtype": dtype, "batch": batch, "engine": name, "tok_s": speed, "first_ms": first * 1e3} | {
        "peak_gib": peak / 2**30
    }


def report(pair: list[dict]) -> None:
    ours, theirs = pair
    for r in pair:
        print(
            f"{r['model']:8} {r['dtype']:9} batch {r['batch']}  {r['engine']:13} {r['tok_s']:9.1f} tok/s   "
            f"first token {r['first_ms']:8.1f} ms   peak memory {r['peak_gib']:.2f} GiB"
        )
    print(
        f"{'':33} ratio         {ours['tok_s'] / theirs['tok_s']:9.2f} x       first token "
        f"{theirs['first_ms'] / ours['first_ms']:8.2f} x    memory {ours['peak_gib'] / theirs['peak_gib']:.2f} x",
        flush=True,
    )


def work(name: str, directory: str, model: str, threads: int) -> int:
    """A contender's process: reads batch sizes, answers with times and its peak memory so far."""
    prompt, tokens, dtype, *_ = MODELS[model]
    generate = {"tokenspeed": ours, "transformers": theirs}[name](directory, dtype, threads)
    for line in sys.stdin:
        ids, start = prompts(model, int(line), prompt), time.perf_counter()
        first = generate(ids, tokens)
        times = {"first_s": first - start, "all_s": time.perf_counter() - start}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(times | {"peak_bytes": peak}), flush=True)
    return 0


def prompts(model: str, count: int, length: int) -> list[list[int]]:
    if model != "shipped":
        return torch.randint(0, 600, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    return [example(seed, tokenizer, 4 * length).ids[:length] for seed in HELD_OUT_SEEDS[:count]]


def ours(directory: str, dtype: str, threads: int):
    # Without the prefix cache: the same prompts come again and again, and the peer computes them each time.
    llm = LLM(directory, progress=False, dtype=dtype, device="cpu", threads=threads, enable_prefix_caching=False)

    def generate(ids: list[list[int]], tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        produced, first, begun = 0, 0.0, set()
        for prompt, update in llm.stream(ids, params):
            produced += len(update.ids)
            if prompt not in begun:
                begun.add(prompt)
                first = time.perf_counter()
        assert produced == len(ids) * tokens
        return first

    return generate


def theirs(directory: str, dtype: str, threads: int):
    from transformers import AutoModelForCausalLM, StoppingCriteria

    class Watch(StoppingCriteria):
        """Asked after every token of all sequences."""

        def __init__(self):
            self.first = 0.0

        def __call__(self, input_ids, scores, **kwargs):
            self.first = self.first or time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def generate(ids: list[list[int]], tokens: int) -> float:
        batch, watch = torch.tensor(ids), Watch()
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        mask = torch.ones_like(batch)
        out = model.generate(batch, attention_mask=mask, do_sample=False, stopping_criteria=[watch], **lengths)
        assert out.shape[1] == batch.shape[1] + tokens
        return watch.first

    return generate


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    labels = [f"{a['model']}\nbatch {a['batch']}" for a, _ in pairs]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    for shift, key, name in ((-0.2, "tok_s", "tokens a second"), (0.2, "first_ms", "time to first token")):
        ratios = [a[key] / b[key] if key == "tok_s" else b[key] / a[key] for a, b in pairs]
        bars = axis.bar([i + shift for i in range(len(pairs))], ratios, 0.38, label=name)
        axis.bar_label(bars, fmt="%.2f")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(ylabel="times transformers", xticks=range(len(pairs)), xticklabels=labels)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
