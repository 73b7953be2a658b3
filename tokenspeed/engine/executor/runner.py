"""Runs Steps on one device, in the order in which they are launched."""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ... import ops
from ..errors import CapacityError
from ..model.inputs import Batch
from ..model.qwen3_5 import Qwen3_5
from ..request import TokenScores
from ..schedule.step import Edit, Step
from .batch import Forwarded, Rotary, Tables, build_batch, decode_batch, pack_rows, to_device
from .drafting import Chosen, Drafter, LookupDrafter, MtpDrafter
from .graphs import DecodeGraphs
from .memory import Memory
from .mover import Mover
from .sampling import Choices, Sampler, Scores, Vocabulary

NONE_ALLOWED = ops.sampling.NONE_ALLOWED  # in place of an id: none could be chosen
_DECODE_OPERATORS = {
    "attention_prologue",
    "gated_delta_rule_decode",
    "moe_block",
    "moe_experts",
    "moe_route",
    "paged_attention_decode",
}


class Result(NamedTuple):
    """What a Step brought: ids for each sample, the last of them negative where none could be chosen (`ops.sample`);
    log-probabilities of samples that asked for them, an entry an id, by sample; of the scored prompt tokens, by row of
    the Step; rows that are not sampled and whose logits are not finite."""

    ids: list[list[int]]
    scores: dict[int, list[TokenScores]]
    prompt_scores: dict[int, list[TokenScores]]
    corrupted: Sequence[int] = ()


class Launched:
    """A Step on its way. `sample` must be called once before `read`."""

    def __init__(self, runner: "Runner", step: Step):
        self._runner, self._step = runner, step
        self._forwarded: Forwarded | None = None
        self._news: Tensor | None = None  # of each sample how many ids count, and the ids
        self._scores: Scores | None = None
        self._prompt_scores: dict[int, Scores] = {}
        self._unsampled: tuple[list[int], Tensor] | None = None  # rows, and whether the logits behind each are finite
        self._event: torch.cuda.Event | None = None
        self._done = False
        self._drafts: Tensor | None = None
        self._drafts_event: torch.cuda.Event | None = None
        if step.edited and step.decode and runner.device.type == "cuda":
            # Before the forward pass, which takes longer than the host.
            self._drafts = runner.drafts(step).to("cpu", non_blocking=True)
            self._drafts_event = torch.cuda.Event()
            self._drafts_event.record()
        runner.do(self._forward)

    def drafts(self) -> list[list[int]]:
        """Of a Step that the host has a say in, what each decode row verifies behind its last id. The Step before must
        have been read."""
        if not self._step.decode:
            return []
        if self._drafts is None:
            self._runner.finish()
            self._drafts = self._runner.drafts(self._step)
        if self._drafts_event is not None:
            self._drafts_event.synchronize()
        return self._drafts.tolist()

    def sample(self, edits: Sequence[Edit] = ()) -> None:
        """Choose the ids, once the forward pass is done; the edits concern samples that are marked `edited`."""
        if self._step.edited:
            self._runner.announce(list(edits))
        self._runner.do(lambda: self._choose(edits))

    def read(self) -> Result:
        """Waits for the Step, and all before it."""
        while self._runner.queue and not self._done:
            self._runner.advance()
        if self._event is not None:
            self._event.synchronize()
        self._runner.check()
        step = self._step
        ids = [] if self._news is None else [ids[:count] for count, *ids in self._news.tolist()]
        scores: dict[int, list[TokenScores]] = {}
        if self._scores is not None:
            widths = [step.width if i < len(step.decode) else 1 for i in range(len(step.samples))]
            wanted = [max(s.logprobs, 0) for s, width in zip(step.samples, widths, strict=True) for _ in range(width)]
            rows, at = self._scores.rows(wanted), 0
            for i, (sample, width) in enumerate(zip(step.samples, widths, strict=True)):
                if sample.logprobs >= 0:
                    scores[i] = rows[at : at + len(ids[i])]
                at += width
        prompt_scores = {}
        for i, found in self._prompt_scores.items():
            prompt_scores[i] = found.rows([step.rows[i].alternatives] * len(found.rank))
        rows, finite = self._unsampled or ((), None)
        corrupted = [row for row, good in zip(rows, finite.tolist(), strict=True) if not good] if rows else []
        return Result(ids, scores, prompt_scores, corrupted)

    def _forward(self) -> None:
        if self._step.rows:
            self._forwarded = self._runner.forward(self._step)

    @torch.inference_mode()
    def _choose(self, edits: Sequence[Edit]) -> None:
        step, forwarded, runner = self._step, self._forwarded, self._runner
        if forwarded is None:  # nothing but moves
            runner.observe(step, edits, runner.no_logits)
            self._done = True
            return
        logits, at = forwarded.logits, len(step.decode) * step.width
        for i, row in enumerate(step.prefill, len(step.decode)):
            if row.scored:
                wanted = to_device(np.array(row.scored, dtype=np.int64), logits.device)
                scores = runner.vocabulary.scores(logits[at : at + len(row.scored)], wanted, row.alternatives)
                self._prompt_scores[i] = scores.to("cpu")
            at += row.logits
        if unsampled := sorted(set(range(len(step.decode), len(step.rows))) - {s.row for s in step.samples}):
            ends = last_logits(step)
            at = to_device(np.array([ends[row - len(step.decode)] for row in unsampled]), logits.device)
            finite = logits[at].amax(-1).isfinite()  # NaN in a state or a key reaches every row behind it
            self._unsampled = unsampled, finite.to("cpu", non_blocking=True)
        news, scores = runner.choose(step, forwarded, edits)
        self._news = news if news is None else news.to("cpu", non_blocking=True)
        self._scores = scores and scores.to("cpu")
        if logits.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        runner.observe(step, edits, logits)
        self._forwarded, self._done = None, True


def decided(step: Step, edits: Sequence[Edit]) -> np.ndarray:
    """At how many places of each decode row an id may be chosen: of one that the host has a say in, as far as the edits
    go."""
    decode = step.samples[: len(step.decode)]
    places = np.array([1 if sample.edited else step.width for sample in decode], dtype=np.int32)
    for edit in edits:
        if edit.sample < len(decode) and decode[edit.sample].edited:
            places[edit.sample] = max(places[edit.sample], edit.place + 1)
    return places


def last_logits(step: Step) -> np.ndarray:
    """Of each prefill row the row of the logits behind its last token."""
    return np.cumsum([row.logits for row in step.prefill]) + len(step.decode) * step.width - 1


class Runner:
    """A model, its memory, and what the device keeps per sequence.

    On a GPU a launch starts work and returns. On a CPU it is only queued, and done when somebody reads a result: so the
    host plans one Step ahead there too, and an id is still known as soon as it was computed. What follows on the ids,
    the MTP head's keys and values and the drafts, waits there until `finish`, so that the ids can be told before.
    """

    def __init__(
        self,
        model: Qwen3_5,
        memory: Memory,
        max_seqs: int = 8,
        max_tokens: int | None = None,
        drafts: int = 0,
        mover: Mover | None = None,
    ):
        """max_seqs: sequence indices; max_tokens: of one sequence, the model's context where it is None; drafts: behind
        an id at most: of the model's MTP head, or looked up where it has none; mover: of a host tier."""
        self.mover = mover
        self.model, self.memory, self.device = model, memory, memory.kv.device
        longest = max_tokens or model.config.max_context
        self.tables = Tables(max_seqs, -(-longest // memory.kv.shape[4]), self.device, drafts)
        self.vocabulary = Vocabulary(model.share.vocab, model.communicator)
        self.sampler = Sampler(max_seqs, self.vocabulary, self.device)
        # To the other ranks, before it runs.
        self.announce: Callable[[Step | list[Edit]], None] = lambda message: None
        self.observe: Callable[[Step, Sequence[Edit], Tensor], None] = lambda step, edits, logits: None
        # Raises where results are not to be trusted because another rank is lost.
        self.check: Callable[[], None] = model.communicator.check
        self._rotary = Rotary(*model.rotary(self.device))
        self._drafter: Drafter | None = None
        if model.mtp:
            self._drafter = MtpDrafter(model.mtp, memory, self.tables, self.sampler, self._rotary)
        elif drafts:
            self._drafter = LookupDrafter(self.tables, longest)
        self.graphs: DecodeGraphs | None = None
        self.draft_costs: tuple[tuple[int, float], ...] = ()  # as `Limits.draft_costs`, where they were measured
        self.queue: deque[Callable[[], None]] = deque()  # on a CPU: what was launched and not done
        self._following: Callable[[], None] | None = None  # on a CPU: behind ids that were read

    @property
    def no_logits(self) -> Tensor:
        return torch.empty(0, self.model.config.vocab, device=self.device)

    @property
    def looks_up_drafts(self) -> bool:
        """Whether a Begin must bring its history."""
        return isinstance(self._drafter, LookupDrafter)

    def launch(self, step: Step) -> Launched:
        """Start a Step behind those launched before it."""
        self.finish()
        self.announce(step)
        if step.moves or step.moved:
            self.mover.settle(step.moved)
            self.mover.launch(step.moves)
        return Launched(self, step)

    @torch.inference_mode()
    def forward(self, step: Step) -> Forwarded:
        """The Step up to its logits. Mutates the arenas and tables as the Step says."""
        self.tables.begin(step.begins)
        self.sampler.begin(step.begins)
        if self._drafter and step.begins:
            self._drafter.begin(step.begins)
        if step.copies:
            source, target, rows = to_device(np.array(step.copies, dtype=np.int32).T.copy(), self.device)
            ops.copy_pages(self.memory.kv, source, target, rows)
        self.tables.add_pages(step.pages)
        places = self.memory, self.tables, self._rotary
        if step.prefill:
            return self._run(build_batch(step, *places))
        if self.graphs and (forwarded := self.graphs.forward(step)):
            return forwarded
        packed = to_device(pack_rows(step.decode, len(step.decode), self.tables.nobody), self.device)
        width = self.tables.width([row.index for row in step.decode])
        return self._run(decode_batch(packed, step.width, *places, width))

    def _run(self, batch: Batch) -> Forwarded:
        return Forwarded(batch, *self.model(batch))

    def drafts(self, step: Step) -> Tensor:
        """Behind the last ids of a Step's decode rows, before it is done, [B, width - 1] int64."""
        index = to_device(np.array([row.index for row in step.decode], dtype=np.int64), self.device)
        return self.tables.ids[index, 1 : step.width]

    def choose(self, step: Step, forwarded: Forwarded, edits: Sequence[Edit]) -> tuple[Tensor | None, Scores | None]:
        """Choose ids behind a forward pass, verify its drafts, and draft anew. Of each sample how many of its ids
        count, and the ids, [S, 1 + width] int64; log-probabilities of every row of the samples. Mutates the tables."""
        if not step.samples:
            self._follow(step, forwarded, None, None)
            return None, None
        if not step.prefill and self.sampler.plain(step.samples):
            greedy = self.sampler.greedy(step.samples)
            news = self.graphs.choose(step, greedy) if self.graphs else None
            if news is None:
                news = self.choose_plainly(forwarded, greedy)
            self._follow(step, forwarded, news, None, greedy)
            return news, None
        forwarded = forwarded.first(len(step.decode))
        decode, width = forwarded.batch.decode, step.width
        decoding, rows = len(step.decode), forwarded.logits
        index, output, tokens = [], [], forwarded.logits.new_zeros(0, width, dtype=torch.int64)
        rows = rows[: decoding * width] if len(step.samples) == decoding else rows
        if decode:
            tokens = decode.tokens
            if step.edited and width > 1:  # what the host has not decided about is no choice
                places = to_device(decided(step, edits), self.device)
                tokens = tokens.masked_fill(torch.arange(width, device=self.device) >= places[:, None], -1)
            index.append(decode.index[:, None].expand(-1, width).flatten())
            output.append(decode.outputs.flatten())
        first = self._first(step)
        if first is not None:
            at, ends, new = first
            index.append(new)
            output.append((ends - self.tables.prompt[new]).long())
            rows = torch.cat([rows[: decoding * width], rows[at]])
        choices = Choices(torch.cat(index), torch.cat(output), tokens[:, 1:])
        ids, scores = self.sampler.choose(step.samples, choices, rows, edits)
        cut, counts, news = decoding * width, [], []
        if decode:
            own = ids[:cut].view(decoding, width)
            counts.append(self._accept(own, tokens, decode.outputs, decode.context_lens, decode.index))
            news.append(torch.cat([counts[-1][:, None], own], 1))
        if first is not None:
            own = ids[cut:, None]
            counts.append(self._accept(own, own, output[-1][:, None], ends - 1, new))
            news.append(torch.cat([counts[-1][:, None], own, own.new_zeros(len(own), width - 1)], 1))
        self.sampler.count(step.samples, choices, ids, torch.cat(counts))
        news = torch.cat(news)
        self._follow(step, forwarded, news, first)
        return news, scores

    def choose_plainly(self, forwarded: Forwarded, greedy: bool = False, out: Tensor | None = None) -> Tensor:
        """`choose`, without what follows on it, for decode rows whose ids are drawn from the logits as they are.
        greedy: as in `Sampler.draw`; out: takes the result. Reads nothing on the host and has shapes of the batch
        alone, so it can stand in a CUDA graph."""
        rows = forwarded.batch.decode
        batch, width = rows.tokens.shape
        index = rows.index[:, None].expand(-1, width).flatten()
        ids = self.sampler.draw(forwarded.logits, index, rows.outputs.flatten(), greedy).view(batch, width)
        counts = self._accept(ids, rows.tokens, rows.outputs, rows.context_lens, rows.index)
        return torch.cat([counts[:, None], ids], 1, out=out)

    def follow(
        self,
        forwarded: Forwarded,
        news: Tensor | None,
        drafts: int,
        greedy: bool = False,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """What follows on a choice, by the drafter. news: of the decode rows, as `choose` gives them; greedy, first: as
        in `Chosen`. Of decode rows alone it can stand in a CUDA graph, however their ids were chosen."""
        counts, ids = (None, None) if news is None else (news[:, 0], news[:, 1:].clamp(min=0))
        self._drafter.follow(Chosen(forwarded.batch, forwarded.hidden, ids, counts, first, greedy), drafts)

    def _accept(self, ids: Tensor, tokens: Tensor, outputs: Tensor, context_lens: Tensor, index: Tensor) -> Tensor:
        t = self.tables
        rules = (t.min_tokens, t.stops, t.length, t.left, t.ids)
        return ops.accept_tokens(ids, tokens, outputs, context_lens, index, *rules)

    def _first(self, step: Step) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of the P samples of prefill rows: the row of their logits int64, the tokens before them int32, and their
        sequences' indices int64."""
        samples = step.samples[len(step.decode) :]
        if not samples:
            return None
        decoding, ends = len(step.decode), last_logits(step)
        numbers = [(ends[s.row - decoding], step.rows[s.row].end, s.index) for s in samples]
        at, end, index = to_device(np.array(numbers, dtype=np.int32).T.copy(), self.device)
        return at.long(), end, index.long()

    def _follow(self, step: Step, forwarded: Forwarded, news: Tensor | None, first, greedy: bool = False) -> None:
        """The drafter takes note. Who begins behind another's row has no memory yet, and is not drafted for."""
        if not self._drafter or (self.graphs and not step.prefill and self.graphs.follow(step, news, greedy)):
            return
        decoding, behind = len(step.decode), None
        own = [
            (i, step.rows[s.row].write_slot)
            for i, s in enumerate(step.samples[decoding:])
            if s.index == step.rows[s.row].index
        ]
        if own:
            places, slots = to_device(np.array(own, dtype=np.int32).T.copy(), self.device)
            behind = first[2][places.long()], slots
        chosen = forwarded.first(decoding), news[:decoding] if decoding else None
        self._follow_by(lambda: self.follow(*chosen, step.drafts, greedy, behind))

    @torch.inference_mode()
    def capture(self, depths: Callable[[int], int] = lambda sequences: 0, progress: bool = True) -> bool:
        """Let decode Steps replay CUDA graphs from now on. depths: drafts by the number of sequences. False, and
        nothing changes, where no GPU kernel serves one of their operators, or where one cannot be captured. Raises
        CapacityError where one of several ranks has no memory for them: the others wait for it in a collective."""
        if self.device.type != "cuda" or not set(ops.compiled_operators()) >= _DECODE_OPERATORS:
            return False
        try:
            greedy = (False, True) if self.vocabulary.tells_greedy else (False,)
            drafts = (lambda sequences: sorted({0, depths(sequences)})) if self._drafter else lambda sequences: ()
            self.graphs = DecodeGraphs(self, self.device, self.tables.nobody, greedy, drafts, progress)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) and self.model.mesh.world > 1:
                raise CapacityError(
                    "no memory is left for CUDA graphs: lower gpu_memory_utilization or max_num_seqs."
                ) from error
            tqdm.write(f"decode runs without CUDA graphs: {str(error).splitlines()[0]}", file=sys.stderr)
        return self.graphs is not None

    def forget_graphs(self) -> None:
        """Decode Steps run without graphs again."""
        self.graphs = None

    def decode_forward(self, packed: Tensor, width: int) -> Forwarded:
        """The forward pass of packed decode rows, to be captured."""
        return self._run(decode_batch(packed, width, self.memory, self.tables, self._rotary))

    def do(self, work: Callable[[], None]) -> None:
        """Now where launching is asynchronous, else when somebody waits for it."""
        if self.device.type == "cuda":
            work()
        else:
            self.queue.append(work)

    def advance(self) -> None:
        """The next of what was launched and is not done, on a CPU."""
        self.finish()
        self.queue.popleft()()

    def _follow_by(self, work: Callable[[], None]) -> None:
        if self.device.type == "cuda":
            work()
        else:
            self._following = work

    @torch.inference_mode()
    def finish(self) -> None:
        """Complete the Steps that were read: before somebody else looks at the arenas, and where no Step comes next."""
        if work := self._following:
            self._following = None
            work()
