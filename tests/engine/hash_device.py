"""A device that knows no tensors. Its model is a hash of everything a sequence has consumed, which it rebuilds from the
Steps alone: a page holds token ids, a slot the ids whose state it stands for. Whatever goes wrong with memory changes
an id or breaks an assertion here. Ids follow from a request by `expected`, which knows neither Steps nor scheduling.
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from zlib import crc32

from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.request import Request
from tokenspeed.engine.runner import Result
from tokenspeed.engine.sampling import TokenScores
from tokenspeed.engine.step import Begin, Edit, NextStep, Row, Sample, Step

VOCAB = 64
EOS, THINK, END_THINK = 3, 60, 61
PAGE_BYTES = 4 * PAGE_TOKENS
EMPTY = b"\xff" * PAGE_BYTES  # no token has this id


def as_bytes(tokens) -> bytes:
    return array("i", tokens).tobytes()


def score(history: bytes, id: int) -> float:
    """The log-probability of an id after a history."""
    return -crc32(b"p" + as_bytes([id]), crc32(history)) / 2**32


def scores_of(history: bytes, id: int, alternatives: int) -> TokenScores:
    ids = (id, *range(alternatives))
    return TokenScores(ids, tuple(score(history, i) for i in ids), tuple(range(1, 2 + alternatives)))


def choose(history: bytes, begin: Begin, output: int, counts: Counter, edit: Edit | None = None) -> int:
    """The id that follows: the first permitted one of a series that everything a sampler knows goes into."""
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
    return next((id for id in ids if id in allowed and mask >> id & 1 and id not in banned), 0)  # 0: nothing is left


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
        outcome.ids.append(id)
        counts[id] += 1
        history += as_bytes([id])
        ends = output + 1 >= params.min_tokens
        if ends and (id in params.stop_token_ids or (id == EOS and not params.ignore_eos)):
            outcome.reason, outcome.stop = "stop", id if id in params.stop_token_ids else None
            outcome.text += letter(id) if params.include_stop_str_in_output else ""
            break
        outcome.text += letter(id)
        searched += letter(id) if ends else ""
        if found := [stop for stop in params.stop if searched.endswith(stop)]:
            outcome.reason, outcome.stop = "stop", max(found, key=len)
            outcome.text = outcome.text if params.include_stop_str_in_output else outcome.text[: -len(outcome.stop)]
            break
    return outcome


class Launched:
    """A Step that the device has begun."""

    def __init__(self, device: "HashDevice", step: Step):
        self._device, self._step, self._plans = device, step, device.plans
        self.ids: list[int] | None = None
        self._histories, self._prompt_scores = device.forward(step)
        self._scores: dict[int, TokenScores] = {}

    def sample(self, edits=()) -> None:
        assert self.ids is None, "a Step is sampled twice"
        self._device.queue.remove(self)
        by_sample = {edit.sample: edit for edit in edits}
        for i in by_sample:
            assert self._step.samples[i].edited, "an edit of a sample that is not marked"
        samples = self._step.samples
        self.ids = [self._device.choose(s, self._histories[s.logits], by_sample.get(i)) for i, s in enumerate(samples)]
        for i, (s, id) in enumerate(zip(samples, self.ids, strict=True)):
            if s.logprobs >= 0:
                self._scores[i] = scores_of(self._histories[s.logits], id, s.logprobs)

    def read(self) -> Result:
        assert self.ids is not None, "ids are read that nobody asked for"
        assert self._device.plans > self._plans, "ids are read before the next Step is planned"
        assert not self._device.planned, "ids are read before the next Step is launched"
        return Result(list(self.ids), self._scores, self._prompt_scores)


class HashDevice:
    """Stands in for a Runner. `watch` a scheduler, so that it sees when a Step is planned."""

    def __init__(self, pages: int, slots: int, seqs: int, tokens: int):
        self.model = SimpleNamespace(config=SimpleNamespace(vocab=VOCAB))
        self.pages = [EMPTY] * pages
        self.slots: list[bytes | None] = [None] * slots
        self.tables = [[-1] * -(-tokens // PAGE_TOKENS) for _ in range(seqs)]
        self.last_ids = [-1] * seqs
        self.begins: list[Begin | None] = [None] * seqs
        self.counts = [Counter() for _ in range(seqs)]
        self.queue: list[Launched] = []  # launched and not sampled
        self.steps: list[Step] = []
        self.plans, self.planned = 0, False
        self.running = lambda: ()

    def watch(self, scheduler) -> None:
        plan = scheduler.plan

        def watched():
            self.plans += 1
            found = plan()
            self.planned = found is not None
            if found and isinstance(found.step, NextStep):
                assert not [s for s in scheduler.running if s.ending is None and s not in found.rows], "one is left out"
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

    def forward(self, step: Step) -> tuple[list[bytes], dict[int, list[TokenScores]]]:
        """The history under each row of logits, and the scores of prompt tokens."""
        for begin in step.begins:
            self.begins[begin.index] = begin
            self.counts[begin.index] = Counter(begin.output)
        copied = [(target, self.pages[source][: 4 * rows]) for source, target, rows in step.copies]
        for target, content in copied:
            self.pages[target] = content + EMPTY[len(content) :]
        for row in step.rows:
            table = self.tables[row.index]
            assert row.first_page + len(row.pages) <= len(table), "more pages than a sequence may have"
            table[row.first_page : row.first_page + len(row.pages)] = row.pages
        self._check_sharing(step)
        # All slots are read before any is written, and then again: a row may not see what another wrote in its Step.
        before = [self._consumed(row) for row in step.rows]
        histories: list[bytes] = []
        prompt_scores = {}
        for i, (row, history) in enumerate(zip(step.rows, before, strict=True)):
            assert self._consumed(row) == history, "a row reads a slot that another one writes"
            after = history + as_bytes(row.tokens or (self.last_ids[row.index],))
            self._attend(row, after)
            self.slots[row.write_slot] = after
            for count, slot in row.snapshots:
                self.slots[slot] = after[: 4 * count]
            wanted = [after[: 4 * (row.end - row.logits + k + 1)] for k in range(row.logits)]
            if row.scored:
                pairs = zip(wanted, row.scored, strict=False)
                prompt_scores[i] = [scores_of(prefix, id, row.alternatives) for prefix, id in pairs]
            histories += wanted
        return histories, prompt_scores

    def _consumed(self, row: Row) -> bytes:
        """The ids that the row's state stands for."""
        if not row.start:
            return b""
        history = self.slots[row.read_slot]
        assert history is not None and len(history) == 4 * row.start, (
            f"slot {row.read_slot} stands for {len(history or b'') // 4} tokens, not {row.start}"
        )
        return history

    def _attend(self, row: Row, history: bytes) -> None:
        """Store what the row brings, and check that its pages hold what attention reads."""
        table = self.tables[row.index]
        for position in range(max(row.start, row.kv_tokens), row.end):
            page, at = table[position // PAGE_TOKENS], 4 * (position % PAGE_TOKENS)
            id = history[4 * position : 4 * position + 4]
            self.pages[page] = self.pages[page][:at] + id + self.pages[page][at + 4 :]
        held = b"".join(self.pages[page] for page in table[: -(-row.end // PAGE_TOKENS)])[: 4 * row.end]
        assert held == history, f"the pages of index {row.index} do not hold the {row.end} tokens its state stands for"

    def _check_sharing(self, step: Step) -> None:
        """Nobody stores into rows that another running sequence reads."""
        read = {}
        for s in self.running():
            known = s.consumed if s.in_cache else 0
            # Pages that are still to come into its table are all of them, or its last one.
            table = s.new_pages if s.new_pages and not s.first_page else self.tables[s.index]
            for i in range(-(-known // PAGE_TOKENS)):
                read.setdefault(table[i], []).append((s.index, known - i * PAGE_TOKENS))
        for row in step.rows:
            start = max(row.start, row.kv_tokens)
            for i in range(start // PAGE_TOKENS, -(-row.end // PAGE_TOKENS)):
                for index, rows in read.get(self.tables[row.index][i], ()):
                    first = max(start - i * PAGE_TOKENS, 0)
                    assert index == row.index or first >= rows, "a row stores over what another sequence reads"

    def choose(self, sample: Sample, history: bytes, edit: Edit | None) -> int:
        begin, counts = self.begins[sample.index], self.counts[sample.index]
        id = choose(history, begin, sample.output, counts, edit)
        counts[id] += 1
        self.last_ids[sample.index] = id
        return id
