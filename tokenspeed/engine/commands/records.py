"""Requests and results as JSON lines: `generate --jsonl`."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from tqdm import tqdm

from ..bench.drive import drive
from ..chat.collector import Collector
from ..chat.conversation import Conversation
from ..chat.formats import Format
from ..chat.turn import TurnReader
from ..core import Sink, Update
from ..errors import ConfigError, RequestError, TokenSpeedError
from ..llm import LLM
from ..request import Request, RequestOutput, SamplingParams
from ..text.grammar import GrammarSpec
from .options import note, open_model

_CHAT_FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "enable_thinking")  # beside the messages
_FORMAT_FIELDS = ("response_format", "structured_outputs")
_OWN_FIELDS = ("id", "prompt", "messages", *_CHAT_FIELDS, *_FORMAT_FIELDS)
_SAMPLING_FIELDS = tuple(SamplingParams.__dataclass_fields__)
_QUEUED = 4  # times what runs at once: enough to find who shares a prefix, and the file need not fit in memory


def as_record(output: RequestOutput) -> dict[str, Any]:
    """A result as a JSON object; answers of conversations have their `message` beside the text."""
    outputs = []
    for completion in output.outputs:
        record = {name: value for name, value in asdict(completion).items() if value is not None and name != "answer"}
        if completion.answer is not None:
            record["message"] = completion.answer.message()
        outputs.append(record)
    record = {
        "id": output.request_id,
        "outputs": outputs,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "completion_tokens": sum(len(completion.token_ids) for completion in output.outputs),
        },
        "reuse": output.reuse and asdict(output.reuse),
        "metrics": output.metrics and asdict(output.metrics),
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [e and {id: asdict(p) for id, p in e.items()} for e in output.prompt_logprobs]
    return record


class _Line:
    """A request of the file and what has come of it."""

    def __init__(self, number: int, name: Any):
        self.number, self.name = number, name
        self.record: dict[str, Any] | None = None  # once it has ended

    def fail(self, error: TokenSpeedError) -> None:
        self.record = {
            "id": self.name,
            "line": self.number,
            "error": {"type": type(error).__name__, "message": str(error)},
        }


class _Batch:
    """Lines in, records out in the order of the lines."""

    def __init__(self, llm: LLM, options: argparse.Namespace, chosen: dict, out: BinaryIO, bar: tqdm):
        self._llm, self._chosen, self._out, self._bar = llm, chosen, out, bar
        self._raw, self._thinking = options.raw, False if options.no_thinking else None
        self._lines: list[_Line] = []  # read, and not written yet
        self.written = self.failed = 0

    def requests(self, source: BinaryIO) -> Iterator[tuple[Request, Sink, GrammarSpec | None]]:
        """Those that can be read. One that cannot has its error as its record."""
        for number, text in enumerate(source, 1):
            if not text.strip():
                self._bar.update()
                continue
            line = _Line(number, f"line-{number}")
            self._lines.append(line)
            try:
                request, grammar, collector = self._read(text, line)
            except TokenSpeedError as error:
                line.fail(error)
                self._write()
                continue
            yield request, self._sink(line, collector), grammar

    def refused(self, request: Request, error: TokenSpeedError) -> None:
        next(line for line in self._lines if request.id == str(line.number)).fail(error)
        self._write()

    def flush(self) -> None:
        """What has ended though a line before it has not, when nothing more will come. What was cut short is lost."""
        self._lines = [line for line in self._lines if line.record]
        self._write()

    def _read(self, text: bytes, line: _Line) -> tuple[Request, GrammarSpec | None, Collector]:
        try:
            fields = msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"line {line.number} is no JSON: {error}") from None
        if not isinstance(fields, dict):
            raise RequestError(f"line {line.number} is a JSON {type(fields).__name__}; an object is needed.")
        if fields.get("id") is not None:
            line.name = fields["id"]
        if unknown := sorted(fields.keys() - {*_OWN_FIELDS, *_SAMPLING_FIELDS}):
            raise RequestError(
                f"field {unknown[0]!r} is unknown; known are {', '.join((*_OWN_FIELDS, *_SAMPLING_FIELDS))}."
            )
        if ("prompt" in fields) == ("messages" in fields):
            raise RequestError("one of 'prompt' and 'messages' is needed, and not both.")
        sampling = {name: fields[name] for name in _SAMPLING_FIELDS if name in fields}
        params = self._llm.frontend.sampling_params(**self._chosen | json_sampling(sampling))
        return self._prepare(str(line.number), fields, params)

    def _prepare(self, id: str, fields: dict, params: SamplingParams) -> tuple[Request, GrammarSpec | None, Collector]:
        """A prompt that is text is a user's message, unless raw."""
        prompt, tokenizer = fields.get("prompt"), self._llm.frontend.tokenizer
        formats = {name: fields.get(name) for name in _FORMAT_FIELDS}
        if "prompt" in fields and (self._raw or not isinstance(prompt, str)):
            if unused := [name for name in _CHAT_FIELDS if fields.get(name) is not None]:
                raise RequestError(f"{unused[0]} need a conversation: give 'messages', or a 'prompt' that is text.")
            if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(id) is int for id in prompt)):
                raise RequestError(f"prompt is {prompt!r}; it must be text or a list of token ids.")
            request = self._llm.frontend.request(id, prompt, params)
            return request, self._llm.turns.grammar(Format.of_text(**formats)), Collector(tokenizer, request)
        messages = fields.get("messages", [{"role": "user", "content": prompt}])
        chosen = {name: fields[name] for name in _CHAT_FIELDS if fields.get(name) is not None}
        options = {"enable_thinking": self._thinking} | chosen
        turns = self._llm.turns
        turn = turns.prepare(id, Conversation(messages, **options, **formats), params)
        collector = Collector(tokenizer, turn.request, None, TurnReader(turns, turn))
        return turn.request, turns.grammar(turn.format), collector

    def _sink(self, line: _Line, collector: Collector) -> Sink:
        def take(update: Update) -> None:
            collector.take(update)
            if collector.output.finished and update.finish_reason != "abort":
                if collector.error:
                    line.fail(collector.error.error)
                else:
                    line.record = as_record(collector.output) | {"id": line.name}
                self._write()

        return take

    def _write(self) -> None:
        while self._lines and self._lines[0].record:
            line = self._lines.pop(0)
            self._out.write(msgspec.json.encode(line.record) + b"\n")
            self.written += 1
            self.failed += "error" in line.record
            self._bar.update()
        self._out.flush()


def json_sampling(fields: dict) -> dict:
    """Sampling fields as JSON brings them, where the keys of logit_bias are strings. Raises RequestError."""
    bias = fields.get("logit_bias")
    if bias is None:
        return fields
    try:
        return fields | {"logit_bias": {int(id): value for id, value in bias.items()}}
    except (AttributeError, ValueError):
        raise RequestError(f"logit_bias is {bias!r}; it must be an object of token ids and numbers.") from None


def run_jsonl(options: argparse.Namespace, chosen: dict) -> int:
    """Returns 1 where a line failed, else 0."""
    with (
        _input(options.jsonl) as (source, count),
        open_model(options) as llm,
        _output(options.output) as out,
        tqdm(total=count, desc="generating", unit="line", disable=options.quiet, leave=False) as bar,
    ):
        batch = _Batch(llm, options, chosen, out, bar)
        try:
            drive(llm.engine, batch.requests(source), _QUEUED * options.max_num_seqs, batch.refused)
        finally:
            batch.flush()
    if not options.quiet:
        note(f"{batch.written} lines written, {batch.failed} with an error")
    return int(batch.failed > 0)


@contextlib.contextmanager
def _input(name: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """The lines, and how many where that is known."""
    if name == "-":
        yield sys.stdin.buffer, None
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115  closed below; what its user raises is no error of opening it
    except OSError as error:
        raise RequestError(f"--jsonl: {name} cannot be read: {error.strerror}.") from None
    with file:
        count = sum(1 for _ in file)
        file.seek(0)
        yield file, count


@contextlib.contextmanager
def _output(name: str | None) -> Iterator[BinaryIO]:
    if name in (None, "-"):
        yield sys.stdout.buffer
        return
    try:
        file = Path(name).open("wb")  # noqa: SIM115  as above
    except OSError as error:
        raise ConfigError(f"--output: {name} cannot be written: {error.strerror}.") from None
    with file:
        yield file
