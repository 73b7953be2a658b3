"""`generate`: a prompt in, its continuation streamed out; or a file of prompts in, a file of results out."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from ..chat.collector import Collector
from ..chat.conversation import Conversation
from ..chat.formats import Format
from ..chat.turn import TurnReader
from ..errors import RequestError
from ..llm import LLM
from ..request import Acceptance, CompletionOutput, Request
from ..text.grammar import GrammarSpec
from .options import add_engine_options, add_run_options, add_sampling_options, chosen_sampling, note, open_model
from .records import as_record, run_jsonl
from .shown import TurnPrinter, call_text


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, streamed, or a JSONL file of prompts",
        description="Continue one prompt, streamed to standard output, or every prompt of a JSONL file; figures go to "
        "standard error.",
    )
    parser.add_argument(
        "prompt", nargs="?", help="the user's message (default: --file, --jsonl, else standard input is read)"
    )
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="read the prompt from this UTF-8 file (default: none)"
    )
    parser.add_argument(
        "--jsonl",
        metavar="IN",
        help='one request a line, "-" for standard input: {"prompt": TEXT or IDS} or {"messages": [...], "tools": '
        '[...]}, with "id", "tool_choice", "enable_thinking", "response_format", "structured_outputs" and sampling '
        "fields at will (default: none)",
    )
    parser.add_argument("--output", metavar="OUT", help='where its results go, one a line (default: "-", the output)')
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the text (default off)")
    parser.add_argument(
        "--raw", action="store_true", help="take the prompt as it is, without the chat template (default off)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, not with --raw (default: none)")
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="JSON list of OpenAI tool definitions, not with --raw (default: none)",
    )
    parser.add_argument(
        "--response-format",
        metavar="FILE",
        help="JSON: OpenAI's response_format, or vLLM's structured_outputs (json, regex, choice) (default: none)",
    )
    parser.add_argument(
        "--no-thinking", action="store_true", help="ask the template for an answer at once (default off)"
    )
    add_sampling_options(parser, max_tokens=256)
    add_engine_options(parser)
    add_run_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    chosen = chosen_sampling(options)
    if options.jsonl is not None:
        return _run_jsonl(options, chosen)
    if options.output is not None:
        raise RequestError("--output is given without --jsonl, whose results it holds.")
    if not options.json and {"logprobs", "prompt_logprobs"} & chosen.keys():
        raise RequestError("log-probabilities are shown in JSON only: add --json.")
    prompt, tools, formats = _read_prompt(options), read_tools(options.tools), _read_formats(options.response_format)
    with open_model(options) as llm:
        params, turns = llm.frontend.sampling_params(**chosen), llm.turns
        if options.raw:
            form = Format.of_text(formats.get("response_format"), formats.get("structured_outputs"))
            request, reader = llm.frontend.request("0", prompt, params), None
        else:
            system = [{"role": "system", "content": options.system}] if options.system else []
            messages = [*system, {"role": "user", "content": prompt}]
            chat = Conversation(messages, tools, enable_thinking=False if options.no_thinking else None, **formats)
            turn = turns.prepare("0", chat, params)
            request, form, reader = turn.request, turn.format, TurnReader(turns, turn)
        _continue(llm, request, turns.grammar(form), reader, options)
    return 0


def _continue(
    llm: LLM, request: Request, grammar: GrammarSpec | None, reader: TurnReader | None, options: argparse.Namespace
) -> None:
    """reader: None for a raw prompt."""
    printer = TurnPrinter(reasoning=not options.quiet)
    streams = request.params.n == 1 and not options.json
    collector, meter = Collector(llm.frontend.tokenizer, request, None, reader), Meter(len(request.prompt))
    for _, update in llm.follow([request], [grammar]):
        events = collector.take(update)
        meter.count(len(update.ids))
        meter.drafts.add(update.metrics and update.metrics.drafts)
        meter.cached = collector.output.num_cached_tokens
        if streams:
            printer.show(events)
    output = collector.output
    if options.json:
        print(msgspec.json.encode(as_record(output)).decode())
    elif streams:
        printer.end()
    else:
        for found in output.outputs:
            print(f"--- {found.index + 1} of {request.params.n} ({found.finish_reason})\n{_shown(found)}")
    if not options.quiet:
        note(meter.summary())


def _shown(completion: CompletionOutput) -> str:
    answer = completion.answer
    if answer is None:
        return completion.text
    calls = (call_text(call.name, call.arguments) for call in answer.tool_calls)
    return "\n".join(filter(None, (answer.content, *calls)))


def _run_jsonl(options: argparse.Namespace, chosen: dict) -> int:
    for name in ("prompt", "file", "system", "tools", "response_format"):
        if getattr(options, name) is not None:
            raise RequestError(f"--jsonl is given, and so is {name!r}; each line of the file brings its own.")
    return run_jsonl(options, chosen)


def _read_prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None and options.file is not None:
        raise RequestError("both a prompt and --file are given; one is needed.")
    if options.prompt is not None:
        return options.prompt
    try:
        return options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the prompt cannot be read from {options.file or 'standard input'}: {error}") from None


def read_tools(path: str | None) -> Any:
    """Tool definitions, which the template checks. Raises RequestError for a file that is no JSON."""
    return None if path is None else _read_json(path, "tools")


def _read_formats(path: str | None) -> dict[str, Any]:
    """A format for the answer, under the name it goes by."""
    if path is None:
        return {}
    found = _read_json(path, "response format")
    return {"response_format" if isinstance(found, dict) and "type" in found else "structured_outputs": found}


def _read_json(path: str, what: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"the {what} cannot be read from {path}: {error}") from None


class Meter:
    """Times generations: tokens, time to first token, tokens per second after it; drafts: how they fared."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.cached, self.tokens = prompt_tokens, 0, 0
        self._start = self._last = time.perf_counter()
        self.first_s, self._first_tokens = 0.0, 0
        self.drafts = Acceptance()

    def count(self, tokens: int = 1) -> None:
        """More tokens have come."""
        if not tokens:
            return
        self._last = time.perf_counter()
        self.tokens += tokens
        if not self._first_tokens:
            self.first_s, self._first_tokens = self._last - self._start, tokens

    @property
    def decode_s(self) -> float:
        return self._last - self._start - self.first_s

    @property
    def speed(self) -> str:
        after = self.tokens - self._first_tokens
        if not after or not self.decode_s:
            return "no more"
        return f"{after / self.decode_s:.1f} tok/s" + (f" ({self.drafts})" if self.drafts.steps else "")

    def summary(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens ({self.cached} cached), {self.tokens} generated, "
            f"first after {self.first_s * 1000:.0f} ms, then {self.speed}"
        )
