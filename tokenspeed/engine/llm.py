"""The offline API: a model in this process, prompts in, tokens out as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from .checkpoint import resolve
from .config import PAGE_TOKENS, ModelConfig
from .device import pick_device, pick_dtype, use_threads
from .memory import Memory, MemoryLayout
from .model.qwen3_5 import Qwen3_5
from .model.weights import load_weights
from .request import SamplingParams, check_prompt
from .runner import Runner
from .step import Row, Step
from .text.detokenizer import Detokenizer
from .text.generation_config import GenerationDefaults
from .text.template import ChatTemplate
from .text.tokenizer import Tokenizer

_PREFILL_TOKENS = 2048  # at most this many tokens of prompts in one step
_SHARED_BYTES = 64 << 20  # smaller models gain nothing from a second thread, and wait for it on a busy machine


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. sequence: which prompt; text: what it completes, "" inside a character; finish_reason:
    "stop" (an end-of-sequence id), "length" (max_tokens), or None while the sequence goes on."""

    sequence: int
    id: int
    text: str
    finish_reason: str | None


class LLM:
    """A checkpoint, ready to generate.

    model: a directory, a hub id, or None for the shipped model; dtype: "bfloat16", "float32", or "auto" (bf16 on a GPU,
    fp32 on a CPU); device: a torch device, or "auto"; threads: how many CPU threads torch may use in this process, None
    for torch's own choice, or 1 where the model is too small to share. Raises ConfigError for what cannot be used.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        progress: bool = True,
    ):
        self.directory = resolve(model)
        self.config = ModelConfig.from_directory(self.directory)
        self.tokenizer = Tokenizer.from_directory(self.directory)
        self.template = ChatTemplate.from_directory(self.directory, self.tokenizer)
        self.defaults = GenerationDefaults.from_directory(self.directory, self.tokenizer)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.model = Qwen3_5.empty(self.config, self.dtype, self.device)
        load_weights(self.model, self.directory, progress)
        if threads is None and sum(p.nbytes for p in self.model.parameters()) < _SHARED_BYTES:
            threads = 1
        if threads is not None:
            use_threads(threads)

    def sampling_defaults(self) -> dict[str, float]:
        """The checkpoint's own sampling values, as SamplingParams takes them."""
        d = self.defaults
        temperature = d.temperature if d.do_sample else 0.0
        return {"temperature": temperature, "top_k": d.top_k, "top_p": d.top_p, "min_p": d.min_p}

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; kwargs as `ChatTemplate.render` takes them."""
        return self.tokenizer.encode_rendered(self.template.render(messages, tools, **kwargs))

    def stream(self, prompts: Sequence[list[int]], params: SamplingParams) -> Iterator[Token]:
        """Generate for all prompts side by side, yielding every token as it is chosen.

        Raises RequestError for a prompt that cannot be taken, CapacityError for more than memory holds, before the
        first token.
        """
        for prompt in prompts:
            check_prompt(prompt, params.max_tokens, self.config.vocab, self.config.max_context)
        pages = [-(-(len(prompt) + params.max_tokens) // PAGE_TOKENS) for prompt in prompts]
        memory = Memory(MemoryLayout(self.config, self.dtype), sum(pages), len(prompts), self.device)
        return self._stream(Runner(self.model, memory), prompts, pages, params)

    def _stream(self, runner: Runner, prompts, pages, params) -> Iterator[Token]:
        ends = [sum(pages[: i + 1]) for i in range(len(pages))]
        owned = [tuple(range(end - count, end)) for end, count in zip(ends, pages, strict=True)]
        stops = () if params.ignore_eos else self.defaults.eos_ids
        detokenizers = [Detokenizer(self.tokenizer) for _ in prompts]
        running: dict[int, int] = {}  # sequence -> the token to consume next
        for step, finished in _prefill_steps(prompts, owned):
            logits = runner.forward(step)
            if finished:
                running.update(zip(finished, self._choose(logits, params, finished, 0), strict=True))
        index = 0
        while running:
            for sequence, id in list(running.items()):
                reason = "stop" if id in stops else "length" if index + 1 == params.max_tokens else None
                text = detokenizers[sequence].push(id)
                if reason:
                    del running[sequence]
                    text += detokenizers[sequence].finish()
                yield Token(sequence, id, text, reason)
            if running:
                rows = tuple(
                    Row((id,), len(prompts[sequence]) + index, owned[sequence], sequence, sequence)
                    for sequence, id in running.items()
                )
                index += 1
                chosen = self._choose(runner.forward(Step(decode=rows)), params, list(running), index)
                running = dict(zip(running, chosen, strict=True))

    def _choose(self, logits: torch.Tensor, params: SamplingParams, sequences: list[int], index: int) -> list[int]:
        rows = len(sequences)

        def column(value, dtype):
            return torch.full((rows,), value, dtype=dtype, device=logits.device)

        return ops.sample(
            logits,
            column(params.temperature, torch.float32),
            column(params.top_k, torch.int32),
            column(params.top_p, torch.float32),
            column(params.min_p, torch.float32),
            params.seed + torch.tensor(sequences, device=logits.device),
            column(index, torch.int64),
        ).tolist()


def _prefill_steps(prompts: Sequence[list[int]], owned: list[tuple[int, ...]]) -> Iterator[tuple[Step, list[int]]]:
    """Steps that consume the prompts, each with the sequences whose prompt it ends."""
    rows: list[Row] = []
    finished: list[int] = []
    room = _PREFILL_TOKENS
    for sequence, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            piece = tuple(prompt[start : start + room])
            last = start + len(piece) == len(prompt)
            rows.append(Row(piece, start, owned[sequence], sequence, sequence, logits=int(last)))
            finished += [sequence] if last else []
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield Step(prefill=tuple(rows)), finished
                rows, finished, room = [], [], _PREFILL_TOKENS
    if rows:
        yield Step(prefill=tuple(rows)), finished
