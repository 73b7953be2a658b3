"""`generate`: a prompt in, its continuation streamed out."""

import argparse
import json
import sys
import time
from pathlib import Path

from ..errors import RequestError
from ..llm import LLM


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, streamed",
        description="Continue one prompt, streamed to standard output; figures go to standard error.",
    )
    parser.add_argument("prompt", nargs="?", help="the user's message; without it, --file or standard input is read")
    parser.add_argument("--file", type=Path, help="read the prompt from this UTF-8 file")
    parser.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    parser.add_argument("--system", help="system message (not with --raw)")
    parser.add_argument("--tools", type=Path, help="JSON file with a list of OpenAI tool definitions (not with --raw)")
    parser.add_argument("--no-thinking", action="store_true", help="ask the chat template for an answer at once")
    add_model_options(parser)
    sampling = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    sampling.add_argument("--temperature", type=float, help="0 is greedy")
    sampling.add_argument("--top-k", type=int, help="sample among the K most likely tokens; 0 is off")
    sampling.add_argument("--top-p", type=float, help="sample among the most likely tokens that reach this probability")
    sampling.add_argument("--min-p", type=float, help="drop tokens below this fraction of the most likely one")
    sampling.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    sampling.add_argument("--max-tokens", type=int, default=256, help="generate at most this many (default 256)")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="checkpoint directory or hub id (default: the shipped toy model)")
    model.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto: bf16 on a GPU")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    model.add_argument("--threads", type=int, help="CPU threads (default: torch's choice, 1 for models below 64 MiB)")


def run(options: argparse.Namespace) -> int:
    prompt = _read_prompt(options)
    llm = LLM(options.model, dtype=options.dtype, device=options.device, threads=options.threads)
    chosen = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "ignore_eos")
    params = llm.frontend.sampling_params(**{name: getattr(options, name) for name in chosen})
    if options.raw:
        tokens = llm.frontend.tokenizer.encode(prompt)
    else:
        system = [{"role": "system", "content": options.system}] if options.system else []
        tokens = llm.encode_chat(
            [*system, {"role": "user", "content": prompt}],
            _read_tools(options.tools),
            enable_thinking=False if options.no_thinking else None,
        )
    meter = Meter(len(tokens))
    for _, update in llm.stream([tokens], params):
        meter.count()
        print(update.text, end="", flush=True)
    print()
    print(meter.summary(), file=sys.stderr)
    return 0


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None and options.file is not None:
        raise RequestError("both a prompt and --file are given; one is needed.")
    if options.prompt is not None:
        return options.prompt
    try:
        return options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompt cannot be read from {options.file or 'standard input'}: {error}") from None


def _read_tools(path: Path | None) -> list | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"the tools cannot be read from {path}: {error}") from None


class Meter:
    """Times one or more generations: tokens, time to first token, tokens per second after it."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self._start = self._last = time.perf_counter()
        self.first_s = 0.0

    def count(self) -> None:
        self._last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first_s = self._last - self._start

    @property
    def decode_s(self) -> float:
        return self._last - self._start - self.first_s

    def summary(self) -> str:
        speed = f"{(self.tokens - 1) / self.decode_s:.1f} tok/s" if self.tokens > 1 else "one token"
        return (
            f"{self.prompt_tokens} prompt tokens, {self.tokens} generated, "
            f"first after {self.first_s * 1000:.0f} ms, then {speed}"
        )
