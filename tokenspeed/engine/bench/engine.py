"""`bench`: throughput and latency of the engine in this process, `bench serve` those of an endpoint; `bench replay`: a
step log, bit for bit."""

import argparse
import random
from pathlib import Path

from tqdm import tqdm

from ..checkpoint import resolve
from ..commands.options import add_engine_options, add_run_options, note, open_model
from ..debug.step_log import replay
from ..errors import RequestError
from ..executor.device import device_name
from ..llm import LLM
from . import serve as bench_serve
from .measure import Case, Measured, measure
from .results import panels, save, write_json


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="measure throughput and latency, here or of an endpoint; replay a step log",
        description="Throughput and latency at given lengths and concurrency, one row for each combination, greedy and "
        "without end token; `bench serve --url URL` measures an endpoint, `bench replay FILE` runs a step log again "
        "and compares every bit of its logits.",
    )
    add = parser.add_argument
    add("--input-len", type=int, nargs="+", default=[128], metavar="TOKENS", help="prompt lengths (default 128)")
    add("--output-len", type=int, nargs="+", default=[32], metavar="TOKENS", help="tokens to generate (default 32)")
    add("--concurrency", type=int, nargs="+", default=[1, 8], metavar="N", help="requests at once (default 1 8)")
    add(
        "--prefix-len",
        type=int,
        default=0,
        metavar="TOKENS",
        help="of each prompt, as many first tokens are the same in all (default 0: prompts share nothing)",
    )
    add("--requests", type=int, metavar="N", help="requests of each row (default: 4 times its concurrency)")
    add("--warm-up", type=int, metavar="N", help="requests before each row, not counted (default: its concurrency)")
    add("--seed", type=int, default=0, metavar="N", help="of the random token ids of the prompts (default 0)")
    add("--json", type=Path, metavar="FILE", help="write every figure to this file (default: none)")
    add("--plot", type=Path, metavar="FILE", help="draw throughput and latency to this PNG (default: none)")
    add_engine_options(parser)
    add_run_options(parser)
    actions = parser.add_subparsers(dest="action", metavar="serve | replay FILE", title="in place of measuring here")
    bench_serve.add_parser(actions)
    again = actions.add_parser(
        "replay",
        help="run a step log again, bit for bit",
        description="Run the steps of a log on a Runner and a Memory of the same sizes, and compare the hash of each "
        "step's logits. Exit status 1 at the first difference.",
    )
    again.add_argument("file", type=Path, help="what --log-steps wrote")
    again.add_argument("--model", metavar="DIR|ID", help="checkpoint directory or hub id (default: the shipped toy)")
    again.add_argument("--device", help="cpu, cuda or cuda:N (default: the device type of the log)")
    again.add_argument("--quiet", action="store_true", help="no progress (default off)")
    return parser


def run(options: argparse.Namespace) -> int:
    if options.action == "serve":
        return bench_serve.run(options)
    if options.action == "replay":
        return _replay(options)
    cases = _cases(options)
    vary = random.Random(options.seed)
    with open_model(options) as llm:
        _check(cases, llm)
        title = f"{llm.frontend.directory.resolve().name} on {device_name(llm.engine.runner.device)}"
        rows = []
        print(Measured.heading(), flush=True)
        for case in cases:
            total = case.warm_up + case.requests
            with tqdm(total=total, desc=case.name, unit="request", disable=options.quiet, leave=False) as bar:
                rows.append(measure(llm, case, vary, bar.update))
            print(rows[-1].row(), flush=True)
    if options.json:
        write_json(options.json, [row.as_dict() for row in rows])
    if options.plot:
        _plot(rows, options.plot, title)
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    """Every combination of lengths and concurrency. Raises RequestError for one that makes no sense."""
    least = (
        ("input-len", 1),
        ("output-len", 1),
        ("concurrency", 1),
        ("requests", 1),
        ("warm-up", 0),
        ("prefix-len", 0),
    )
    for name, bound in least:
        value = getattr(options, name.replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < bound:
                raise RequestError(f"--{name} is {number}; it must be at least {bound}.")
    if options.prefix_len >= min(options.input_len):
        raise RequestError(
            f"--prefix-len is {options.prefix_len}; it must be below --input-len {min(options.input_len)}: some "
            "token of a prompt is its own."
        )
    return [
        Case(
            prompt,
            output,
            concurrency,
            options.prefix_len,
            4 * concurrency if options.requests is None else options.requests,
            concurrency if options.warm_up is None else options.warm_up,
        )
        for prompt in options.input_len
        for output in options.output_len
        for concurrency in options.concurrency
    ]


def _check(cases: list[Case], llm: LLM) -> None:
    longest = max(case.prompt_tokens + case.output_tokens for case in cases)
    if longest > llm.engine.limits.max_tokens:
        raise RequestError(
            f"--input-len and --output-len come to {longest} tokens; the longest sequence has "
            f"{llm.engine.limits.max_tokens}."
        )
    concurrency = max(case.concurrency for case in cases)
    if concurrency > llm.engine.limits.max_seqs:
        raise RequestError(f"--concurrency is {concurrency}; --max-num-seqs {llm.engine.limits.max_seqs} run at once.")


def _replay(options: argparse.Namespace) -> int:
    directory = resolve(options.model)
    with tqdm(desc="replaying", unit="step", disable=options.quiet, leave=False) as bar:
        replayed = replay(options.file, directory, options.device, lambda step: bar.update())
    if replayed.difference is None:
        print(f"{replayed.steps} steps, {replayed.tokens} tokens: every logit is the same, bit for bit")
        return 0
    step, logged, found = replayed.difference
    note(f"error: step {step} differs: the log has logits {logged[:16]}, the replay {found[:16]} (SHA-256)")
    return 1


def _plot(rows: list[Measured], path: Path, title: str) -> None:
    """Throughput, and latency between tokens, over concurrency; a line for each pair of lengths."""
    figure, axes = panels(
        ("generated tok/s", "first token, p50 [ms]", "between tokens [ms]"), "requests at once", title
    )
    lengths = dict.fromkeys((row.case.prompt_tokens, row.case.output_tokens) for row in rows)
    for prompt, output in lengths:
        own = [row for row in rows if (row.case.prompt_tokens, row.case.output_tokens) == (prompt, output)]
        x = [row.case.concurrency for row in own]
        label = f"{prompt} + {output} tokens"
        axes[0].plot(x, [row.output_tok_s for row in own], marker="o", label=label)
        axes[1].plot(x, [row.ttft_ms.p50 for row in own], marker="o", label=label)
        (line,) = axes[2].plot(x, [row.itl_ms.p50 for row in own], marker="o", label=f"{label}, p50")
        axes[2].plot(x, [row.itl_ms.p99 for row in own], "--", color=line.get_color(), label=f"{label}, p99")
    save(figure, axes, path)
