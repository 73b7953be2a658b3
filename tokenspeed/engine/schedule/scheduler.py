"""Which sequence does what in the next Step. Decisions only: no torch, no clock, nothing is read from the device.

The device runs one Step behind: when Step n + 1 is planned, it is not known yet which ids Step n chose, nor, where
drafts are verified, how many. So the host plans with a bound, what a sequence's launched Steps consume at most
(`launched`), beside what they are known to have consumed (`consumed`), and lets the device find the place. What ends a
sequence takes effect when the last launched Step that holds it is reconciled.

Who owns what, by the state of a sequence:

    state        device index   pages and slots            goes on to
    WAITING      -              -                          PREFILLING or ARRIVING (admitted), ENDED (aborted)
    ARRIVING     its own        its own, all of them       PREFILLING (its state is back from host memory), RETIRING
    PREFILLING   its own        its own, all of them       DECODING (its last chunk is launched), RETIRING
    FORKING      its own        none until its parent's    DECODING (they were forked), RETIRING
                                are forked
    DECODING     its own        its own                    RETIRING
    RETIRING     its own        as before: launched Steps  ENDED (finished, aborted), WAITING (gave way)
                                or a move use them
    ENDED        -              -                          -
"""

from array import array
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Protocol

from ..config import PAGE_TOKENS
from ..errors import CapacityError
from ..request import PrefixReuse, Request
from .cache import Admission, NoRoom, PrefixCache
from .drafting import Drafting, Fortune
from .step import Begin, DecodeRow, Move, NewPages, PrefillRow, Sample, Step

_AGE = 64  # admissions that may overtake a request for each step of priority between them
_SCORED_TOKENS = 512  # of a prompt in one step where log-probabilities of all of them are wanted: they need all logits


class State(Enum):
    WAITING = auto()
    ARRIVING = auto()
    PREFILLING = auto()
    FORKING = auto()
    DECODING = auto()
    RETIRING = auto()
    ENDED = auto()


class Leaving(Enum):
    """Why a sequence retires."""

    FINISHED = auto()
    ABORTED = auto()
    PREEMPTED = auto()


@dataclass(slots=True, eq=False)
class Continuation:
    """One continuation of a request, from submission to its end.

    id: the cache's name for it; child: which of the request's n; limit: outputs at most; tokens: prompt and the outputs
    read so far, outputs from prompt_tokens on; constrained: the host may have a say in its outputs; target: tokens to
    prefill before decoding; unread: launched Steps that choose ids for it; held_pages: how many; new_pages, copies: the
    last of them and page copies that no Step has told the device yet; last_step: the last launched Step that holds it;
    held: what its prompt begins with is on its way from another engine, and it is not admitted before; pin: keeps what
    has come until it is (`PrefixCache.received`).
    begun: a Step has told the device of it; move: under way, to what it holds, 0 for none.
    """

    id: int
    request: Request
    child: int
    seed: int
    limit: int
    tokens: array
    prompt_tokens: int
    constrained: bool = False
    order: tuple[int, int] | None = None  # its place in the queue
    held: bool = False
    pin: int | None = None
    state: State = State.WAITING
    leaving: Leaving | None = None
    target: int = 0
    consumed: int = 0
    launched: int = 0
    unread: int = 0
    index: int = -1
    read_slot: int = -1
    write_slot: int = -1
    kv_tokens: int = 0
    held_pages: int = 0
    new_pages: tuple[int, ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()
    snapshots: deque = field(default_factory=deque)  # (token count, slot) still ahead
    last_step: int = -1
    holds_memory: bool = False
    begun: bool = False
    move: int = 0
    waited: int = 0
    preemptions: int = 0
    reuse: PrefixReuse | None = None
    row: DecodeRow | None = None  # its part of a Step in which it merely goes on
    sample: Sample | None = None  # of the last Step
    fortune: Fortune = field(default_factory=Fortune)  # of its drafts

    @property
    def outputs(self) -> int:
        """Outputs that were read."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def ends_soon(self) -> bool:
        """Whether it holds a page beyond its limit, as drafts just before it need."""
        return (self.held_pages - 1) * PAGE_TOKENS >= self.prompt_tokens + self.limit

    @property
    def scored(self) -> bool:
        """Log-probabilities of its prompt are still wanted, so every token's logits are."""
        return self.request.params.prompt_logprobs is not None and not self.outputs

    @property
    def waits_for_more(self) -> bool:
        """Whether launched Steps may leave it outputs to choose."""
        return self.outputs + self.unread < self.limit


@dataclass(frozen=True, slots=True)
class Limits:
    """max_seqs: sequences on the device at once; max_num_batched_tokens: tokens of one Step; max_tokens: of one
    sequence; skip_ahead: requests that may pass one that does not fit; wait_steps: Steps to wait for another's
    boundary; drafts: of (sequences, drafts) the first that so many decoding sequences do not exceed says how many are
    made behind each; draft_costs: of (sequences, times) likewise, how many times a Step without drafts one takes that
    verifies and makes them. It makes none where they bring less; where nothing is said they are always made."""

    max_seqs: int
    max_num_batched_tokens: int
    max_tokens: int
    skip_ahead: int = 16
    wait_steps: int = 64
    drafts: tuple[tuple[int, int], ...] = ()
    draft_costs: tuple[tuple[int, float], ...] = ()

    @property
    def max_drafts(self) -> int:
        return max((drafts for _, drafts in self.drafts), default=0)


def drafts_for(depths: tuple[tuple[int, int], ...], sequences: int) -> int:
    """As `Limits.drafts` says; none where more decode than it names."""
    return next((drafts for limit, drafts in depths if sequences <= limit), 0)


@dataclass(frozen=True, slots=True)
class Planned:
    """A Step and the sequences behind it: of each row and of each sample, in order."""

    number: int
    step: Step
    rows: tuple[Continuation, ...]
    samples: tuple[Continuation, ...]


class Host(Protocol):
    """What the scheduler asks of whoever knows the requests' texts and rules."""

    def begin(self, sequence: Continuation) -> Begin:
        """How the ids of a sequence are chosen; asked at each (re)admission."""

    def edits(self, sequence: Continuation, output: int) -> bool:
        """Whether the host has a say in one of the next outputs, up to number `output`."""

    def judge(self, sequence: Continuation, ids: list[int]) -> tuple[int, bool]:
        """The next ids of a sequence are known: how many of them count, and whether the last of these ends it. Where
        the last is negative none could be chosen: the sequence was ended (ABORTED) meanwhile."""


class Scheduler:
    """Plans Steps over one prefix cache, and reconciles them in the order in which they were planned."""

    def __init__(self, cache: PrefixCache, limits: Limits, host: Host):
        self.cache, self.limits, self._host = cache, limits, host
        self.waiting: list[Continuation] = []  # in the order in which they are to be admitted
        self.running: list[Continuation] = []  # whoever has an index
        self.drafting = Drafting(limits.draft_costs)
        self._drafted = False  # by the Step before, so that this one has something to verify
        self.steps = 0  # planned so far
        self.preemptions = 0
        self.reasons: Counter[str] = Counter()  # why prompts resumed where they did, by admissions
        self._reconciled = -1
        self._free = list(range(limits.max_seqs - 1, -1, -1))
        self._children: dict[int, list[Continuation]] = {}  # of a parent that has not forked yet, by its id
        self._arriving: dict[int, Continuation] = {}  # by the number of the move they wait for
        self._moved: list[int] = []  # done, and no Step has said so yet
        self._next_id = self._passed = self._admissions = 0

    # ---- requests

    def submit(self, request: Request, seeds: Sequence[int]) -> list[Continuation]:
        """Queue a request: one sequence for each seed. Raises RequestError or CapacityError for what never fits."""
        prompt = array("i", request.prompt)
        room = self.limits.max_tokens
        if len(seeds) > self.limits.max_seqs:
            raise CapacityError(f"n is {len(seeds)}, but only {self.limits.max_seqs} sequences run at once.")
        limit = min(request.params.max_tokens or room, room - len(prompt))
        sequences = []
        for child, seed in enumerate(seeds):
            tokens = array("i", prompt)
            sequences.append(Continuation(self._next_id, request, child, seed, limit, tokens, len(prompt)))
            self._next_id += 1
        parent, *children = sequences
        if children:
            self._children[parent.id] = children
        self._enqueue(parent)
        return sequences

    def end(self, sequence: Continuation, how: Leaving) -> None:
        """The sequence needs no more tokens (FINISHED) or is unwanted (ABORTED): it leaves the device as soon as no
        launched Step holds it. Harmless for one that is leaving already."""
        for child in self._children.pop(sequence.id, []) if how is Leaving.ABORTED else ():
            if child.state is State.WAITING:  # it has nothing yet
                child.state, child.leaving = State.ENDED, how
            else:
                self._leave(child, how)
        if sequence.state is State.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            self._unpin(sequence)
            sequence.state, sequence.leaving = State.ENDED, how
        elif sequence.state is not State.ENDED:
            self._leave(sequence, how)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # ---- planning

    def plan(self) -> Planned | None:
        """The next Step, or None where nothing can be done before another Step is reconciled. Mutates the cache."""
        draft = _Draft()
        preemptions = self.preemptions
        self._plan_forks()
        decoding = [s for s in self.running if s.state is State.DECODING and s.waits_for_more]
        draft.drafts = drafts_for(self.limits.drafts, len(decoding))  # also behind the first id of a prompt
        draft.width = self._width(decoding, draft.drafts) if self._drafted else 1
        if not self.drafting.pays([sequence.fortune for sequence in decoding], draft.drafts):
            draft.drafts = 0
        for sequence in decoding:
            if sequence.state is State.DECODING:  # and did not give way to one before it
                self._plan_decode(sequence, draft)
        budget = self.limits.max_num_batched_tokens - len(draft.decode) * draft.width
        # The oldest prompt takes what the others leave, and half of the pages is for them: a short prompt need not wait
        # until a long one has ended.
        oldest, *others = [s for s in self.running if s.state is State.PREFILLING] or [None]
        half = budget - budget // 2 // PAGE_TOKENS * PAGE_TOKENS
        kept = (self._chunk_end(oldest, half) - oldest.launched or half) if oldest else 0
        for sequence in others:
            if budget > kept:
                budget -= self._plan_prefill(sequence, budget - kept, draft)
        if budget > kept and self.preemptions == preemptions:
            budget -= self._admit(budget - kept, draft)
        if oldest and budget > 0:
            self._plan_prefill(oldest, budget, draft)
        draft.moves = self.cache.take_moves()
        if draft.empty:
            return None
        if not draft.goes_on:
            draft.drafts = 0
        self._drafted = bool(draft.drafts)
        draft.moved, self._moved = tuple(self._moved), []
        planned = draft.finish(self.steps)
        self.steps += 1
        return planned

    def _width(self, decoding: list[Continuation], drafts: int) -> int:
        """How many tokens each sequence is to consume: its last id and all its drafts, or the id alone where drafts
        would be more than the context or a Step may hold, or than there are pages for. What a sequence says beyond its
        limit is dropped, as what it says behind its end."""
        width = 1 + drafts
        if not drafts or len(decoding) * width > self.limits.max_num_batched_tokens:
            return 1
        # The next drafts leave keys and values behind the tokens that are consumed.
        needed = [s.launched + width + drafts for s in decoding]
        if any(tokens > self.limits.max_tokens for tokens in needed):
            return 1
        enough = [self._extend(s, tokens) for s, tokens in zip(decoding, needed, strict=True)]
        return width if all(enough) else 1

    def _plan_decode(self, sequence: Continuation, draft: "_Draft") -> None:
        if not self._grow(sequence, sequence.launched + draft.width):
            return
        if sequence.row is None:
            sequence.row = DecodeRow(sequence.index, sequence.read_slot, sequence.write_slot)
        draft.add(sequence.row, sequence)
        sequence.launched += draft.width
        draft.sample(sequence, sequence.constrained and self._edited(sequence))
        self._settle_slots(sequence)

    def _grow(self, sequence: Continuation, needed: int) -> bool:
        """Pages for more tokens; where there are none the youngest sequence gives way, if need be this one. False: no
        page in this Step."""
        while not self._extend(sequence, needed):
            if any(s.state is State.RETIRING or (s.ends_soon and s is not sequence) for s in self.running):
                return False  # somebody's pages come back when a Step is reconciled, or a few
            victim = max((s for s in self.running if s.state is not State.RETIRING), key=lambda s: s.id)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: Continuation, needed: int) -> bool:
        """Pages for as many tokens, where there are some."""
        if needed <= sequence.held_pages * PAGE_TOKENS:
            return True
        pages = self.cache.extend(sequence.id, needed)
        if isinstance(pages, NoRoom):
            return False
        sequence.new_pages += pages
        sequence.held_pages += len(pages)
        return True

    def _preempt(self, sequence: Continuation) -> None:
        sequence.preemptions += 1
        self.preemptions += 1
        self._leave(sequence, Leaving.PREEMPTED)

    def _leave(self, sequence: Continuation, how: Leaving) -> None:
        if sequence.leaving in (None, Leaving.PREEMPTED):
            sequence.leaving = how
        sequence.state = State.RETIRING
        if sequence.last_step <= self._reconciled and not sequence.move:
            self._retire(sequence)

    def _chunk_end(self, sequence: Continuation, budget: int) -> int:
        """Where a chunk of the prompt ends: at a whole page or with the prompt; at its start where no page fits."""
        start, scored = sequence.launched, sequence.scored
        end = min(start + min(budget, _SCORED_TOKENS if scored else budget), sequence.target)
        return end if end == sequence.target else max(end // PAGE_TOKENS * PAGE_TOKENS, start)

    def _plan_prefill(self, sequence: Continuation, budget: int, draft: "_Draft") -> int:
        """A chunk of the prompt; returns how many tokens."""
        params, start, scored = sequence.request.params, sequence.launched, sequence.scored
        end = self._chunk_end(sequence, budget)
        if end == start:
            if draft.prefill:
                return 0
            # Nobody else's prompt goes on in this Step, and decoding may leave less than a page in every Step.
            end = min(start + budget, sequence.target)
        if not sequence.begun:
            sequence.begun = True
            draft.begins.append(self._host.begin(sequence))
        snapshots = []
        while sequence.snapshots and sequence.snapshots[0][0] <= end:
            snapshots.append(sequence.snapshots.popleft())
        tokens = sequence.tokens[start : end + 1]
        last = end == sequence.target
        row = PrefillRow(
            tuple(tokens[: end - start]),
            start,
            sequence.read_slot if start else sequence.write_slot,
            sequence.write_slot,
            sequence.index,
            sequence.kv_tokens,
            tuple(snapshots),
            end - start if scored else 1,
            tuple(tokens[1:]) if scored else (),
            params.prompt_logprobs if scored else 0,
        )
        draft.add(row, sequence)
        sequence.launched = end
        self._settle_slots(sequence)
        if last:
            sequence.state = State.DECODING
            draft.sample(sequence, sequence.constrained and self._edited(sequence))
            for child in self._children.get(sequence.id, ()):
                if child.state is State.WAITING:
                    child.state, child.index, child.target = State.FORKING, self._free.pop(), sequence.target
                    child.consumed = child.launched = sequence.target
                    child.last_step = self.steps
                    child.reuse = sequence.reuse
                    self.running.append(child)
                    draft.begins.append(self._host.begin(child))
                    draft.sample(child, child.constrained and self._edited(child))
        return end - start

    def _edited(self, sequence: Continuation) -> bool:
        """Whether the host has a say in the outputs up to the one behind the last token of what is launched."""
        return self._host.edits(sequence, sequence.launched - sequence.prompt_tokens)

    def _settle_slots(self, sequence: Continuation) -> None:
        """Its next row goes on where this Step's writes."""
        if sequence.read_slot != sequence.write_slot:
            sequence.read_slot, sequence.row = sequence.write_slot, None
        sequence.last_step = self.steps

    def _plan_forks(self) -> None:
        """The other continuations of a request go on from the end of its prompt, which one of them has prefilled."""
        for parent in [s for s in self.running if s.id in self._children and s.launched >= s.target]:
            for child in self._children.pop(parent.id):
                if child.state is not State.FORKING or not child.waits_for_more:
                    continue
                alive = parent.state is State.DECODING
                fork = self.cache.fork(parent.id, child.id, parent.tokens, parent.launched) if alive else None
                if fork is None or isinstance(fork, NoRoom):
                    self._preempt(child)  # it comes back by admission, as if it had been cut short
                    continue
                self._take(child, fork.child)
                child.state = State.DECODING
                child.fortune.last = self.steps  # nobody has drafted for it yet
                parent.write_slot, parent.row = fork.parent_write, None  # it reads where its own last step wrote

    def _take(self, sequence: Continuation, admission: Admission) -> None:
        """What the cache allotted."""
        sequence.new_pages, sequence.copies = tuple(admission.pages.tolist()), tuple(admission.copies)
        sequence.held_pages, sequence.row = len(sequence.new_pages), None
        sequence.read_slot, sequence.write_slot = admission.read_slot, admission.write_slot
        sequence.kv_tokens = admission.match.kv_tokens
        sequence.snapshots = deque(admission.snapshots)
        sequence.holds_memory = True

    def _admit(self, budget: int, draft: "_Draft") -> int:
        """Requests from the queue while there is room; returns how many tokens of them go into this Step. One that does
        not fit is passed, a bounded number of times."""
        blocked, before = False, budget
        here = (sequence for sequence in self.waiting if not sequence.held)
        for sequence in list(islice(here, 1 + self.limits.skip_ahead)):
            if budget <= 0 or 1 + len(self._children.get(sequence.id, ())) > self._available():
                break
            if blocked and self._passed >= self.limits.skip_ahead:
                break
            if self._should_wait(sequence):
                continue
            admission = self._take_in(sequence)
            if isinstance(admission, NoRoom) and sequence.pin is not None:
                self._unpin(sequence)  # which may be what has taken the room
                admission = self._take_in(sequence)
            if isinstance(admission, NoRoom):
                blocked = True
                continue
            self._passed = self._passed + 1 if blocked else 0
            self._admissions += 1
            self._unpin(sequence)
            self.waiting.remove(sequence)
            match = admission.match
            sequence.state, sequence.index, sequence.begun = State.PREFILLING, self._free.pop(), False
            sequence.target = len(sequence.tokens)
            sequence.consumed = sequence.launched = match.state_tokens
            self.reasons[match.reason.name] += 1
            if sequence.reuse is None:
                sequence.reuse = PrefixReuse(
                    match.known_tokens,
                    match.kv_tokens,
                    match.state_tokens,
                    match.kv_tokens - match.state_tokens,
                    match.reason.name,
                    match.moved_tokens,
                )
            self.running.append(sequence)
            self._take(sequence, admission)
            if admission.move:
                sequence.state, sequence.move = State.ARRIVING, admission.move
                self._arriving[admission.move] = sequence
            else:
                budget -= self._plan_prefill(sequence, budget, draft)
        return before - budget

    def _take_in(self, sequence: Continuation) -> Admission | NoRoom:
        request = sequence.request
        return self.cache.admit(
            sequence.id, request.name_space, sequence.tokens, request.boundaries, prompt_logprobs=sequence.scored
        )

    def _unpin(self, sequence: Continuation) -> None:
        if sequence.pin is not None:
            self.cache.release(sequence.pin)
            sequence.pin = None

    def _available(self) -> int:
        """Free indices that no parent on the device has promised to its children."""
        promised = sum(len(self._children.get(s.id, ())) for s in self.running)
        return len(self._free) - promised

    def _should_wait(self, sequence: Continuation) -> bool:
        """Whether another request is about to write a state that this one would resume from, or has written it and is
        held by a launched Step. Bounded."""
        if sequence.waited >= self.limits.wait_steps or not self.running:
            return False
        if any(self._goes_on(sequence, other) for other in self.running):
            sequence.waited += 1
            return True
        match = self.cache.probe(sequence.request.name_space, sequence.tokens, prompt_logprobs=sequence.scored)
        sequence.waited += match.pending_tokens > 0
        return match.pending_tokens > 0

    def _goes_on(self, sequence: Continuation, other: Continuation) -> bool:
        """Whether a request goes on from the end of one that was told and whose state is not known yet: an agent's next
        turn may come at once."""
        count = min(other.consumed, len(other.tokens))
        return (
            other.leaving is Leaving.FINISHED
            and other.request.name_space == sequence.request.name_space
            and len(sequence.tokens) > count
            and sequence.tokens[:count] == other.tokens[:count]
        )

    # ---- moves

    @property
    def awaits_moves(self) -> bool:
        return bool(self._arriving)

    def moved(self, number: int) -> None:
        """A move is done: who waited for it goes on. Mutates the cache."""
        self.cache.moved(number)
        self._moved.append(number)
        sequence = self._arriving.pop(number, None)
        if sequence is None:
            return
        sequence.move = 0
        if sequence.state is State.ARRIVING:
            sequence.state = State.PREFILLING
        else:
            self._retire(sequence)

    # ---- reconciling

    def reconcile(self, planned: Planned, ids: Sequence[list[int]]) -> None:
        """The ids that a Step chose are known, some for each of its samples. Publishes what was verified, and retires
        what was waiting for this Step. Mutates the cache."""
        self._reconciled, step = planned.number, planned.step
        decoding = len(step.decode)
        before = [sequence.consumed for sequence in planned.rows]
        for sequence, row in zip(planned.rows[decoding:], step.prefill, strict=True):
            sequence.consumed = row.end
        for i, (sequence, new) in enumerate(zip(planned.samples, ids, strict=True)):
            sequence.unread -= 1
            if i < decoding:
                sequence.consumed += len(new)
                sequence.launched -= step.width - len(new)
                if step.width > 1 and new:
                    sequence.fortune.note(planned.number, (len(new) - 1) / (step.width - 1))
            if new and sequence.leaving in (None, Leaving.PREEMPTED):
                count, last = self._host.judge(sequence, new)
                sequence.tokens.extend(new[:count])
                if last:
                    self.end(sequence, Leaving.FINISHED)
            elif new and new[-1] < 0:  # what it consumed behind its end may not be finite: nobody shall find it
                sequence.leaving = Leaving.ABORTED
        for sequence, row, start in zip(planned.rows, step.rows, before, strict=True):
            self._publish(sequence, row, start)
        for sequence in [s for s in self.running if s.state is State.RETIRING and s.last_step <= planned.number]:
            if not sequence.move:
                self._retire(sequence)

    def _publish(self, sequence: Continuation, row: DecodeRow | PrefillRow, start: int) -> None:
        """Others shall see what a row wrote. At each token that would cost as much as planning does: at the ends of
        pages and of prefilled chunks, and where a state has left the slot that it was read from."""
        if sequence.leaving is Leaving.ABORTED or not sequence.holds_memory:
            return
        moved = isinstance(row, PrefillRow) or row.read_slot != row.write_slot
        if moved or sequence.consumed // PAGE_TOKENS > start // PAGE_TOKENS:
            self.cache.commit(sequence.id, sequence.tokens, min(sequence.consumed, len(sequence.tokens)))

    def _retire(self, sequence: Continuation) -> None:
        """No launched Step holds it any more."""
        self.running.remove(sequence)
        self._free.append(sequence.index)
        sequence.index, sequence.row, sequence.sample = -1, None, None
        preempted = sequence.leaving is Leaving.PREEMPTED
        if sequence.holds_memory:
            sequence.holds_memory = False
            if sequence.leaving is Leaving.ABORTED:
                self.cache.abort(sequence.id)
            else:
                # A stop that the host alone finds may lie behind what the device has consumed: nobody resumes there.
                count = min(sequence.consumed, len(sequence.tokens))
                donate = count == sequence.consumed and (preempted or self._comes_back(sequence))
                self.cache.finish(sequence.id, sequence.tokens, count, donate=donate)
        if preempted:
            sequence.state, sequence.leaving = State.WAITING, None
            self._enqueue(sequence)
        else:
            sequence.state = State.ENDED

    def _comes_back(self, sequence: Continuation) -> bool:
        """Whether a later prompt may begin with this one and its output."""
        opening = sequence.request.snapshot_token_id
        return opening is None or opening in sequence.tokens[sequence.prompt_tokens :]

    def _enqueue(self, sequence: Continuation) -> None:
        """Into the queue: lower priority first, then in order of submission, so that what gave way comes first. Each
        step of priority is worth _AGE admissions: whoever waits is overtaken for so long and no longer."""
        if sequence.order is None:
            sequence.order = (sequence.request.priority * _AGE + self._admissions, sequence.id)
        insort(self.waiting, sequence, key=lambda other: other.order)


class _Draft:
    """A Step under construction. Decode rows are all planned before the first prefill row."""

    def __init__(self) -> None:
        self.width, self.drafts = 1, 0
        self.decode: list[DecodeRow] = []
        self.prefill: list[PrefillRow] = []
        self.begins: list[Begin] = []
        self.copies: list[tuple[int, int, int]] = []
        self.pages: list[NewPages] = []
        self.samples: list[Sample] = []
        self.moves: tuple[Move, ...] = ()
        self.moved: tuple[int, ...] = ()
        self._rows_of: list[Continuation] = []
        self._samples_of: list[Continuation] = []

    @property
    def empty(self) -> bool:
        return not self.decode and not self.prefill and not self.moves

    @property
    def goes_on(self) -> bool:
        """Whether somebody needs more ids than this Step chooses at least."""
        return any(sequence.waits_for_more for sequence in self._samples_of)

    def add(self, row: DecodeRow | PrefillRow, sequence: Continuation) -> None:
        (self.decode if isinstance(row, DecodeRow) else self.prefill).append(row)
        self._rows_of.append(sequence)
        if sequence.new_pages:
            first = sequence.held_pages - len(sequence.new_pages)
            self.pages.append(NewPages(sequence.index, first, sequence.new_pages))
            self.copies += sequence.copies
            sequence.new_pages = sequence.copies = ()

    def sample(self, sequence: Continuation, edited: bool) -> None:
        """Ids for the sequence, behind the row that was just added."""
        row, sample = len(self._rows_of) - 1, sequence.sample
        if sample is None or sample.row != row or sample.edited != edited:
            logprobs = sequence.request.params.logprobs
            sample = Sample(row, sequence.index, -1 if logprobs is None else logprobs, edited)
            sequence.sample = sample
        self.samples.append(sample)
        self._samples_of.append(sequence)
        sequence.unread += 1

    def finish(self, number: int) -> Planned:
        step = Step(
            tuple(self.decode),
            self.width,
            tuple(self.prefill),
            tuple(self.begins),
            tuple(self.copies),
            tuple(self.pages),
            tuple(self.samples),
            self.drafts,
            self.moves,
            self.moved,
        )
        return Planned(number, step, tuple(self._rows_of), tuple(self._samples_of))
