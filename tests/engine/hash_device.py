"""A device that knows no tensors. Its model is a hash of everything a sequence has consumed, which it rebuilds from the
Steps alone: a page holds token ids, a slot the ids whose state it stands for, drafts that can be taken back among them.
Some of its drafts are what the model chooses next and some are not. Whatever goes wrong with memory changes an id or
breaks an assertion here. Ids follow from a request by `expected`, which knows neither Steps nor scheduling.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from zlib import crc32

from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.executor.runner import Result
from tokenspeed.engine.executor.sampling import TokenScores
from tokenspeed.engine.request import Request
from tokenspeed.engine.schedule.step import Begin, DecodeRow, Edit, PrefillRow, Sample, Step

VOCAB = 64
EOS, THINK, END_THINK = 3, 60, 61
PAGE_BYTES = 4 * PAGE_TOKENS
EMPTY = b"\xff" * PAGE_BYTES  # no token has this id
POISON = (62, 13, 62)  # in a row they make everything from the last on not finite
NONE_ALLOWED, NOT_FINITE = -1, -2


def as_bytes(tokens) -> bytes:
    return array("i", tokens).tobytes()


def first_poisoned(tokens) -> int | None:
    """How many tokens stand before the first whose keys are not finite."""
    return next((i + 2 for i in range(len(tokens) - 2) if tuple(tokens[i : i + 3]) == POISON), None)


def finite(history: bytes) -> bool:
    return as_bytes(POISON) not in history


def score(history: bytes, id: int) -> float:
    """The log-probability of an id after a history."""
    return -crc32(b"p" + as_bytes([id]), crc32(history)) / 2**32


def scores_of(history: bytes, id: int, alternatives: int) -> TokenScores:
    ids = (id, *range(alternatives))
    return TokenScores(ids, tuple(score(history, i) for i in ids), tuple(range(1, 2 + alternatives)))


def choose(history: bytes, begin: Begin, output: int, counts: Counter, edit: Edit | None = None) -> int:
    """The id that follows: the first permitted one of a series that everything a sampler knows goes into."""
    if not finite(history):
        return NOT_FINITE
    bias = tuple(pair for pair in begin.bias if pair[1] > float("-inf"))
    asked = (begin.temperature, begin.top_k, begin.top_p, begin.min_p, begin.seed, output, bias, begin.allowed)
    asked += (begin.presence_penalty, begin.frequency_penalty, begin.repetition_penalty)
    asked += (begin.prompt, sorted(counts.items())) if begin.penalised else ()
    start = crc32(repr(asked).encode(), crc32(history))
    banned = set(begin.banned) if output < begin.min_tokens else set()
    banned |= {id for id, value in begin.bias if value == float("-inf")} | set(edit.banned if edit else ())
    mask = int.from_bytes(edit.allowed, "little") if edit and edit.allowed else -1
    ids = [(start + 37 * i) % VOCAB for i in range(VOCAB)]
    allowed = begin.allowed or ids
    return next((id for id in ids if id in allowed and mask >> id & 1 and id not in banned), NONE_ALLOWED)


@dataclass
class Outcome:
    """What a continuation is to get."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"
    stop: int | str | None = None


class Letters:
    """A tokenizer of one character an id, two of which open and close reasoning."""

    special_ids = frozenset({EOS})

    def token_bytes(self, id: int) -> bytes:
        return bytes([0x30 + id])

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 0x30 for character in text if 0x30 <= ord(character) < 0x30 + VOCAB]

    def token_to_id(self, token: str) -> int | None:
        return {"<think>": THINK, "</think>": END_THINK}.get(token)


def letter(id: int) -> str:
    return "" if id in Letters.special_ids else Letters().token_bytes(id).decode()


def forbidden(request: Request, ids: list[int]) -> Edit:
    """What bad words and the thinking budget leave after some outputs."""
    params, mask = request.params, b""
    words = [tuple(Letters().encode(word)) for word in params.bad_words]
    banned = tuple(word[-1] for word in words if tuple(ids[len(ids) + 1 - len(word) :]) == word[:-1])
    if params.thinking_token_budget is not None:
        thinking, spent = False, 0
        for place, id in enumerate((*request.prompt, *ids)):
            if id in (THINK, END_THINK) and not (thinking and id == THINK):
                thinking, spent = id == THINK, 0
            else:
                spent += thinking and place >= len(request.prompt)
        if thinking and spent >= params.thinking_token_budget:
            mask = (1 << END_THINK).to_bytes(-(-VOCAB // 32) * 4, "little")
    return Edit(0, mask, banned)


def expected(request: Request, seed: int, room: int) -> Outcome:
    """What the model gives one continuation that runs alone. room: tokens a sequence may have."""
    params, history = request.params, as_bytes(request.prompt)
    banned = tuple({EOS, *params.stop_token_ids}) if params.min_tokens else ()
    begin = Begin(-1, params.temperature, params.top_k, params.top_p, params.min_p, seed)
    begin = begin._replace(
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        banned=banned,
        bias=params.logit_bias,
        allowed=params.allowed_token_ids,
        prompt=request.prompt,
    )
    outcome, counts, searched = Outcome(), Counter(), ""
    for output in range(min(params.max_tokens or room, room - len(request.prompt))):
        id = choose(history, begin, output, counts, forbidden(request, outcome.ids))
        if id < 0:
            outcome.reason = "error"
            break
        outcome.ids.append(id)
        counts[id] += 1
        history += as_bytes([id])
        ends = output + 1 >= params.min_tokens
        if ends and (id in params.stop_token_ids or (id == EOS and not params.ignore_eos)):
            outcome.reason, outcome.stop = "stop", id if id in params.stop_token_ids else None
            outcome.text += letter(id) if params.include_stop_str_in_output else ""
            break
        outcome.text += letter(id)
        searched += letter(id)
        late = output >= params.min_tokens and letter(id)
        if found := [stop for stop in params.stop if late and searched.endswith(stop)]:
            outcome.reason, outcome.stop = "stop", max(found, key=len)
            outcome.text = outcome.text if params.include_stop_str_in_output else outcome.text[: -len(outcome.stop)]
            break
    return outcome


class Launched:
    """A Step that the device has begun."""

    def __init__(self, device: "HashDevice", step: Step):
        self._device, self._step, self._plans = device, step, device.plans
        self.ids: list[list[int]] | None = None
        self._histories, self._prompt_scores = device.forward(step)
        quiet = set(range(len(step.decode), len(step.rows))) - {sample.row for sample in step.samples}
        self._corrupted = [row for row in sorted(quiet) if not finite(self._histories[row][-1])]
        self._scores: dict[int, list[TokenScores]] = {}

    def drafts(self) -> list[list[int]]:
        return [self._device.next_ids[row.index][1 : self._step.width] for row in self._step.decode]

    def sample(self, edits=()) -> None:
        assert self.ids is None, "a Step is sampled twice"
        self._device.queue.remove(self)
        by_sample: dict[int, list[Edit]] = {i: [] for i, s in enumerate(self._step.samples) if s.edited}
        for edit in edits:
            assert self._step.samples[edit.sample].edited, "an edit of a sample that is not marked"
            assert edit.place == len(by_sample[edit.sample]), "edits of a sample are not place by place"
            by_sample[edit.sample].append(edit)
        self.ids = []
        for i, s in enumerate(self._step.samples):
            decoding = s.row < len(self._step.decode)
            end = None if decoding else self._step.rows[s.row].end
            own = self._step.rows[s.row].index == s.index  # a Runner drafts for nobody else
            drafts = self._step.drafts if own else 0
            ids = self._device.choose(s, self._histories[s.row], by_sample.get(i), end, drafts)
            if s.logprobs >= 0:
                histories = self._histories[s.row][-1:] if end else self._histories[s.row]
                self._scores[i] = [scores_of(h, id, s.logprobs) for h, id in zip(histories, ids, strict=False)]
            self.ids.append(ids)

    def read(self) -> Result:
        assert self.ids is not None, "ids are read that nobody asked for"
        assert self._device.plans > self._plans, "ids are read before the next Step is planned"
        assert not self._device.planned, "ids are read before the next Step is launched"
        return Result([list(ids) for ids in self.ids], self._scores, self._prompt_scores, self._corrupted)


class HashDevice:
    """Stands in for a Runner. `watch` a scheduler, so that it sees when a Step is planned.

    right: of a hundred drafts how many are what the model chooses.
    """

    looks_up_drafts = False
    mover = None

    def __init__(self, pages: int, slots: int, seqs: int, tokens: int, right: int = 60):
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB))
        self.pages = [EMPTY] * pages
        # The ids that a slot's state has consumed, and how many of them cannot be taken back any more.
        self.slots: list[tuple[bytes, int] | None] = [None] * slots
        self.tables: list[list[int]] = [[] for _ in range(seqs)]
        self.table_pages = -(-tokens // PAGE_TOKENS)
        self.right = right
        self.lengths, self.left = [0] * seqs, [0] * seqs
        self.next_ids: list[list[int]] = [[] for _ in range(seqs)]  # the last one and drafts
        self.begins: list[Begin | None] = [None] * seqs
        self.counts = [Counter() for _ in range(seqs)]
        self.queue: list[Launched] = []  # launched and not sampled
        self.steps: list[Step] = []
        self.plans, self.planned = 0, False
        self.drafts = Counter()  # verified, and of these right
        self.running = lambda: ()

    def watch(self, scheduler) -> None:
        plan = scheduler.plan

        def watched():
            self.plans += 1
            found = plan()
            self.planned = found is not None
            return found

        scheduler.plan = watched
        self.running = lambda: [s for s in scheduler.running if s.last_step >= 0]

    def launch(self, step: Step) -> Launched:
        assert not self.queue, "a Step is launched before the one that gives its ids was sampled"
        self.planned = False
        self.steps.append(step)
        launched = Launched(self, step)
        self.queue.append(launched)
        return launched

    def finish(self) -> None:
        """Everything is done when it is sampled."""

    def forward(self, step: Step) -> tuple[list[list[bytes]], dict[int, list[TokenScores]]]:
        """The histories under the logits of each row, and the scores of prompt tokens."""
        for begin in step.begins:
            self.begins[begin.index] = begin
            self.counts[begin.index] = Counter(begin.output)
            self.lengths[begin.index], self.left[begin.index] = 0, begin.left
            self.next_ids[begin.index], self.tables[begin.index] = [], []
        copied = [(target, self.pages[source][: 4 * rows]) for source, target, rows in step.copies]
        for target, content in copied:
            self.pages[target] = content + EMPTY[len(content) :]
        for index, first, pages in step.pages:
            assert first + len(pages) <= self.table_pages, "more pages than a sequence may have"
            self.tables[index][first:] = pages
        places = [self._place(row, step.width) for row in step.rows]
        self._check_sharing(step, places)
        # All slots are read before any is written, and then again: a row may not see what another wrote in its Step.
        before = [self._consumed(row, place) for row, place in zip(step.rows, places, strict=True)]
        histories: list[list[bytes]] = []
        prompt_scores = {}
        for i, (row, place, history) in enumerate(zip(step.rows, places, before, strict=True)):
            if place is None:
                histories.append([])
                continue
            start, tokens = place
            assert self._consumed(row, place) == history, "a row reads a slot that another one writes"
            after = history + as_bytes(tokens)
            self._attend(row, start, after)
            wanted, certain = len(tokens), start + 1
            if isinstance(row, PrefillRow):
                wanted, certain = row.logits, row.end
                for count, slot in row.snapshots:
                    self.slots[slot] = after[: 4 * count], count
            self.slots[row.write_slot] = after, certain
            histories.append([after[: len(after) - 4 * k] for k in reversed(range(wanted))])
            if isinstance(row, PrefillRow) and row.scored:
                pairs = zip(histories[-1], row.scored, strict=False)
                prompt_scores[i] = [scores_of(prefix, id, row.alternatives) for prefix, id in pairs]
        return histories, prompt_scores

    def _place(self, row: DecodeRow | PrefillRow, width: int) -> tuple[int, list[int]] | None:
        """Where the row starts and what it consumes; None for a sequence that has nothing left to say."""
        if isinstance(row, PrefillRow):
            return row.start, list(row.tokens)
        if not self.left[row.index]:
            return None
        ids = self.next_ids[row.index]
        return self.lengths[row.index], [*ids, *[7] * (width - len(ids))][:width]

    def _consumed(self, row: DecodeRow | PrefillRow, place: tuple[int, list[int]] | None) -> bytes:
        """The ids that the row's state stands for, without what is taken back."""
        if place is None or not place[0]:
            return b""
        start = place[0]
        history, certain = self.slots[row.read_slot] or (b"", 0)
        assert certain <= start <= len(history) // 4, (
            f"slot {row.read_slot} stands for {certain} to {len(history) // 4} tokens, not {start}"
        )
        return history[: 4 * start]

    def _attend(self, row: DecodeRow | PrefillRow, start: int, history: bytes) -> None:
        """Store what the row brings, and check that its pages hold what attention reads."""
        table, end = self.tables[row.index], len(history) // 4
        for position in range(max(start, getattr(row, "kv_tokens", 0)), end):
            page, at = table[position // PAGE_TOKENS], 4 * (position % PAGE_TOKENS)
            id = history[4 * position : 4 * position + 4]
            self.pages[page] = self.pages[page][:at] + id + self.pages[page][at + 4 :]
        held = b"".join(self.pages[page] for page in table[: -(-end // PAGE_TOKENS)])[: 4 * end]
        assert held == history, f"the pages of index {row.index} do not hold the {end} tokens its state stands for"

    def _check_sharing(self, step: Step, places: list) -> None:
        """Nobody stores into rows that another running sequence reads."""
        read = {}
        for s in self.running():
            # Pages may still be on their way into its table.
            table = self.tables[s.index][: s.held_pages - len(s.new_pages)] + list(s.new_pages)
            known = s.launched if s.holds_memory else 0
            for i in range(-(-known // PAGE_TOKENS)):
                read.setdefault(table[i], []).append((s.index, known - i * PAGE_TOKENS))
        for row, place in zip(step.rows, places, strict=True):
            if place is None:
                continue
            start, end = max(place[0], getattr(row, "kv_tokens", 0)), place[0] + len(place[1])
            for i in range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
                for index, rows in read.get(self.tables[row.index][i], ()):
                    first = max(start - i * PAGE_TOKENS, 0)
                    assert index == row.index or first >= rows, "a row stores over what another sequence reads"

    def choose(
        self, sample: Sample, histories: list[bytes], edits: list[Edit] | None, end: int | None, drafts: int
    ) -> list[int]:
        """The ids that count behind a decode row, or behind a prompt that ends at `end`. Drafts the next ones. edits:
        place by place, None where the host has no say."""
        index = sample.index
        begin, counts = self.begins[index], self.counts[index]
        if end is None and not histories:
            return []
        context = self.lengths[index] if end is None else end - 1
        guesses = self.next_ids[index][1:] if end is None else []
        if edits is not None:
            guesses = guesses[: max(len(edits) - 1, 0)]
        ids = []
        for history, guess in zip(histories[-1:] if end else histories, [*guesses, None, *histories], strict=False):
            output = context + 1 + len(ids) - begin.prompt_tokens
            id = choose(history, begin, output, counts, edits[len(ids)] if edits else None)
            ids.append(id)
            counts[id] += 1
            self.left[index] -= 1
            if id < 0 or (id in begin.stops and output + 1 >= begin.min_tokens):
                self.left[index] = 0
            if end is None and len(histories) > 1 and guess is not None:
                self.drafts["verified"] += 1
                self.drafts["right"] += id == guess
            if not self.left[index] or id != guess:
                break
        self.lengths[index] = context + len(ids)
        latest = max(ids[-1], 0)
        last = histories[len(ids) - 1 if end is None else -1] + as_bytes([latest])
        self.next_ids[index] = [latest, *self._draft(last, begin, counts, self.lengths[index] + 1, drafts)]
        return ids

    def _draft(self, history: bytes, begin: Begin, counts: Counter, length: int, drafts: int) -> list[int]:
        """What follows, with a wrong id here and there."""
        ids, counts = [], counts.copy()
        for k in range(drafts):
            id = max(choose(history, begin, length + k - begin.prompt_tokens, counts), 0)
            if crc32(b"draft", crc32(history)) % 100 >= self.right:
                id = (id + 1) % VOCAB
            ids.append(id)
            counts[id] += 1
            history += as_bytes([id])
        return ids
