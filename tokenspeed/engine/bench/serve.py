"""`bench serve`: load on an OpenAI endpoint, this engine's or another's."""

import argparse
import asyncio
import json
import math
import random
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..commands.options import note
from ..errors import ConfigError, EngineError, RequestError
from .endpoint import Endpoint
from .load import Client, Figures, Level, Run
from .results import panels, save, write_json
from .workload import PRESETS, Calibration, Preset, make_conversations


def add_parser(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "serve",
        help="measure an OpenAI endpoint under load",
        description="Hold conversations with an endpoint over /v1/chat/completions, streamed, and print what users "
        "wait for. Only the given URL is contacted. A failed request is counted, and ends its conversation.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the endpoint (default http://127.0.0.1:8000, as of `serve`)")
    add("--model", metavar="NAME", help="model to ask (default: the first of /v1/models)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help="key of the endpoint (default: none)")
    key.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds it (default: none)")
    add(
        "--preset",
        choices=PRESETS,
        default="agentic",
        help="lengths in tokens. agentic: 50,000 first, 800 more a turn, 10 to 15 turns, 500 out; long: 128k, 256k, "
        "512k, 1M in rotation, 1,024 out; chat: 500 first, 100 more a turn, 3 to 6 turns, 200 out (default agentic)",
    )
    add("--scale", type=float, default=1, metavar="X", help="times every length of the preset (default 1)")
    add(
        "--prefix-len",
        type=int,
        default=0,
        metavar="TOKENS",
        help="of each first prompt, before scaling: a system prompt that all conversations of a row share (default 0)",
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        metavar="N",
        help="closed loop: users who wait for each answer, then ask on at once (default 1 2 4 8 16)",
    )
    load.add_argument(
        "--rate",
        type=float,
        nargs="+",
        metavar="R",
        help="open loop: requests a second, conversations begin as a Poisson process (default: closed loop)",
    )
    add(
        "--conversations",
        type=int,
        metavar="N",
        help="of each measurement (default: 2 for each user, at least 4; 16 in an open loop)",
    )
    add("--max-connections", type=int, default=256, metavar="N", help="at once; more requests wait (default 256)")
    add("--request-timeout", type=float, default=600, metavar="S", help="a request fails after S (default 600 s)")
    add(
        "--extra-body",
        type=_object,
        default={},
        metavar="JSON",
        help="fields of every request, null to leave one out (default temperature 0, ignore_eos, usage in each event)",
    )
    add("--seed", type=int, metavar="N", help="of words, turns and arrivals (default: a new one, so caches are cold)")
    add("--json", type=Path, metavar="FILE", help="write every figure to this file (default: none)")
    add("--plot", type=Path, metavar="FILE", help="draw throughput and latency to this PNG (default: none)")
    add("--quiet", action="store_true", help="no progress (default off)")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def run(options: argparse.Namespace) -> int:
    """Exit status 1 where no request succeeded."""
    preset = PRESETS[options.preset].scaled(options.scale)
    _check(options)
    levels = [Level(rate=r) for r in options.rate] if options.rate else [Level(n) for n in options.concurrency]
    max_connections = options.max_connections if options.rate else max(options.concurrency)
    endpoint = Endpoint(options.url, _key(options), max_connections, options.request_timeout)
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    measured: list[Figures] = []
    settings: dict[str, Any] = {"url": endpoint.url, "seed": seed}
    settings |= {name: getattr(options, name) for name in ("preset", "scale", "prefix_len", "extra_body")}
    try:
        asyncio.run(_measure(options, endpoint, preset, levels, seed, settings, measured))
    finally:  # a Ctrl-C, too, shows what was measured
        if measured:
            print(table(measured), flush=True)
            if options.json:
                write_json(options.json, settings | {"levels": [figures.as_dict() for figures in measured]})
            if options.plot:
                plot(measured, options.plot, f"{settings.get('model', 'model')} at {options.url}")
    return 0 if any(figures.requests for figures in measured) else 1


def _check(options: argparse.Namespace) -> None:
    """Raises RequestError for a number that makes no sense."""
    for name in ("concurrency", "conversations", "max_connections"):
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise RequestError(f"--{name.replace('_', '-')} is {number}; it must be at least 1.")
    for name in ("rate", "request_timeout"):
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 < number < math.inf:
                raise RequestError(f"--{name.replace('_', '-')} is {number:g}; it must be above 0.")


def _key(options: argparse.Namespace) -> str | None:
    environment: Mapping[str, str] = options.environment
    key = options.api_key
    if options.api_key_env is not None:
        key = environment.get(options.api_key_env)
        if not key:
            raise ConfigError(f"--api-key-env: the environment has no {options.api_key_env}.")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise ConfigError("the API key must be printable ASCII characters.")
    return key


async def _measure(
    options: argparse.Namespace,
    endpoint: Endpoint,
    preset: Preset,
    levels: list[Level],
    seed: int,
    settings: dict[str, Any],
    measured: list[Figures],
) -> None:
    """Append the figures of each level; of one that is interrupted, those of its answers so far. settings: gets what
    the endpoint says of itself. Raises EngineError where the first request fails."""
    async with endpoint:
        model = options.model or await endpoint.first_model()
        client = Client(endpoint, {"model": model, "temperature": 0, "ignore_eos": True} | options.extra_body)
        calibration, answer = await client.calibrate(random.Random(f"{seed} calibration"))
        if answer.error not in (None, "empty answer"):
            raise EngineError(f"the first request failed: {answer.error}: {answer.detail}")
        settings |= {"model": model, "tokens_per_word": calibration.per_word, "calibrated": calibration.measured}
        if not options.quiet:
            note(_heading(options, preset, settings, calibration))
        for number, level in enumerate(levels):
            # Words of its own for each level: none finds in a cache what another left.
            vary = random.Random(f"{seed} {number}")
            count = options.conversations or (16 if level.rate else max(2 * level.concurrency, 4))
            shared = round(options.prefix_len * options.scale)
            conversations = make_conversations(preset, count, shared, calibration, vary)
            total = sum(len(conversation.turns) for conversation in conversations)
            with tqdm(total=total, desc=level.name, unit="request", disable=options.quiet, leave=False) as bar:
                before = await endpoint.drafts()
                run, ended, fared = Run(level, endpoint.clock()), None, None
                try:
                    if level.rate:
                        await client.open(run, conversations, preset.output, bar.update, vary)
                    else:
                        await client.closed(run, conversations, preset.output, bar.update)
                    ended = endpoint.clock()
                    after = await endpoint.drafts()
                    fared = after and before and after.since(before)
                finally:
                    if run.answers:
                        complete = ended is not None
                        measured.append(Figures.of(run, ended or endpoint.clock(), complete, fared))
            _tell_failures(run)


def _heading(options: argparse.Namespace, preset: Preset, settings: dict[str, Any], calibration: Calibration) -> str:
    first = ", ".join(f"{tokens:,}" for tokens in preset.first)
    turns = (
        "1 turn" if preset.turns == (1, 1) else f"{preset.turns[0]} to {preset.turns[1]} turns, {preset.more:,} more"
    )
    how = "by the endpoint's usage" if calibration.measured else "a guess: the endpoint gives no usage"
    return (
        f"{settings['model']} at {settings['url']}: {options.preset} x {options.scale:g}: first prompt {first} tokens, "
        f"{turns}, {preset.output:,} out; {calibration.per_word:.2f} tokens a word ({how}); --seed {settings['seed']}"
    )


def _tell_failures(run: Run) -> None:
    """The message of the first failure of each kind."""
    told: dict[str, str] = {}
    for answer in run.answers:
        if answer.error is not None:
            told.setdefault(answer.error, answer.detail)
    for kind, detail in told.items():
        note(f"{run.level.name}: {kind}: {detail}")


def table(measured: list[Figures]) -> str:
    """A column for each level, a line for each figure with its unit."""
    lines = [("", [figures.level.name + ("" if figures.complete else " *") for figures in measured])]

    def line(name: str, value: Callable[[Figures], float | None], digits: int = 0) -> None:
        found = [value(figures) for figures in measured]
        lines.append((name, ["-" if v is None else f"{v:,.{digits}f}" for v in found]))

    line("requests answered", lambda f: f.requests)
    line("requests failed", lambda f: f.failed)
    for kind in sorted({kind for figures in measured for kind in figures.errors}):
        line(f"  {kind}", lambda f, kind=kind: f.errors.get(kind, 0))
    if any(figures.unsent for figures in measured):
        line("turns not sent after a failure", lambda f: f.unsent)
    line("prompt, mean [tokens]", lambda f: f.prompt_tokens)
    line("output, mean [tokens]", lambda f: f.output_tokens)
    line("cached of prompt [%]", lambda f: None if f.hit_rate is None else 100 * f.hit_rate, 1)
    if deepest := max((len(f.drafts.drafted) for f in measured if f.drafts), default=0):
        line("tokens a step", lambda f: f.drafts and f.drafts.ids_a_step, 2)
        for place in range(deepest):
            line(f"draft {place + 1} right [%]", lambda f, p=place: _right(f, p), 1)
    for name, spread in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms")):
        for percentile in ("p50", "p90", "p99"):
            line(f"{name} {percentile} [ms]", lambda f, s=spread, p=percentile: getattr(getattr(f, s), p, None), 2)
    line("a user's speed [tok/s]", lambda f: f.tok_s_user, 1)
    line("output [tok/s]", lambda f: f.output_tok_s, 1)
    line("prompt + output [tok/s]", lambda f: f.total_tok_s, 1)
    line("requests [1/s]", lambda f: f.requests_s, 2)
    line("measured for [s]", lambda f: f.seconds, 1)
    wide = max(len(name) for name, _ in lines)
    widths = [max(len(column[i]) for _, column in lines) + 3 for i in range(len(measured))]
    text = [
        f"{name:<{wide}}" + "".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True)) for name, values in lines
    ]
    if not all(figures.complete for figures in measured):
        text.append("* stopped before its end")
    return "\n".join(text)


def _right(figures: Figures, place: int) -> float | None:
    rates = figures.drafts.rates if figures.drafts else []
    return 100 * rates[place] if place < len(rates) else None


def plot(measured: list[Figures], path: Path, title: str) -> None:
    """Throughput and latency over the levels. Raises ConfigError where it cannot be drawn."""
    names = ("output [tok/s]", "a user's speed [tok/s]", "first token [ms]", "between events [ms]")
    open_loop = measured[0].level.rate is not None
    figure, axes = panels(names, "requests/s" if open_loop else "users at once", title)
    shown = [f for f in measured if f.requests]
    x = [f.level.rate if open_loop else f.level.concurrency for f in shown]
    axes[0].plot(x, [f.output_tok_s for f in shown], marker="o", label="all users")
    axes[1].plot(x, [f.tok_s_user or math.nan for f in shown], marker="o", label="mean")
    for axis, name in ((axes[2], "ttft_ms"), (axes[3], "itl_ms")):
        for percentile in ("p50", "p90", "p99"):
            values = [getattr(getattr(f, name), percentile, math.nan) for f in shown]
            axis.plot(x, values, marker="o", label=percentile)
    save(figure, axes, path)
