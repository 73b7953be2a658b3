"""A log of every Step an engine launched, and its replay: the same Steps on the same model give the same bits.

One JSON object a line: first a Header, then a Record for each Step, in the order of launch. Nothing but the model's
files is needed to run it again; a logits hash that differs shows the first Step whose result is another one.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from ... import __version__
from ..config import PAGE_TOKENS, ModelConfig
from ..core import Engine
from ..errors import LogError
from ..executor.device import pick_device, pick_dtype, pick_kv_dtype, use_threads
from ..executor.memory import Memory, MemoryLayout
from ..executor.runner import Runner
from ..model.qwen3_5 import Qwen3_5
from ..model.weights import load_weights, with_stored_head
from ..schedule.step import Begin, Edit, Step, StepChecker

_Count = Annotated[int, Meta(ge=1)]
_BIAS = Begin._fields.index("bias")
_VERSION = 3


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a Runner and its Memory are rebuilt from. model: the checkpoint directory's name; device: its type; threads:
    of torch on a CPU, which the order of its sums depends on; ring_rows, window_entries: as in MemoryLayout;
    draft_tokens: behind an id at most; mtp: whether the MTP head makes them; draft_vocabulary: among how many of the
    lowest ids it chooses, None for all; drafts_in_fp8: by an FP8 copy of the model's head; vocabulary: how many ids;
    package: this package's version; fp8: as in ModelConfig; kv_dtype: EngineConfig's kv_cache_dtype."""

    model: str
    dtype: str
    device: str
    threads: _Count
    pages: _Count
    slots: _Count
    ring_rows: Annotated[int, Meta(ge=0)]
    max_num_seqs: _Count
    max_model_len: _Count
    draft_tokens: Annotated[int, Meta(ge=0)]
    mtp: bool
    draft_vocabulary: _Count | None
    drafts_in_fp8: bool
    window_entries: _Count
    vocabulary: _Count
    package: str
    fp8: tuple[str, ...] = ()
    kv_dtype: Literal["auto", "fp8"] = "auto"
    kind: Literal["tokenspeed step log"] = "tokenspeed step log"
    version: int = _VERSION


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Step as it was launched. logits: SHA-256 of the bytes of its logits, in hexadecimal."""

    step: Step
    edits: tuple[Edit, ...]
    logits: str


def hash_logits(logits: Tensor) -> str:
    """Waits for the device."""
    return hashlib.sha256(logits.contiguous().cpu().view(torch.uint8).numpy()).hexdigest()


def header_of(engine: Engine, model: str) -> Header:
    memory, mtp = engine.runner.memory, engine.runner.model.mtp
    drafted = mtp.draft_ids if mtp else None
    return Header(
        model=model,
        dtype=str(memory.layout.dtype).removeprefix("torch."),
        device=memory.kv.device.type,
        threads=torch.get_num_threads(),
        pages=len(memory.kv),
        slots=len(memory.slots),
        ring_rows=memory.layout.ring_rows,
        max_num_seqs=engine.limits.max_seqs,
        max_model_len=engine.limits.max_tokens,
        draft_tokens=engine.limits.max_drafts,
        mtp=mtp is not None,
        draft_vocabulary=None if drafted is None else len(drafted),
        drafts_in_fp8=mtp is not None and mtp.drafts_in_fp8,
        window_entries=memory.layout.window_entries,
        vocabulary=engine.vocabulary,
        package=__version__,
        fp8=tuple(sorted(engine.runner.model.config.fp8)),
        kv_dtype="fp8" if memory.layout.kv_dtype else "auto",
    )


class StepLog:
    """Writes down what an engine launches from now on; it must not have launched anything before. `close` ends it."""

    def __init__(self, path: Path, engine: Engine, model: str):
        """model: the checkpoint directory's name. Raises LogError where the file cannot be written, and for an engine
        with host memory, whose moves a replay would not have."""
        if engine.runner.mover:
            raise LogError("steps with host memory cannot be replayed: leave out --host-memory to log them.")
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise LogError(f"the step log {path} cannot be written: {error.strerror}.") from None
        self._encoder = msgspec.json.Encoder()
        self._write(header_of(engine, model))
        engine.runner.observe = self._observe

    def close(self) -> None:
        self._file.close()

    def _observe(self, step: Step, edits: Sequence[Edit], logits: Tensor) -> None:
        self._write(Record(step, tuple(edits), hash_logits(logits)))

    def _write(self, line: Header | Record) -> None:
        self._file.write(self._encoder.encode(line) + b"\n")


def read_log(path: Path) -> Iterator[tuple[int, Header | Record]]:
    """The lines of a log with their numbers, the Header first. Raises LogError with the number of a malformed one."""
    try:
        with path.open("rb") as lines:
            number = 0
            for number, line in enumerate(lines, 1):
                try:
                    yield number, _decode(line, Header if number == 1 else Record)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise LogError(f"{path}, line {number}: {error}") from None
            if number == 0:
                raise LogError(f"{path} is empty; a step log begins with a header line.")
    except OSError as error:
        raise LogError(f"the step log {path} cannot be read: {error.strerror}.") from None


def _decode(line: bytes, kind: type) -> Header | Record:
    value = msgspec.json.decode(line)
    if kind is Header and isinstance(value, dict) and value.get("version", _VERSION) != _VERSION:
        raise msgspec.ValidationError(
            f"a log of format {value['version']}, written by tokenspeed {value.get('package')}; this tokenspeed reads "
            f"format {_VERSION}: replay it with the one that wrote it."
        )
    if kind is Record:
        # JSON has no infinity: a bias of null is one that forbids the id.
        for begin in _biased(value):
            begin[_BIAS] = [[id, -math.inf if bias is None else bias] for id, bias in begin[_BIAS]]
    return msgspec.convert(value, kind)


def _biased(value: object) -> list[list]:
    """The begins of a decoded line that have well-formed biases."""

    def pairs(begin: object) -> bool:
        return (
            isinstance(begin, list)
            and len(begin) > _BIAS
            and isinstance(begin[_BIAS], list)
            and all(isinstance(pair, list) and len(pair) == 2 for pair in begin[_BIAS])
        )

    step = value.get("step") if isinstance(value, dict) else None
    begins = step.get("begins") if isinstance(step, dict) else None
    return [begin for begin in begins if pairs(begin)] if isinstance(begins, list) else []


class Difference(NamedTuple):
    """The first Step, counted from 1, whose logits are not the logged ones."""

    step: int
    logged: str
    found: str


class Replayed(NamedTuple):
    """steps, tokens: how many ran; difference: where it went apart, None where every bit was the same."""

    steps: int
    tokens: int
    difference: Difference | None


def replay(
    path: Path, directory: Path, device: str | None = None, progress: Callable[[int], None] = lambda step: None
) -> Replayed:
    """Run a log's Steps on the checkpoint in `directory`, up to the first difference.

    device: a torch device in place of the log's; progress: told each Step's number. Raises LogError for a log that
    cannot be read or does not fit the model, ConfigError or CapacityError for a model or device that cannot be used.
    """
    lines = read_log(path)
    _, header = next(lines)
    runner = _runner(path, header, directory, device)
    checker = StepChecker(header.pages, header.slots)
    found: list[str] = []
    runner.observe = lambda step, edits, logits: found.append(hash_logits(logits))
    count = tokens = 0
    for number, record in lines:
        if fault := _fault(record, header):
            raise LogError(f"{path}, line {number}: {fault}")
        try:
            checker.check(record.step)
            launched = runner.launch(record.step)
            launched.sample(record.edits)
            checker.read(record.step, [len(ids) for ids in launched.read().ids])
        except (AssertionError, LookupError, ValueError, TypeError, RuntimeError) as error:
            raise LogError(f"{path}, line {number}: the step cannot be run: {error}") from None
        count, tokens = count + 1, tokens + record.step.tokens
        progress(count)
        if found[-1] != record.logits:
            return Replayed(count, tokens, Difference(count, record.logits, found[-1]))
    return Replayed(count, tokens, None)


def _runner(path: Path, header: Header, directory: Path, device: str | None) -> Runner:
    config = with_stored_head(ModelConfig.from_directory(directory), directory)
    if config.vocab != header.vocabulary:
        raise LogError(
            f"{path} is of a model with {header.vocabulary} ids ({header.model}); {directory} has {config.vocab}."
        )
    device = pick_device(device or header.device)
    dtype = pick_dtype(header.dtype, device)
    use_threads(header.threads)
    config = replace(config, fp8=frozenset(header.fp8))
    model = Qwen3_5.empty(config, dtype, device, mtp=header.mtp)
    load_weights(model, directory, progress=False)
    model.lay_out_by_columns()
    if header.draft_vocabulary is not None or header.drafts_in_fp8:
        if not header.mtp:
            raise LogError(f"{path} has a copy of the head to draft by, and no MTP head.")
        ids = None if header.draft_vocabulary is None else torch.arange(header.draft_vocabulary)
        model.mtp.copy_head(ids, header.drafts_in_fp8)
    sizes, kv_dtype = (header.ring_rows, header.window_entries), pick_kv_dtype(header.kv_dtype)
    layout = MemoryLayout(model.share, dtype, *sizes, kv_dtype=kv_dtype)
    memory = Memory(layout, header.pages, header.slots, device)
    runner = Runner(model, memory, header.max_num_seqs, header.max_model_len, header.draft_tokens)
    runner.capture(progress=False)
    return runner


def _fault(record: Record, header: Header) -> str | None:
    """What a device could not be asked to do, as a sentence: places outside its tables, where no kernel looks."""
    step = record.step
    indices = [entry.index for entry in (*step.begins, *step.rows, *step.pages, *step.samples)]
    if bad := [index for index in indices if not 0 <= index < header.max_num_seqs]:
        return f"index {bad[0]} is outside the {header.max_num_seqs} sequences of the header"
    groups = [row.tokens for row in step.prefill] + [row.scored for row in step.prefill]
    groups += [
        (*b.banned, *b.allowed, *b.prompt, *b.output, *b.stops, *b.history, *(id for id, _ in b.bias))
        for b in step.begins
    ]
    groups += [edit.banned for edit in record.edits]
    if bad := [id for group in groups for id in group if not 0 <= id < header.vocabulary]:
        return f"token id {bad[0]} is outside the vocabulary of {header.vocabulary}"
    if bad := [row.end for row in step.prefill if row.start < 0 or row.end > header.max_model_len]:
        return f"a row ends at token {bad[0]}, outside the {header.max_model_len} of the header"
    if bad := [number for number in (*(e.sample for e in record.edits), *(s.row for s in step.samples)) if number < 0]:
        return f"a sample or its row has the number {bad[0]}"
    if bad := [edit.sample for edit in record.edits if edit.sample >= len(step.samples)]:
        return f"an edit is of sample {bad[0]}, and the step has {len(step.samples)}"
    if bad := [edit.place for edit in record.edits if not 0 <= edit.place < step.width]:
        return f"an edit is at place {bad[0]} of rows of {step.width} tokens"
    pages = -(-header.max_model_len // PAGE_TOKENS)
    if bad := [p for p in step.pages if p.first < 0 or p.first + len(p.pages) > pages]:
        return f"pages {bad[0].first} to {bad[0].first + len(bad[0].pages)} are outside the {pages} of a sequence"
    if not 1 <= step.width <= 1 + header.draft_tokens or not 0 <= step.drafts <= header.draft_tokens:
        return f"width {step.width} and {step.drafts} drafts are outside the {header.draft_tokens} drafts of the header"
    if not step.rows:
        return "the step has no rows"
    return None
