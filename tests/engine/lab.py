"""An engine under observation: its logits beside those of one uncached pass, and what its cache did."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from threading import RLock
from unittest.mock import patch

import torch
from checkpoints import CPU, Shape, load, oracle
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.core import Engine, Update
from tokenspeed.engine.errors import TokenSpeedError
from tokenspeed.engine.executor.batch import paged
from tokenspeed.engine.executor.drafting import MtpDrafter
from tokenspeed.engine.executor.loading import slot_sizes
from tokenspeed.engine.executor.memory import HostMemory, Memory, MemoryLayout
from tokenspeed.engine.executor.mover import Mover
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.inputs import Batch, Rows
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.request import Request, SamplingParams
from tokenspeed.engine.schedule.cache import Admission, CacheConfig, Fork, PrefixCache
from tokenspeed.engine.schedule.scheduler import Continuation, Limits
from tokenspeed.engine.schedule.step import NewPages, PrefillRow, Step
from tokenspeed.engine.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
NEAR_TIE = 2e-5  # of router probabilities: below it two correct orders of summation may choose different experts
ENDS = tuple(range(0, 300, 12))  # ids that end a generation: an untrained model samples one soon


@cache
def random_model(directory: Path) -> Qwen3_5:
    """A dense model with random weights, by way of a checkpoint in `directory`. Its norms never divide by nearly
    nothing, so that rounding stays far below the tolerance; its states forget slowly, so that a wrong one shows."""
    made = oracle(Shape(), rms_norm_eps=1e-3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3)
    made.save_pretrained(directory)
    return load(directory)


@cache
def shipped_model() -> Qwen3_5:
    return load(SHIPPED)


@cache
def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(SHIPPED)


@torch.inference_mode()
def uncached_logits(model: Qwen3_5, tokens: list[int]) -> tuple[Tensor, int]:
    """Logits of every position by one pass in fresh memory, [tokens, vocab], and how many of them no near-tie of a
    router made arbitrary: from the first one on, two correct computations may differ."""
    count = len(tokens)
    pages = -(-count // 64)
    runner = Runner(model, Memory(MemoryLayout(model.share, torch.float32), pages, 1, CPU), max_seqs=1)
    clear, route = [count], ops.moe_route

    def watch(scores: Tensor, top_k: int, context_lens: Tensor | None):
        best = scores.float().softmax(-1).sort(descending=True).values
        close = (best[:, top_k - 1] - best[:, top_k] < NEAR_TIE).nonzero()
        clear.extend(close.flatten().tolist())
        return route(scores, top_k, context_lens)

    with patch.object(ops, "moe_route", watch):
        row = PrefillRow(tuple(tokens), 0, 0, 0, logits=count)
        step = Step(prefill=(row,), pages=(NewPages(0, 0, tuple(range(pages))),))
        return runner.forward(step).logits, min(clear)


@dataclass
class Talk:
    """A request's outcome. outputs: ids by continuation."""

    request: Request
    sequences: list[Continuation]
    outputs: list[list[int]]
    reasons: dict[int, str] = field(default_factory=dict)
    reuse: object = None
    errors: list[TokenSpeedError] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.reasons) == len(self.outputs)

    def take(self, update: Update) -> None:
        self.outputs[update.index] += update.ids
        self.reuse = self.reuse or update.reuse
        if update.finish_reason:
            self.reasons[update.index] = update.finish_reason
        if update.error:
            self.errors.append(update.error.error)

    def history(self, child: int = 0) -> list[int]:
        """Prompt and answer."""
        return [*self.request.prompt, *self.outputs[child]]


class Lab:
    """One engine on the CPU, fp32, every Step and the cache validated.

    admissions, forks, ends: what the cache answered and was told, by sequence id. computed: rows by sequence id, as
    (first position, end). tamper: called at each admission, before its first Step is launched. slow_moves: a seed, 0
    for moves that are done when they are first asked for.
    """

    def __init__(
        self,
        model: Qwen3_5,
        *,
        pages: int = 64,
        slots: int = 16,
        max_seqs: int = 4,
        max_num_batched_tokens: int = 256,
        ring_rows: int = 0,
        validate: bool = True,
        drafts: int = 0,
        host_pages: int = 0,
        host_slots: int = 0,
        costs: tuple[float, float, float] = (0, 0, 1),
        slow_moves: int = 0,
        limits: dict | None = None,
        **cache,
    ):
        self.model = model
        ring, window = slot_sizes(model.config, drafts, kernel=False)
        layout = MemoryLayout(model.share, torch.float32, max(ring, ring_rows), window)
        longest = min(pages * 64, model.config.max_context)
        self.memory = Memory(layout, pages, slots, CPU)
        poison(self.memory)
        self.mover = None
        if host_slots:
            host = HostMemory(layout, host_pages, host_slots, CPU)
            for arena in (host.pages, host.slots):
                arena.fill_(255)  # NaN
            self.mover = Mover(self.memory, host)
            if slow_moves:
                self._slow(slow_moves)
        self.runner = Runner(model, self.memory, max_seqs, longest, drafts, self.mover)
        sizes = {"pages": pages, "slots": slots, "host_pages": host_pages, "host_slots": host_slots}
        self.cache = PrefixCache(CacheConfig(**sizes | {"ghost_nodes": 4 * pages} | cache))
        depths = {"drafts": ((max_seqs, drafts),) if drafts else ()}
        bounds = Limits(max_seqs, max_num_batched_tokens, longest, **depths | (limits or {}))
        self.engine = Engine(self.runner, self.cache, bounds, shipped_tokenizer(), (), validate=validate, costs=costs)
        self.scheduler = self.engine.scheduler
        self.talks: list[Talk] = []
        self.admissions: dict[int, list[Admission]] = {}
        self.forks: dict[int, Fork] = {}
        self.ends: dict[int, list[int]] = {}
        self.computed: dict[int, list[tuple[int, int]]] = {}
        self.page_copies = 0
        self.tamper: Callable[[int, Admission], None] = lambda sequence, admission: None
        self.compared = 0
        self._logits: dict[int, dict[int, Tensor]] = {}  # by sequence id and position
        self._draft_logits: dict[int, dict[int, Tensor]] = {}  # by sequence id and row of the head's keys
        self.compared_drafts = 0
        self._planned: dict[int, tuple] = {}  # by the Step's identity: it, its rows' sequences, its samples'
        self._verified: dict[int, tuple[Step, tuple[Continuation, ...], list[int], Tensor]] = {}
        self._watch()

    # ---- use

    def submit(self, prompt: list[int], boundaries=None, name_space: str = "", grammar=None, **params) -> Talk:
        """boundaries: before the last token where None."""
        params = {"max_tokens": 8, "seed": len(self.talks)} | params
        at = (len(prompt) - 1,) if boundaries is None else tuple(boundaries)
        request = Request(str(len(self.talks)), tuple(prompt), SamplingParams(**params), at, name_space)
        talk = Talk(request, [], [[] for _ in range(request.params.n)])
        self.engine.submit(request, talk.take, grammar)
        talk.sequences = [g.sequence for g in self.engine._requests[request.id]]
        self.talks.append(talk)
        return talk

    def run(self, *talks: Talk, steps: int = 2000) -> None:
        """Until these are done, or everything where none is named."""
        for _ in range(steps):
            if all(talk.finished for talk in talks) if talks else not self.engine.has_work:
                return
            self.engine.step()
        raise AssertionError(f"not done after {steps} steps: {[t.request.id for t in self.talks if not t.finished]}")

    def ask(self, prompt: list[int], boundaries=None, **params) -> Talk:
        """One request from its submission until all memory is back."""
        talk = self.submit(prompt, boundaries, **params)
        self.run()
        return talk

    def admission(self, talk: Talk, child: int = 0) -> Admission:
        """The last one of a continuation."""
        return self.admissions[talk.sequences[child].id][-1]

    def tokens_computed(self, talk: Talk) -> int:
        """Of the prompt, by its first continuation."""
        prompt = len(talk.request.prompt)
        return sum(min(end, prompt) - start for start, end in self.computed[talk.sequences[0].id] if start < prompt)

    def stats(self) -> dict[str, int]:
        return self.cache.stats()

    def settle(self) -> None:
        """Until no move is under way."""
        while self.stats()["moves_under_way"]:
            for number in self.mover.finished():
                self.scheduler.moved(number)

    def hold_moves(self) -> None:
        """No move is done until `let_moves_finish`."""
        self._finished, self.mover.finished = self.mover.finished, lambda: []

    def let_moves_finish(self) -> None:
        self.mover.finished = self._finished

    def _slow(self, seed: int) -> None:
        """Moves take any number of Steps."""
        random, finished = Random(seed), self.mover.finished
        self.mover.finished = lambda: finished() if random.random() < 0.3 else []

    # ---- judgement

    def difference(self) -> float:
        """As `_difference`, of the drafts' logits too where the model has an MTP head."""
        return max(self._difference(), self._draft_difference())

    @torch.inference_mode()
    def _draft_difference(self) -> float:
        """The same of the logits behind each first draft, computed anew from the whole history."""
        worst, model = 0.0, self.model
        for talk in self.talks:
            for sequence in talk.sequences:
                tokens, found = list(sequence.tokens), self._draft_logits.get(sequence.id, {})
                rows = [row for row in found if row < len(tokens)]
                if not rows:
                    continue
                pages = -(-len(tokens) // 64)
                runner = Runner(model, Memory(MemoryLayout(model.share, torch.float32), pages, 1, CPU), max_seqs=1)
                prompt = PrefillRow(tuple(tokens), 0, 0, 0)
                step = Step(prefill=(prompt,), pages=(NewPages(0, 0, tuple(range(pages))),))
                hidden = runner.forward(step).hidden
                table = runner.tables.pages[:1]
                start, none = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
                entries = torch.tensor([tokens[1:]])
                index = torch.zeros(1, dtype=torch.int64)
                place = Rows(table, start, none, none)
                batch = paged(runner.memory, runner.tables, runner._rotary, place, index, entries, -1)
                logits = model.mtp(batch, hidden[:-1]).logits
                error = (torch.stack([found[row] for row in rows]) - logits[torch.tensor(rows) - 1]).abs().max()
                worst = max(worst, (error / logits.std().clamp(min=1)).nan_to_num(torch.inf).item())
                self.compared_drafts += len(rows)
        return worst

    def _difference(self) -> float:
        """Largest difference between a logit the engine computed and the uncached one, near-ties excepted, in units of
        the logits' spread where that exceeds 1. Also checks that every output was computed, that the arenas' pages were
        copied as often as the cache says, and that nothing is held once all has ended."""
        assert not self.engine.has_work
        self.settle()
        worst = 0.0
        self.compared = 0
        for talk in self.talks:
            for sequence in talk.sequences:
                tokens, found = list(sequence.tokens), self._logits.get(sequence.id, {})
                # The first logits of a fork are its parent's.
                given = {**self._logits.get(talk.sequences[0].id, {}), **found}
                missing = [p for p in range(sequence.prompt_tokens - 1, len(tokens) - 1) if p not in given]
                assert not missing, f"sequence {sequence.id}: no logits at {missing[:5]}"
                if not found:
                    continue
                logits, clear = uncached_logits(self.model, tokens)
                positions = [p for p in found if p < min(len(tokens), clear)]
                if positions:
                    error = (torch.stack([found[p] for p in positions]) - logits[positions]).abs().max()
                    worst = max(worst, (error / logits.std().clamp(min=1)).nan_to_num(torch.inf).item())
                    self.compared += len(positions)
        assert self.compared > 0 or not self._logits, "every position lies behind a near-tie"
        stats = self.stats()
        held = {k: stats[k] for k in ("pages_held", "slots_working", "slots_promised", "slots_draining", "running")}
        assert not any(held.values()), f"held by nobody: {held}"
        assert self.page_copies <= stats["page_copies"], "pages were copied that the cache knows nothing of"
        assert self.cache.check() == ""
        return worst

    # ---- observation

    def _watch(self) -> None:
        cache, runner, plan = self.cache, self.runner, self.scheduler.plan
        admit, fork, finish = cache.admit, cache.fork, cache.finish
        forward, choose = runner.forward, runner.choose

        def watched_admit(id, *args, **kwargs):
            result = admit(id, *args, **kwargs)
            if isinstance(result, Admission):
                self.admissions.setdefault(id, []).append(result)
                self.tamper(id, result)
            return result

        def watched_fork(parent, child, *args):
            result = fork(parent, child, *args)
            if isinstance(result, Fork):
                self.forks[child] = result
            return result

        def watched_finish(id, tokens, count, **kwargs):
            self.ends.setdefault(id, []).append(count)
            return finish(id, tokens, count, **kwargs)

        def watched_plan():
            planned = plan()
            if planned and planned.step.rows:
                self._planned[id(planned.step)] = planned.step, planned.rows, planned.samples
            return planned

        def watched_forward(step):
            with counted_copies() as count:
                forwarded = forward(everywhere(step))
            logits = forwarded.logits
            self.page_copies += count["copy_pages"]
            assert count["copy_states"] == 0, "a state was copied"
            _, sequences, samples = self._planned.pop(id(step))
            self._planned[id(step)] = step, samples
            decoding = len(step.decode)
            if decoding:
                starts = forwarded.batch.decode.context_lens.tolist()
                self._verified[id(step)] = step, sequences[:decoding], starts, logits
            at = decoding * step.width
            wanted = list(range(at))
            for row, sequence in zip(step.prefill, sequences[decoding:], strict=True):
                self.computed.setdefault(sequence.id, []).append((row.start, row.end))
                for position in range(row.start, row.end):
                    self._logits.setdefault(sequence.id, {})[position] = logits[at]
                    if position >= row.end - row.logits:
                        wanted.append(at)
                    at += 1
            return forwarded._replace(logits=logits[wanted])

        def watched_choose(step, forwarded, edits):
            _, samples = self._planned.pop(id(step))
            news, scores = choose(step, forwarded, edits)
            if follow := runner._following:
                runner._following = lambda: watched_follow(step, samples, follow)
            if step.decode:
                _, sequences, starts, logits = self._verified.pop(id(step))
                for i, (sequence, start, count) in enumerate(zip(sequences, starts, news[:, 0].tolist(), strict=False)):
                    self.computed.setdefault(sequence.id, []).append((start, start + count))
                    for place in range(count):  # the rest came of drafts that were wrong
                        self._logits.setdefault(sequence.id, {})[start + place] = logits[i * step.width + place]
            return news, scores

        def watched_follow(step, samples, follow):
            drafts.clear()
            follow()
            if drafts:
                decoding = len(step.decode)
                own = [i for i, s in enumerate(step.samples) if i < decoding or step.rows[s.row].index == s.index]
                batch, logits = drafts[0]
                for i, row, found in zip(own, batch.decode.context_lens.tolist(), logits, strict=True):
                    # Without a page for it, its row is nowhere, and the draft is worth nothing.
                    if 0 <= row < runner.tables.capacity[step.samples[i].index]:
                        self._draft_logits.setdefault(samples[i].id, {})[row] = found

        drafts: list[tuple[Batch, Tensor]] = []
        if isinstance(runner._drafter, MtpDrafter):
            head = runner._drafter._head

            class Watched:
                store = head.store

                def __call__(self, batch, hidden):
                    output = head(batch, hidden)
                    drafts.append((batch, output.logits))
                    return output

            runner._drafter._head = Watched()
        cache.admit, cache.fork, cache.finish = watched_admit, watched_fork, watched_finish
        runner.forward, runner.choose, self.scheduler.plan = watched_forward, watched_choose, watched_plan


def everywhere(step: Step) -> Step:
    """The same Step with logits of every token."""
    if not step.prefill:
        return step
    return replace(step, prefill=tuple(row._replace(logits=len(row.tokens)) for row in step.prefill))


def poison(memory: Memory) -> None:
    """What nothing has written reads as NaN, so that using it shows."""
    memory.kv.fill_(float("nan"))
    if memory.hidden is not None:
        memory.hidden.fill_(float("nan"))
    for layer in memory.layers:
        if not isinstance(layer, Tensor):
            layer.state.fill_(float("nan"))
            layer.ring.fill_(float("nan"))
            layer.window.fill_(float("nan"))
            layer.cursor.fill_(0)


_COUNTING = RLock()  # two labs may run in two threads, and what one has replaced the other must not put back


@contextmanager
def counted_copies() -> Iterator[dict[str, int]]:
    """Pairs copied by the two copy operators."""
    count = {"copy_pages": 0, "copy_states": 0}

    def counting(name):
        def copy(arena, source, *rest):
            count[name] += int((source >= 0).sum())
            return originals[name](arena, source, *rest)

        return copy

    with _COUNTING:
        originals = {name: getattr(ops, name) for name in count}
        with patch.multiple(ops, **{name: counting(name) for name in count}):
            yield count
