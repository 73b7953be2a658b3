"""Which sequence does what in the next Step. Decisions only: no torch, no clock, nothing is read from the device.

The device runs one Step behind: when Step n + 1 is planned, the ids of Step n are not known yet. So a sequence counts
what its launched Steps consume (`consumed`) and sample (`sampled`) apart from the ids that were read (`tokens`), and
what ends it takes effect when the last launched Step that holds it is reconciled; until then it is *retiring* and keeps
its index, pages and slots.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from .cache import Match, NoRoom, PrefixCache
from .config import PAGE_TOKENS
from .errors import CapacityError
from .request import PrefixReuse, Request
from .step import Begin, NextStep, Row, Sample, Step

_SCORED_TOKENS = 512  # of a prompt in one step where log-probabilities of all of them are wanted: they need all logits


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request, from submission to its end.

    id: the cache's name for it; child: which of the request's n; tokens: prompt and the outputs read so far; outputs of
    it from prompt_tokens on; target: tokens to prefill before decoding; limit: outputs at most; constrained: the host
    may have a say in its outputs.
    """

    id: int
    request: Request
    child: int
    seed: int
    limit: int
    tokens: array
    prompt_tokens: int
    constrained: bool = False
    target: int = 0
    consumed: int = 0
    sampled: int = 0
    index: int = -1
    read_slot: int = -1
    write_slot: int = -1
    kv_tokens: int = 0
    held_pages: int = 0
    new_pages: tuple[int, ...] = ()
    first_page: int = 0
    snapshots: deque = field(default_factory=deque)  # (token count, slot) still ahead
    last_step: int = -1  # the last launched Step that holds it
    in_cache: bool = False
    ending: str | None = None  # why it leaves the device: "finish", "abort", "preempt"
    waited: int = 0
    preemptions: int = 0
    reuse: PrefixReuse | None = None

    @property
    def outputs(self) -> int:
        """Outputs that were read."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def scored(self) -> bool:
        """Log-probabilities of its prompt are still wanted, so every token's logits are."""
        return self.request.params.prompt_logprobs is not None and not self.outputs

    @property
    def prefilled(self) -> bool:
        return self.consumed >= self.target

    @property
    def running(self) -> bool:
        """On the device, and to stay there."""
        return self.index >= 0 and self.ending is None


@dataclass(frozen=True, slots=True)
class Limits:
    """max_seqs: sequences on the device at once; max_batch_tokens: tokens of one Step; max_tokens: of one sequence;
    skip_ahead: requests that may pass one that does not fit; wait_steps: Steps to wait for another's boundary."""

    max_seqs: int
    max_batch_tokens: int
    max_tokens: int
    skip_ahead: int = 16
    wait_steps: int = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """A Step and the sequences behind it: of each row and of each sample, in order."""

    number: int
    step: Step | NextStep
    rows: tuple[Sequence, ...]
    samples: tuple[Sequence, ...]


class Scheduler:
    """Plans Steps over one prefix cache, and reconciles them in the order in which they were planned."""

    def __init__(
        self,
        cache: PrefixCache,
        limits: Limits,
        begin: Callable[[Sequence], Begin],
        edited: Callable[[Sequence], bool] = lambda sequence: False,
    ):
        """begin: how the ids of a sequence are chosen, asked at each (re)admission; edited: whether the host has a say
        in the output that is planned next."""
        self.cache, self.limits, self._begin, self._edited = cache, limits, begin, edited
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # whoever has an index, retiring ones included
        self.steps = 0  # planned so far
        self.preemptions = 0
        self.reasons: Counter[str] = Counter()  # why prompts resumed where they did, by admissions
        self._reconciled = -1
        self._last: Planned | None = None  # the Step before, where the next one may be the same again
        self._free = list(range(limits.max_seqs - 1, -1, -1))
        self._children: dict[int, list[Sequence]] = {}  # of a parent that has not forked yet, by its id
        self._next_id = self._passed = 0

    # ---- requests

    def submit(self, request: Request, seeds: Ids[int]) -> list[Sequence]:
        """Queue a request: one sequence for each seed. Raises RequestError or CapacityError for what never fits."""
        prompt = array("i", request.prompt)
        room = self.limits.max_tokens
        if len(seeds) > self.limits.max_seqs:
            raise CapacityError(f"n is {len(seeds)}, but only {self.limits.max_seqs} sequences run at once.")
        limit = min(request.params.max_tokens or room, room - len(prompt))
        sequences = []
        for child, seed in enumerate(seeds):
            tokens = array("i", prompt)
            sequences.append(Sequence(self._next_id, request, child, seed, limit, tokens, len(prompt)))
            self._next_id += 1
        parent, *children = sequences
        if children:
            self._children[parent.id] = children
        self._enqueue(parent)
        return sequences

    def end(self, sequence: Sequence, how: str) -> None:
        """The sequence needs no more tokens ("finish") or is unwanted ("abort"): it leaves the device as soon as no
        launched Step holds it. Harmless for one that is leaving already."""
        for child in self._children.pop(sequence.id, []) if how == "abort" else ():
            child.ending = "abort"  # it has nothing yet
        if sequence.index < 0:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            sequence.ending = how
            return
        if sequence.ending in (None, "preempt"):
            sequence.ending = how
        if sequence.last_step <= self._reconciled:
            self._retire(sequence)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # ---- planning

    def plan(self) -> Planned | None:
        """The next Step, or None where nothing can be done before another Step is reconciled. Mutates the cache."""
        if again := self._plan_again():
            return again
        self._last = None
        draft = _Draft(self.steps, self._edited)
        preemptions = self.preemptions
        self._plan_forks(draft)
        for sequence in list(self.running):
            if sequence.running and sequence.prefilled and sequence.sampled < sequence.limit:
                self._plan_decode(sequence, draft)
        budget = self.limits.max_batch_tokens - len(draft.decode)
        for sequence in self.running:
            if sequence.running and not sequence.prefilled and budget > 0:
                budget -= self._plan_prefill(sequence, budget, draft)
        if budget > 0 and self.preemptions == preemptions:
            self._admit(budget, draft)
        if draft.empty:
            self._forget(draft)
            return None
        self.steps += 1
        planned = draft.finish()
        if draft.decode_alone and not any(sequence.constrained for sequence in planned.rows):
            self._last = planned
        return planned

    def _plan_again(self) -> Planned | None:
        """The rows of the Step before, one token on; None where there is more to do, or less."""
        last = self._last
        if last is None or (self.waiting and self._free) or tuple(self.running) != last.rows:
            return None
        more_pages = []
        for i, sequence in enumerate(last.rows):
            if sequence.ending or sequence.sampled == sequence.limit:
                return None
            if sequence.held_pages * PAGE_TOKENS <= sequence.consumed:
                if not self._extend(sequence):
                    return None  # somebody has to give way
                more_pages.append((i, sequence.first_page, sequence.new_pages))
        for i, _, _ in more_pages:
            last.rows[i].new_pages, last.rows[i].first_page = (), last.rows[i].held_pages
        for sequence in last.rows:
            sequence.consumed += 1
            sequence.sampled += 1
            sequence.last_step = self.steps
        base, ahead = (last.step.base, last.step.ahead) if isinstance(last.step, NextStep) else (last.step, 0)
        step = NextStep(base, ahead + 1, tuple(more_pages))
        self._last = Planned(self.steps, step, last.rows, last.samples)
        self.steps += 1
        return self._last

    def _forget(self, draft: "_Draft") -> None:
        """A Step that is not launched holds nobody."""
        for sequence in list(self.running):
            if sequence.last_step == draft.number:
                sequence.last_step = self._reconciled
                if sequence.ending:
                    self._retire(sequence)

    def _plan_decode(self, sequence: Sequence, draft: "_Draft") -> None:
        if sequence.held_pages * PAGE_TOKENS <= sequence.consumed and not self._grow(sequence):
            return
        row = Row(
            (),
            sequence.consumed,
            sequence.new_pages,
            sequence.read_slot,
            sequence.write_slot,
            sequence.index,
            sequence.first_page,
            sequence.kv_tokens,
        )
        draft.decode.append(row)
        draft.add(row, sequence)
        draft.sample(sequence)
        self._consumed(sequence, 1)

    def _grow(self, sequence: Sequence) -> bool:
        """One more page; where there is none the youngest sequence gives way, if need be this one. False: no page in
        this Step."""
        while not self._extend(sequence):
            if any(s.ending for s in self.running):
                return False  # somebody's pages come back when a Step is reconciled
            victim = max((s for s in self.running if s.running), key=lambda s: s.id)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: Sequence) -> bool:
        """A page for its next token, where there is one."""
        pages = self.cache.extend(sequence.id, sequence.consumed + 1)
        if isinstance(pages, NoRoom):
            return False
        sequence.new_pages, sequence.first_page = pages, sequence.held_pages
        sequence.held_pages += len(pages)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.ending = "preempt"
        sequence.preemptions += 1
        self.preemptions += 1
        if sequence.last_step <= self._reconciled:
            self._retire(sequence)

    def _plan_prefill(self, sequence: Sequence, budget: int, draft: "_Draft") -> int:
        """A chunk of the prompt, up to an absolute multiple of 64 or its end; returns how many tokens."""
        params, start = sequence.request.params, sequence.consumed
        scored = sequence.scored
        end = min(start + min(budget, _SCORED_TOKENS if scored else budget), sequence.target)
        if end < sequence.target:
            end = end // PAGE_TOKENS * PAGE_TOKENS
            if end <= start:
                if draft.prefill:
                    return 0
                # Nobody else's prompt goes on in this Step, and decoding may leave less than a page in every Step.
                end = min(start + budget, sequence.target)
        snapshots = []
        while sequence.snapshots and sequence.snapshots[0][0] <= end:
            snapshots.append(sequence.snapshots.popleft())
        tokens = sequence.tokens[start : end + 1]
        last = end == sequence.target
        row = Row(
            tuple(tokens[: end - start]),
            start,
            sequence.new_pages,
            sequence.read_slot if start else sequence.write_slot,
            sequence.write_slot,
            sequence.index,
            sequence.first_page,
            sequence.kv_tokens,
            tuple(snapshots),
            end - start if scored else int(last),
            tuple(tokens[1:]) if scored else (),
            params.prompt_logprobs if scored else 0,
        )
        draft.prefill.append(row)
        draft.add(row, sequence)
        self._consumed(sequence, end - start)
        if last:
            draft.sample(sequence)
            for child in self._children.get(sequence.id, ()):
                if child.ending is None:
                    child.index, child.target, child.consumed = self._free.pop(), sequence.target, sequence.target
                    child.last_step = draft.number
                    child.reuse = sequence.reuse
                    self.running.append(child)
                    draft.begins.append(self._begin(child))
                    draft.sample(child)
        return end - start

    def _consumed(self, sequence: Sequence, count: int) -> None:
        sequence.consumed += count
        sequence.read_slot, sequence.new_pages = sequence.write_slot, ()
        sequence.first_page = sequence.held_pages
        sequence.last_step = self.steps

    def _plan_forks(self, draft: "_Draft") -> None:
        """The other continuations of a request go on from the end of its prompt, which one of them has prefilled."""
        for parent in [s for s in self.running if s.id in self._children and s.prefilled]:
            for child in self._children.pop(parent.id):
                if not child.running or child.sampled >= child.limit:
                    continue
                fork = self.cache.fork(parent.id, child.id, parent.tokens, parent.consumed) if parent.running else None
                if fork is None or isinstance(fork, NoRoom):
                    self._preempt(child)  # it comes back by admission, as if it had been cut short
                    continue
                self._take(child, fork.child, draft)
                parent.write_slot = fork.parent_write  # it still reads where its own last step wrote

    def _take(self, sequence: Sequence, admission, draft: "_Draft") -> None:
        """What the cache allotted."""
        match: Match = admission.match
        sequence.new_pages, sequence.first_page = tuple(admission.pages.tolist()), 0
        sequence.held_pages = len(sequence.new_pages)
        sequence.read_slot, sequence.write_slot = admission.read_slot, admission.write_slot
        sequence.kv_tokens = match.kv_tokens
        sequence.snapshots = deque(admission.plan)
        sequence.in_cache = True
        sequence.last_step = draft.number  # the copies
        draft.copies += admission.copies

    def _admit(self, budget: int, draft: "_Draft") -> None:
        """Requests from the queue while there is room. One that does not fit is passed, a bounded number of times."""
        blocked = False
        for sequence in [self.waiting[i] for i in range(min(len(self.waiting), 1 + self.limits.skip_ahead))]:
            if budget <= 0 or 1 + len(self._children.get(sequence.id, ())) > self._available():
                return
            if blocked and self._passed >= self.limits.skip_ahead:
                return
            if self._should_wait(sequence):
                continue
            admission = self.cache.admit(
                sequence.id,
                sequence.request.name_space,
                sequence.tokens,
                sequence.request.boundaries,
                prompt_logprobs=sequence.scored,
            )
            if isinstance(admission, NoRoom):
                blocked = True
                continue
            self._passed = self._passed + 1 if blocked else 0
            self.waiting.remove(sequence)
            match = admission.match
            sequence.index = self._free.pop()
            sequence.consumed, sequence.target = match.state_tokens, len(sequence.tokens)
            self.reasons[match.reason.name] += 1
            if sequence.reuse is None:
                sequence.reuse = PrefixReuse(
                    match.known_tokens,
                    match.kv_tokens,
                    match.state_tokens,
                    match.kv_tokens - match.state_tokens,
                    match.reason.name,
                )
            self.running.append(sequence)
            draft.begins.append(self._begin(sequence))
            self._take(sequence, admission, draft)
            budget -= self._plan_prefill(sequence, budget, draft)

    def _available(self) -> int:
        """Free indices that no parent on the device has promised to its children."""
        promised = sum(len(self._children.get(s.id, ())) for s in self.running)
        return len(self._free) - promised

    def _should_wait(self, sequence: Sequence) -> bool:
        """Whether another request is about to write a state that this one would resume from. Bounded."""
        if sequence.waited >= self.limits.wait_steps or not self.running:
            return False
        match = self.cache.probe(sequence.request.name_space, sequence.tokens, prompt_logprobs=sequence.scored)
        sequence.waited += match.pending_tokens > match.state_tokens
        return match.pending_tokens > match.state_tokens

    # ---- reconciling

    def reconcile(self, planned: Planned, ids: Ids[int], judge: Callable[[Sequence, int], bool]) -> None:
        """The ids that a Step sampled are known. judge: sees each id that counts, in order, and says whether it ends
        its sequence. Publishes what was verified, and retires what was waiting for this Step. Mutates the cache."""
        self._reconciled = planned.number
        for row, end in planned.step.published:
            sequence = planned.rows[row]
            if sequence.ending != "abort":
                self.cache.commit(sequence.id, sequence.tokens, end)
        for sequence, id in zip(planned.samples, ids, strict=True):
            if sequence.ending in ("finish", "abort"):
                continue
            sequence.tokens.append(id)
            if judge(sequence, id):
                self.end(sequence, "finish")
        for sequence in [s for s in self.running if s.ending and s.last_step <= planned.number]:
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """No launched Step holds it any more."""
        self.running.remove(sequence)
        self._free.append(sequence.index)
        sequence.index = -1
        if sequence.in_cache:
            sequence.in_cache = False
            if sequence.ending == "abort":
                self.cache.abort(sequence.id)
            else:
                kept_with = sequence.request.kept_with
                donate = (
                    kept_with is None
                    or sequence.ending == "preempt"
                    or kept_with in sequence.tokens[sequence.prompt_tokens :]
                )
                self.cache.finish(sequence.id, sequence.tokens, sequence.consumed, donate=donate)
        if sequence.ending == "preempt":
            sequence.ending = None
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        """Into the queue: lower priority first, then in order of submission, so that what gave way comes first."""
        key = (sequence.request.priority, sequence.id)
        place = next((i for i, s in enumerate(self.waiting) if (s.request.priority, s.id) > key), len(self.waiting))
        self.waiting.insert(place, sequence)


class _Draft:
    """A Step under construction."""

    def __init__(self, number: int, edited: Callable[[Sequence], bool]):
        self.number, self._edited = number, edited
        self.decode: list[Row] = []
        self.prefill: list[Row] = []
        self.begins: list[Begin] = []
        self.copies: list[tuple[int, int, int]] = []
        self.samples: list[Sample] = []
        self._rows_of: list[Sequence] = []
        self._samples_of: list[Sequence] = []
        self._logits = 0  # rows of logits so far; decode rows are all planned before the first prefill row

    @property
    def empty(self) -> bool:
        return not self.decode and not self.prefill

    @property
    def decode_alone(self) -> bool:
        return not (self.prefill or self.begins or self.copies)

    def add(self, row: Row, sequence: Sequence) -> None:
        """A row that was just put behind its kind belongs to the sequence."""
        self._rows_of.append(sequence)
        self._logits += row.logits

    def sample(self, sequence: Sequence) -> None:
        """An id for the sequence, from the last logits of the row that was just added."""
        logprobs = sequence.request.params.logprobs
        alternatives = -1 if logprobs is None else logprobs
        edited = sequence.constrained and self._edited(sequence)
        self.samples.append(Sample(self._logits - 1, sequence.index, sequence.sampled, alternatives, edited))
        self._samples_of.append(sequence)
        sequence.sampled += 1

    def finish(self) -> Planned:
        step = Step(
            tuple(self.decode), tuple(self.prefill), tuple(self.begins), tuple(self.copies), tuple(self.samples)
        )
        return Planned(self.number, step, tuple(self._rows_of), tuple(self._samples_of))
