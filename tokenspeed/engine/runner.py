"""Runs Steps on one device, in the order in which they are launched."""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from .batch import DecodeColumns, Tables, build_batch, decode_batch, to_device
from .config import PAGE_TOKENS
from .graphs import DecodeGraphs
from .memory import Memory
from .model.qwen3_5 import Qwen3_5
from .request import TokenScores
from .sampling import Sampler, Scores, Vocabulary
from .step import Edit, NextStep, Step

_DECODE_OPERATORS = {
    "attention_prologue",
    "gated_delta_rule_decode",
    "moe_block",
    "moe_experts",
    "moe_route",
    "paged_attention_decode",
}


class Result(NamedTuple):
    """What a Step brought: an id for each sample; log-probabilities of samples that asked for them, by sample; of the
    scored prompt tokens, by row of the Step."""

    ids: list[int]
    scores: dict[int, TokenScores]
    prompt_scores: dict[int, list[TokenScores]]


class Launched:
    """A Step on its way. `sample` must be called once before `read`."""

    def __init__(self, runner: "Runner", step: Step | NextStep):
        self._runner, self._step = runner, step
        self._logits: Tensor | None = None
        self._ids: Tensor | None = None
        self._scores: Scores | None = None
        self._prompt_scores: dict[int, Scores] = {}
        self._event: torch.cuda.Event | None = None
        self._done = False
        runner.do(self._forward)

    def sample(self, edits: Sequence[Edit] = ()) -> None:
        """Choose the ids, once the forward pass is done; the edits concern samples that are marked `edited`."""
        if self._step.edited:
            self._runner.announce(list(edits))
        self._runner.do(lambda: self._choose(edits))

    def read(self) -> Result:
        """Waits for the Step, and all before it."""
        while self._runner.queue and not self._done:
            self._runner.queue.popleft()()
        if self._event is not None:
            self._event.synchronize()
        ids = [] if self._ids is None else self._ids.tolist()
        scores: dict[int, TokenScores] = {}
        if self._scores is not None:
            wanted = [sample.logprobs for sample in self._step.samples]
            scored = self._scores.rows([max(count, 0) for count in wanted])
            scores = {i: found for i, found in enumerate(scored) if wanted[i] >= 0}
        prompt_scores = {}
        if self._prompt_scores:
            rows = self._step.rows
            prompt_scores = {i: s.rows([rows[i].alternatives] * len(s.rank)) for i, s in self._prompt_scores.items()}
        return Result(ids, scores, prompt_scores)

    def _forward(self) -> None:
        self._logits = self._runner.forward(self._step)

    @torch.inference_mode()
    def _choose(self, edits: Sequence[Edit]) -> None:
        step, logits, at = self._step, self._logits, 0
        for i, row in enumerate(step.rows if step.prefill else ()):
            if row.scored:
                wanted = to_device(np.array(row.scored, dtype=np.int64), logits.device)
                scored = logits[at : at + len(row.scored)]
                scores = self._runner.vocabulary.scores(scored, wanted, row.alternatives)
                self._prompt_scores[i] = scores.to("cpu")
            at += row.logits
        base, ahead = (step.base, step.ahead) if isinstance(step, NextStep) else (step, 0)
        if base.samples:
            ids, scores = self._runner.sampler.choose(base.samples, logits, edits, ahead)
            self._ids = ids.to("cpu", non_blocking=True)
            self._scores = scores and scores.to("cpu")
        if logits.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._runner.observe(step, edits, logits)
        self._logits, self._done = None, True


class Runner:
    """A model, its memory, and what the device keeps per sequence.

    On a GPU a launch starts work and returns. On a CPU it is only queued, and done when somebody reads a result: so the
    host plans one Step ahead there too, and an id is still known as soon as it was computed.
    """

    def __init__(self, model: Qwen3_5, memory: Memory, max_seqs: int = 8, max_tokens: int | None = None):
        """max_seqs: sequence indices; max_tokens: of one sequence, the model's context where it is None."""
        self.model, self.memory, self.device = model, memory, memory.kv.device
        pages = -(-(max_tokens or model.config.max_context) // PAGE_TOKENS)
        self.tables = Tables(max_seqs, pages, self.device)
        self.vocabulary = Vocabulary(model.share.vocab, model.communicator)
        self.sampler = Sampler(max_seqs, self.vocabulary, self.tables.last_ids)
        # To the other ranks, before it runs.
        self.announce: Callable[[Step | NextStep | list[Edit]], None] = lambda message: None
        self.observe: Callable[[Step | NextStep, Sequence[Edit], Tensor], None] = lambda step, edits, logits: None
        self._rotary = model.rotary(self.device)
        self._columns = DecodeColumns()
        self._graphs: DecodeGraphs | None = None
        self.queue: deque[Callable[[], None]] = deque()  # on a CPU: what was launched and not done

    def launch(self, step: Step | NextStep) -> Launched:
        """Start a Step behind those launched before it."""
        self.announce(step)
        return Launched(self, step)

    @torch.inference_mode()
    def forward(self, step: Step | NextStep) -> Tensor:
        """Logits of the rows' last tokens, decode rows first, [L, vocab]. Mutates the arenas as the Step says."""
        self.sampler.begin(step.begins)
        if step.copies:
            source, target, rows = to_device(np.array(step.copies, dtype=np.int32).T.copy(), self.device)
            ops.copy_pages(self.memory.kv, source, target, rows)
        self.tables.update(step.grown)
        places = self.memory, self.tables, *self._rotary
        if step.prefill:
            return self.model(build_batch(step, *places))
        if self._graphs:
            return self._graphs.forward(step, self._columns)
        packed = self._columns.of(step, step.tokens)
        width = -(-(int(packed[1].max()) + 1) // PAGE_TOKENS)  # pages of the longest row, its new token among them
        return self.model(decode_batch(to_device(packed, self.device), *places, width))

    @torch.inference_mode()
    def capture(self, progress: bool = True) -> bool:
        """Let decode Steps replay CUDA graphs from now on. False, and nothing changes, where no GPU kernel serves one
        of their operators, or where one cannot be captured."""
        if self.device.type != "cuda" or not set(ops.compiled_operators()) >= _DECODE_OPERATORS:
            return False
        most = len(self.tables.last_ids)
        try:
            self._graphs = DecodeGraphs(self.model, self.memory, self.tables, self._rotary, most, progress)
        except RuntimeError as error:
            tqdm.write(f"decode runs without CUDA graphs: {str(error).splitlines()[0]}", file=sys.stderr)
        return self._graphs is not None

    def do(self, work: Callable[[], None]) -> None:
        """Now where launching is asynchronous, else when somebody waits for it."""
        if self.device.type == "cuda":
            work()
        else:
            self.queue.append(work)
