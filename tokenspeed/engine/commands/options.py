"""Options that commands share, and the model they open."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..config import AUTO_DRAFTS_ON_CPU, AUTO_DRAFTS_ON_GPU, MAX_DRAFTS, EngineConfig
from ..debug.ranges import add_ranges
from ..debug.step_log import StepLog
from ..errors import ConfigError
from ..llm import LLM
from ..request import SamplingParams
from .interrupts import interruptible

_SAMPLING = tuple(name for name in SamplingParams.__dataclass_fields__ if name != "seed")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and how much of the machine it takes."""
    default = EngineConfig()
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR|ID", help="checkpoint directory or hub id (default: the shipped toy)")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="of weights and KV (default auto: bfloat16 on a GPU, float32 on a CPU)",
    )
    model.add_argument(
        "--quantization",
        default=default.quantization,
        choices=["auto", "fp8", "none"],
        help="weights in FP8 blocks of 128 x 128: those that the checkpoint has so, all that can be (quantised while "
        "loading), or none (dequantised while loading) (default auto)",
    )
    model.add_argument(
        "--load-format",
        default=default.load_format,
        choices=["auto", "dummy"],
        help="dummy: random weights, made on the device, to measure any size; config.json and the tokenizer's files "
        "are enough (default auto: the checkpoint's)",
    )
    model.add_argument(
        "--kv-cache-dtype",
        default=default.kv_cache_dtype,
        choices=["auto", "fp8"],
        help="of the KV pages: the dtype, or FP8, half of bfloat16's bytes (default auto)",
    )
    model.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto: a GPU if there is one)"
    )
    model.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice, 1 for models below 64 MiB)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="longest sequence, in tokens (default: the model's context)"
    )
    engine.add_argument(
        "--max-num-seqs",
        type=int,
        default=default.max_num_seqs,
        metavar="N",
        help=f"sequences that run at once (default {default.max_num_seqs})",
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=default.max_num_batched_tokens,
        metavar="TOKENS",
        help=f"tokens of one step, prefill and decode together (default {default.max_num_batched_tokens})",
    )
    engine.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="F",
        help="of the device's whole memory that this engine takes, weights included; KV pages and state slots fill it "
        "(default: on a GPU what is free but for a tenth of it; on a CPU half of what is free)",
    )
    engine.add_argument("--kv-pages", type=int, metavar="N", help="KV pages of 64 tokens (default: what fits)")
    engine.add_argument("--state-slots", type=int, metavar="N", help="recurrent states kept (default: what fits)")
    engine.add_argument(
        "--host-memory",
        type=float,
        default=default.host_memory,
        metavar="GIB",
        help="of this machine's memory, for what the prefix cache has no room for on the device (default 0)",
    )
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=default.enable_prefix_caching,
        help="reuse what prompts have in common (default on)",
    )
    engine.add_argument(
        "--cache-policy",
        choices=["value", "lru"],
        default=default.cache_policy,
        help="what is kept when memory is scarce: by recompute saved per byte, or the latest used (default value)",
    )
    engine.add_argument(
        "--snapshot-grid",
        type=int,
        default=default.snapshot_grid,
        metavar="TOKENS",
        help=f"distance of optional states kept in long prompts, 0 for none (default {default.snapshot_grid} tokens)",
    )
    engine.add_argument(
        "--draft-tokens",
        type=_drafts,
        default=default.draft_tokens,
        metavar="N|auto|0",
        help=f"tokens drafted behind each and verified in one step, 0 to {MAX_DRAFTS}, by the MTP head or, without "
        f"one, by lookup in the sequence; the text is the same (default auto, with a head, by sequences: "
        f"{_depths(AUTO_DRAFTS_ON_GPU)} on a GPU where they pay, {_depths(AUTO_DRAFTS_ON_CPU)} on a CPU; otherwise 0)",
    )
    engine.add_argument(
        "--draft-vocabulary",
        type=int,
        metavar="N",
        help="the MTP head chooses among the N lowest ids, the most frequent ones: cheaper drafts, the same text "
        "(default: among all)",
    )
    engine.add_argument(
        "--tensor-parallel-size",
        "--tp",
        type=int,
        default=1,
        metavar="N",
        help="split heads, columns and vocabulary over N ranks (default 1)",
    )
    engine.add_argument(
        "--expert-parallel-size",
        "--ep",
        type=int,
        default=1,
        metavar="N",
        help="split the experts over N of the same ranks (default 1)",
    )
    engine.add_argument(
        "--prefill-sums",
        choices=["auto", "all-reduce", "in-parts"],
        default=default.prefill_sums,
        help="over ranks, of a prefill: one all-reduce, or a reduce-scatter and an all-gather with the norm between, "
        "which rounds otherwise (default auto: on GPUs the faster one, as measured at start)",
    )
    engine.add_argument("--validate", action="store_true", help="check every step and the cache: slow (default off)")


def _drafts(text: str) -> int | str:
    """A number where it is one; what else there may be, EngineConfig says."""
    try:
        return int(text)
    except ValueError:
        return text


def _depths(by_load: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{drafts} up to {sequences}" for sequences, drafts in by_load)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What is recorded of a run."""
    run = parser.add_argument_group("record of the run")
    run.add_argument(
        "--log-steps",
        type=Path,
        metavar="FILE",
        help="write every step as a JSON line with a hash of its logits, for `bench replay` (default: none; a GPU "
        "waits for each step)",
    )
    run.add_argument("--nvtx", action="store_true", help="NVTX ranges of phases and stages, for Nsight (default off)")
    run.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="write a torch.profiler trace (Chrome JSON) to DIR/COMMAND.json.gz; for short runs (default: none)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress, no figures (default off)")


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Every field of SamplingParams. max_tokens: the command's default."""
    group = parser.add_argument_group("sampling (the model's own: what its generation_config.json says)")
    add = group.add_argument
    add("--n", type=int, metavar="N", help="continuations of each prompt, 1 to 64 (default 1)")
    add("--temperature", type=float, metavar="T", help="flattens the choice; 0 is greedy (default: the model's own)")
    add(
        "--top-k",
        type=int,
        metavar="K",
        help="choose among the K likeliest tokens, 0 for all (default: the model's own)",
    )
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="choose among the likeliest tokens that reach this probability, 1 for all (default: the model's own)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens below this fraction of the likeliest one's probability (default: the model's own)",
    )
    add("--presence-penalty", type=float, metavar="X", help="off logits of generated tokens, -2 to 2 (default 0)")
    add("--frequency-penalty", type=float, metavar="X", help="the same for each occurrence, -2 to 2 (default 0)")
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divides logits of tokens in prompt or output, above 0 (default: the model's own, else 1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="the same seed and prompts give the same texts (default 0)")
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"generate at most N (default {max_tokens})")
    add("--min-tokens", type=int, metavar="N", help="do not end before N (default 0)")
    add("--stop", action="append", metavar="TEXT", help="end at this text and cut it off; repeatable (default: none)")
    add("--include-stop-str-in-output", action="store_true", default=None, help="do not cut it off (default off)")
    add("--stop-token-ids", type=int, nargs="+", metavar="ID", help="end at these ids too (default: none)")
    add("--ignore-eos", action="store_true", default=None, help="go on past the model's end token (default off)")
    add("--bad-words", action="append", metavar="TEXT", help="never write this; repeatable (default: none)")
    add("--allowed-token-ids", type=int, nargs="+", metavar="ID", help="write nothing but these ids (default: any)")
    add(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=X",
        help="add X, -100 to 100, to an id's logit; repeatable (default: none)",
    )
    add(
        "--thinking-token-budget",
        type=int,
        metavar="N",
        help="end the reasoning after N tokens (default: no bound)",
    )
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="log-probabilities of each token and K others, in JSON (default: none)",
    )
    add("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens (default: none)")
    add(
        "--no-skip-special-tokens",
        dest="skip_special_tokens",
        action="store_false",
        default=None,
        help="show special tokens in the text (default: left out)",
    )


def _bias(text: str) -> tuple[int, float]:
    id, _, value = text.partition("=")
    try:
        return int(id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=X, as in 42=-5") from None


def chosen_sampling(options: argparse.Namespace) -> dict:
    """The sampling fields that the command line names. Its seed is the engine's, so that prompts differ in noise.
    Raises RequestError for a value outside its range."""
    named = {name: getattr(options, name) for name in _SAMPLING}
    if named["logit_bias"] is not None:
        named["logit_bias"] = dict(named["logit_bias"])
    chosen = {name: value for name, value in named.items() if value is not None}
    SamplingParams(**chosen)
    return chosen


def engine_settings(options: argparse.Namespace) -> dict:
    """The fields of EngineConfig."""
    names = set(EngineConfig.__dataclass_fields__) & set(vars(options))
    return {name: getattr(options, name) for name in names}


@contextlib.contextmanager
def open_model(options: argparse.Namespace) -> Iterator[LLM]:
    """The model of the options, with what they say about logs, ranges, profiles and Ctrl-C in force."""
    with contextlib.ExitStack() as stack:
        llm = LLM(options.model, progress=not options.quiet, **engine_settings(options))
        stack.enter_context(interruptible(llm.engine))
        if options.log_steps:
            log = StepLog(options.log_steps, llm.engine, llm.frontend.directory.resolve().name)
            stack.callback(log.close)
        if options.nvtx:
            _add_nvtx(llm)
        if options.profile:
            stack.enter_context(_profile(llm, options.profile, options.command))
        yield llm


def note(text: str) -> None:
    """Standard output holds answers alone."""
    print(text, file=sys.stderr, flush=True)


def _add_nvtx(llm: LLM) -> None:
    if llm.engine.runner.device.type == "cuda":
        add_ranges(llm.engine, torch.cuda.nvtx.range)
    else:
        note("--nvtx changes nothing here: NVTX ranges need a CUDA device (--profile names the same ranges).")


@contextlib.contextmanager
def _profile(llm: LLM, directory: Path, command: str) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile: {directory} cannot be made a directory: {error.strerror}.") from None
    activities = [torch.profiler.ProfilerActivity.CPU]
    if llm.engine.runner.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    add_ranges(llm.engine, torch.profiler.record_function)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    try:
        yield
    finally:
        profiler.stop()
        path = directory / f"{command}.json.gz"
        profiler.export_chrome_trace(str(path))
        note(f"trace: {path} (for chrome://tracing or ui.perfetto.dev)")
