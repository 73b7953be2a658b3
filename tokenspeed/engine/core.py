"""The loop: plan a Step while the device runs the one before it, then read that one's ids and pass them on.

    plan n + 1 -> launch n + 1 -> read the ids of n -> text, stops -> publish, retire

Samples that the host has a say in (grammar, words, thinking budget) are the exception: their ids are chosen after the
ids of n are known, between the forward pass of n + 1, which runs meanwhile, and the next plan.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .errors import CorruptedError, EngineError, RequestError, TokenSpeedError
from .executor.runner import NONE_ALLOWED, Launched, Runner
from .request import Acceptance, Failure, Request, RequestMetrics, TokenScores, Update
from .schedule.scheduler import Continuation, Leaving, Limits, Planned, Scheduler
from .schedule.step import Begin, Edit, Step, StepChecker
from .text.constraints import BadWords, Constraint, Format, ThinkingBudget, combine
from .text.detokenizer import Detokenizer
from .text.grammar import GrammarCompiler, GrammarSpec, Matcher
from .text.stops import StopStrings
from .text.tokenizer import Tokenizer

_MEASURED_TOKENS = 64  # prefilled by a Step at least: fewer say little of how fast a prompt is computed
_SMOOTHING = 0.2  # weight of the latest Step in the measured speed of prefill
_SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a request's continuations; odd, so they never meet


Sink = Callable[[Update], None]


@dataclass(slots=True)
class _Generation:
    """What the host knows of one continuation beside its tokens."""

    sequence: Continuation
    sink: Sink
    detokenizer: Detokenizer
    stops: StopStrings
    constraints: list[Constraint]
    banned: tuple[int, ...]
    submitted: float
    scheduled: float = 0.0
    first_token: float = 0.0
    prompt_scores: list[TokenScores | None] | None = None
    acceptance: Acceptance = field(default_factory=Acceptance)


class Costs:
    """What the cache's choice between moving and computing rests on, as it is measured."""

    def __init__(self, runner: Runner, cache):
        self._runner, self._cache = runner, cache
        self._token: float | None = None  # seconds to prefill one

    def measure(self, step: Step, seconds: float) -> None:
        """A Step took as long."""
        tokens = sum(len(row.tokens) for row in step.prefill)
        if tokens >= _MEASURED_TOKENS:
            token = seconds / tokens
            self._token = token if self._token is None else self._token + _SMOOTHING * (token - self._token)
        rate, layout = self._runner.mover.rate, self._runner.memory.layout
        if rate and self._token:
            self._cache.set_costs(layout.page_bytes / rate, layout.slot_bytes / rate, self._token)


class Engine:
    """Requests in, updates out. One thread calls it; `step` does the work."""

    def __init__(
        self,
        runner: Runner,
        cache,
        limits: Limits,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        seed: int = 0,
        validate: bool = False,
        costs: tuple[float, float, float] | None = None,
    ):
        """cache: a PrefixCache over the runner's arenas; seed: of requests that bring none; validate: check every Step
        and the cache's invariants, for tests; costs: as `PrefixCache.set_costs` takes them, None to measure them."""
        self.runner, self.cache, self.limits, self.tokenizer = runner, cache, limits, tokenizer
        self.vocabulary, self.eos_ids = runner.model.config.vocab, frozenset(eos_ids)
        self.scheduler = Scheduler(cache, limits, self)
        self._costs = Costs(runner, cache) if runner.mover and costs is None else None
        if costs:
            cache.set_costs(*costs)
        self.failed: BaseException | None = None
        self._checker = StepChecker(cache.config.pages, cache.config.slots) if validate else None
        self._seeds = itertools.count(seed * 1_000_003 + 1)
        self.acceptance = Acceptance()  # of all drafts so far
        self.corrupted = 0  # requests that ended because their logits were not finite
        self._scores: dict[int, list[TokenScores]] = {}  # of the Step that is being read, by sequence id
        self._now = 0.0
        self._requests: dict[str, list[_Generation]] = {}
        self._generations: dict[int, _Generation] = {}  # by sequence id
        self._in_flight: deque[tuple[Planned, Launched, float]] = deque()  # and when it was launched
        self._updates: deque[tuple[_Generation, Update]] = deque()

    # ---- requests

    def submit(
        self, request: Request, sink: Sink, grammar: GrammarSpec | Matcher | None = None
    ) -> tuple[Continuation, ...]:
        """Queue a request, and return its continuations. Its news goes to `sink`; a sink that raises ends its own
        request alone.

        grammar: what the output must look like. Raises RequestError or CapacityError for what cannot be done, and then
        nothing has happened.
        """
        self._check_alive()
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use; ids must be unique among running requests.")
        request.check(self.vocabulary, self.limits.max_tokens)
        params = request.params
        seed = next(self._seeds) if params.seed is None else params.seed
        compiled = self.grammars.compile(grammar) if isinstance(grammar, GrammarSpec) else grammar
        words = BadWords(params.bad_words, self.tokenizer) if params.bad_words else None
        own = [self._constraints(request, compiled, words) for _ in range(params.n)]
        seeds = [(seed + child * _SEED_STRIDE) % 2**63 for child in range(params.n)]
        now, generations = time.monotonic(), []
        for sequence, rules in zip(self.scheduler.submit(request, seeds), own, strict=True):
            generation = _Generation(
                sequence,
                sink,
                Detokenizer(self.tokenizer, params.skip_special_tokens),
                StopStrings(params.stop, params.include_stop_str_in_output, request.stops_after),
                rules,
                words.single if words else (),
                now,
            )
            sequence.constrained = bool(rules)
            if params.prompt_logprobs is not None and sequence.child == 0:
                generation.prompt_scores = [None] * (len(request.prompt) - 1)
            self._generations[sequence.id] = generation
            generations.append(generation)
        self._requests[request.id] = generations
        return tuple(generation.sequence for generation in generations)

    def abort(self, request_id: str) -> bool:
        """Ends a request at any moment; its memory returns as soon as no launched Step uses it. False if it does not
        run: aborting twice, or too late, is harmless."""
        generations = self._requests.get(request_id)
        if generations is None:
            return False
        self._abandon(generations, "abort")
        self._deliver()
        return True

    def _abandon(self, generations: Sequence[_Generation], reason: str, error: TokenSpeedError | None = None) -> None:
        """Ends continuations of a request. Nothing more of them is published to the cache."""
        failure = error and Failure.of(error)
        for generation in list(generations):
            sequence = generation.sequence
            self.scheduler.end(sequence, Leaving.ABORTED)
            self._close(generation, Update(sequence.request.id, sequence.child, error=failure), reason)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Made when the first grammar comes: it takes seconds for a large vocabulary."""
        return GrammarCompiler(self.tokenizer, self.vocabulary, sorted(self.eos_ids))

    def clear_cache(self) -> None:
        """Forgets every prefix; what runs goes on."""
        self.cache.clear_all()

    def stats(self) -> dict[str, float]:
        """Gauges of the scheduler and the cache's own counters and gauges (`csrc/cache/cache.h`, `Stats`)."""
        scheduler, config = self.scheduler, self.cache.config
        own = {
            "waiting_requests": len(scheduler.waiting),
            "running_sequences": len(scheduler.running),
            "steps": scheduler.steps,
            "preemptions": scheduler.preemptions,
            "corrupted_requests": self.corrupted,
            "kv_pages": config.pages,
            "state_slots": config.slots,
            "host_pages": config.host_pages,
            "host_slots": config.host_slots,
        }
        reasons = {f"reason_{name.lower()}": count for name, count in scheduler.reasons.items()}
        fared = self.acceptance
        drafts = {"draft_steps": fared.steps, "draft_step_tokens": fared.ids}
        drafts["steps_without_drafts"] = scheduler.drafting.left_out
        for name, counts in (("drafted", fared.drafted), ("accepted", fared.accepted)):
            drafts |= {f"{name}_{place}": count for place, count in enumerate(counts, 1)}
        return own | reasons | drafts | self.cache.stats()

    def runs(self, request_id: str) -> bool:
        """Whether a request of this id waits or runs."""
        return request_id in self._requests

    def holds(self, request_ids: set[str]) -> bool:
        """Whether one of these still has a place on the device, or nobody else would reconcile what is on its way."""
        if any(sequence.request.id in request_ids for sequence in self.scheduler.running):
            return True
        return bool(self._in_flight) and not self._requests

    @property
    def request_ids(self) -> list[str]:
        """Of the requests that wait or run."""
        return list(self._requests)

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or not self.scheduler.idle

    @property
    def blocked(self) -> bool:
        """After a step: what there is to do waits for what comes from elsewhere, or for memory that is lent. Moves are
        waited for by the next step."""
        return not self._in_flight and not self.scheduler.idle and not self.scheduler.awaits_moves

    # ---- the loop

    def step(self) -> None:
        """Plan and launch a Step, and pass on what the one before it brought. Raises EngineError where the device
        failed: every request has then been told."""
        self._check_alive()
        self._or_fail(self._step)
        self._deliver()
        if not self.has_work:
            self.finish()

    def finish(self) -> None:
        """Complete the Steps whose news was passed on: the next step does so, but others may look at the arenas before.
        Raises as `step` does."""
        if self.failed is None:
            self._or_fail(self.runner.finish)

    def _or_fail(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._fail(error)  # also for an interrupt: what was half done cannot be gone on with
            if not isinstance(error, Exception):
                raise
            raise EngineError(f"the engine stopped: {type(error).__name__}: {error}") from error

    def _step(self) -> None:
        self.runner.finish()
        for number in self.runner.mover.finished() if self.runner.mover else ():
            self.scheduler.moved(number)
        planned, launched, waits = self.scheduler.plan(), None, False
        begin = time.monotonic()
        if planned:
            if self._checker:
                self._checker.check(planned.step)
            launched = self.runner.launch(planned.step)
            waits = planned.step.edited
            if not waits:
                launched.sample()
        if self._in_flight:
            self._reconcile(*self._in_flight.popleft())
        if planned:
            if waits:
                launched.sample(self._edits(planned, launched))
            self._in_flight.append((planned, launched, begin))
        elif not self._in_flight and self.scheduler.awaits_moves:
            self.runner.mover.wait()

    def _reconcile(self, planned: Planned, launched: Launched, begin: float) -> None:
        result = launched.read()
        self._scores = {planned.samples[i].id: scores for i, scores in result.scores.items()}
        for i, found in result.prompt_scores.items():
            generation = self._generations.get(planned.rows[i].id)
            if generation and generation.prompt_scores is not None:
                first = planned.step.rows[i].start
                generation.prompt_scores[first : first + len(found)] = found
        before, self._now = self._now, time.monotonic()
        if self._costs:
            self._costs.measure(planned.step, self._now - max(begin, before))
        if self._checker:
            self._checker.read(planned.step, [len(ids) for ids in result.ids])
        if planned.step.width > 1:
            self._count_drafts(planned, result.ids)
        for row in result.corrupted:
            if planned.rows[row].id in self._generations:
                self._corrupt(planned.rows[row].request.id)
        self.scheduler.reconcile(planned, result.ids)
        if self._checker and (broken := self.cache.check()):
            raise AssertionError(broken)

    def _count_drafts(self, planned: Planned, ids: Sequence[list[int]]) -> None:
        step = planned.step
        for sequence, new in zip(planned.samples[: len(step.decode)], ids, strict=False):
            generation = self._generations.get(sequence.id)
            if new and new[-1] >= 0 and generation:
                self.acceptance.count(step.width - 1, len(new))
                generation.acceptance.count(step.width - 1, len(new))

    def judge(self, sequence: Continuation, ids: list[int]) -> tuple[int, bool]:
        """The next outputs of a continuation are known: how many of them count, and whether they end it."""
        generation, scores = self._generations[sequence.id], self._scores.get(sequence.id, [])
        update = Update(sequence.request.id, sequence.child)
        if not generation.first_token:
            generation.first_token = self._now
            update.reuse, update.prompt_scores = sequence.reuse, generation.prompt_scores
        for count, id in enumerate(ids, 1):
            if id < 0:
                self._updates.append((generation, update))
                self._refuse(generation, id, sequence.outputs + count)
                return count - 1, False
            update.ids.append(id)
            update.scores += scores[count - 1 : count]
            if reason := self._accept(generation, id, sequence.outputs + count, update):
                self._close(generation, update, reason)
                return count, True
        self._updates.append((generation, update))
        return len(ids), False

    def _refuse(self, generation: _Generation, reason: int, output: int) -> None:
        """No id could be chosen for a continuation's output of this number, from 1: its request ends."""
        request = generation.sequence.request
        if reason == NONE_ALLOWED:
            error = RequestError(
                f"no token is left for output {output}: allowed_token_ids, bad_words, logit_bias, min_tokens and the "
                "output format forbid all of them together; loosen one of them."
            )
            self._abandon(self._requests[request.id], "error", error)
        else:
            self._corrupt(request.id)

    def _corrupt(self, request_id: str) -> None:
        """A request's logits are not finite: it ends, with all its continuations."""
        self.corrupted += 1
        error = CorruptedError(
            "the model's logits for this request are not finite: it ended, others are unaffected. The prompt or the "
            "weights bring the model out of its range."
        )
        self._abandon(self._requests[request_id], "error", error)

    def _accept(self, generation: _Generation, id: int, outputs: int, update: Update) -> str | None:
        """Output number `outputs`, from 1, of a continuation: adds its text to the news, and returns why it is the last
        where it is."""
        sequence, params = generation.sequence, generation.sequence.request.params
        for constraint in generation.constraints:
            constraint.accept(id)
        reason = stop = None
        if outputs >= params.min_tokens:
            if id in params.stop_token_ids:
                reason, stop = "stop", id
            elif id in self.eos_ids and not params.ignore_eos:
                reason = "stop"
        if reason is None or params.include_stop_str_in_output:
            text = generation.detokenizer.push(id)
            text, found = generation.stops.push(text, outputs > params.min_tokens)
            if found is not None and reason is None:
                reason, stop = "stop", found
            update.text += text
        if reason is None and outputs >= sequence.limit:
            reason = "length"
        if reason is not None:
            update.stop_reason = stop
            if not isinstance(stop, str):
                tail, found = generation.stops.push(generation.detokenizer.finish(), outputs > params.min_tokens)
                update.text += tail + ("" if found else generation.stops.finish())
        return reason

    def _close(self, generation: _Generation, update: Update, reason: str) -> None:
        """The last news of a continuation."""
        sequence, submitted, now = generation.sequence, generation.submitted, time.monotonic()
        update.finish_reason = reason
        update.metrics = RequestMetrics(
            generation.scheduled - submitted if generation.scheduled else 0.0,
            generation.first_token - submitted if generation.first_token else 0.0,
            now - submitted,
            sequence.preemptions,
            sequence.waited,
            generation.acceptance if generation.acceptance.steps else None,
        )
        self._updates.append((generation, update))
        self._generations.pop(sequence.id, None)
        rest = self._requests[sequence.request.id]
        rest.remove(generation)
        if not rest:
            del self._requests[sequence.request.id]

    def _deliver(self) -> None:
        """In order, also where a sink ends a request meanwhile: what was known before is told before."""
        while self._updates:
            generation, update = self._updates.popleft()
            try:
                generation.sink(update)
            except Exception:  # whatever a caller's code raises: it concerns that request alone
                request = generation.sequence.request
                generation.sink = _ignore
                running = self._requests.get(request.id, [])
                if any(other.sequence.request is request for other in running):  # and not a later one of this id
                    for other in running:
                        other.sink = _ignore
                    self.abort(request.id)

    def _fail(self, error: BaseException) -> None:
        self.failed = error
        for generation in list(self._generations.values()):
            sequence = generation.sequence
            update = Update(sequence.request.id, sequence.child, error=Failure.of(error))
            self._close(generation, update, "error")
        self._deliver()

    def _check_alive(self) -> None:
        if self.failed is not None:
            raise EngineError(f"the engine has stopped: {type(self.failed).__name__}: {self.failed}")

    # ---- what the scheduler asks

    def begin(self, sequence: Continuation) -> Begin:
        """How a continuation's ids are chosen on the device, and when it ends."""
        generation, params = self._generations[sequence.id], sequence.request.params
        generation.scheduled = generation.scheduled or time.monotonic()
        bias = params.logit_bias + tuple((id, float("-inf")) for id in generation.banned)
        begin = Begin(
            sequence.index,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            sequence.seed,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            params.min_tokens,
            tuple(sorted({*self.eos_ids, *params.stop_token_ids})) if params.min_tokens else (),
            bias,
            params.allowed_token_ids,
            prompt_tokens=sequence.prompt_tokens,
            left=sequence.limit - sequence.outputs,
            stops=tuple(sorted({*(() if params.ignore_eos else self.eos_ids), *params.stop_token_ids})),
        )
        tokens, cut = sequence.tokens, sequence.prompt_tokens
        if begin.penalised:
            begin = begin._replace(prompt=tuple(tokens[:cut]), output=tuple(tokens[cut:]))
        return begin._replace(history=tuple(tokens)) if self.runner.looks_up_drafts else begin

    def edits(self, sequence: Continuation, output: int) -> bool:
        """Whether the host has a say in one of a continuation's next outputs, up to number `output`."""
        return any(constraint.may_act(output) for constraint in self._generations[sequence.id].constraints)

    def _edits(self, planned: Planned, launched: Launched) -> list[Edit]:
        edits, drafts = [], launched.drafts()
        for i, (sample, sequence) in enumerate(zip(planned.step.samples, planned.samples, strict=True)):
            generation = self._generations.get(sequence.id)  # None: it ended meanwhile
            if sample.edited and generation:
                outputs, behind = sequence.tokens[sequence.prompt_tokens :], drafts[i] if i < len(drafts) else []
                try:
                    rules = [constraint.verdicts(outputs, behind) for constraint in generation.constraints]
                except RequestError as error:  # it cannot go on; its id does not matter any more
                    self._abandon(self._requests[sequence.request.id], "error", error)
                    continue
                for place, verdicts in enumerate(zip(*rules, strict=False)):  # as far as all of them look ahead
                    verdict = combine(verdicts)
                    allowed = b"" if verdict.allowed is None else verdict.allowed.tobytes()
                    edits.append(Edit(i, allowed, verdict.banned, place))
        return edits

    def _constraints(self, request: Request, grammar: Matcher | None, words: BadWords | None) -> list[Constraint]:
        params, constraints = request.params, []
        if grammar is not None:
            constraints.append(Format(grammar.copy()))
        if words and words.longer:
            constraints.append(words)
        if params.thinking_token_budget is not None:
            start, end = (self.tokenizer.token_to_id(tag) for tag in ("<think>", "</think>"))
            if start is None or end is None:
                raise RequestError(
                    "thinking_token_budget needs a model that marks reasoning with <think> and </think>."
                )
            size = -(-self.vocabulary // 32)
            constraints.append(ThinkingBudget(params.thinking_token_budget, request.prompt, start, end, size))
        return constraints


def _ignore(update: Update) -> None:
    """The sink of a request whose own raised."""
