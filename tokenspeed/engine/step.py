"""A Step: all that the device does in one forward pass and the sampling after it, as plain data, so it can be logged,
replayed bit for bit, sent to ranks, and checked without a device.

Sequences are known to the device by their *index*, 0 .. max_num_seqs - 1: it keeps per index the page table, the id
sampled last, sampling parameters and penalty counts. Steps carry what changes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from .config import PAGE_TOKENS


class Begin(NamedTuple):
    """A sequence takes an index: how its ids are chosen. Fields as in SamplingParams.

    banned: ids forbidden for the first min_tokens outputs; prompt, output: ids so far, where a penalty counts them.
    """

    index: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    banned: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


class Row(NamedTuple):
    """One sequence's part of a Step.

    tokens: the ids to consume; (): the one id that was sampled last for this index; start: tokens consumed before
    them; pages: KV pages that enter the index's table at first_page, 64 tokens each; read_slot, write_slot: state
    slots, equal for an update in place; kv_tokens: stores of tokens below this count are skipped, their pages hold them
    already; snapshots: (token count, slot) pairs with start < count <= start + len(tokens), prefill only; logits: how
    many of the last tokens need logits; scored: ids whose log-probabilities are wanted under the first logits, in
    order, each with that many alternatives.
    """

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    read_slot: int
    write_slot: int
    index: int = 0
    first_page: int = 0
    kv_tokens: int = 0
    snapshots: tuple[tuple[int, int], ...] = ()
    logits: int = 1
    scored: tuple[int, ...] = ()
    alternatives: int = 0

    @property
    def end(self) -> int:
        return self.start + (len(self.tokens) or 1)


class Sample(NamedTuple):
    """Choose an id for an index from a row of the Step's logits (decode rows' first, then the prefill rows').

    output: which output of the sequence it is, from 0, the counter of its noise; logprobs: alternatives, -1 for none;
    edited: an Edit for it comes between forward and sampling.
    """

    logits: int
    index: int
    output: int
    logprobs: int = -1
    edited: bool = False


class Edit(NamedTuple):
    """What the host decides about a Sample after the forward pass was launched: the ids it may take.

    sample: its place in Step.samples; allowed: 32 ids a word, little-endian int32, b"" for all; banned: ids.
    """

    sample: int
    allowed: bytes = b""
    banned: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """decode: rows of exactly one token, consumed by the recurrent kernels; prefill: rows consumed in chunks; copies:
    (source page, target page, rows) before anything is stored."""

    decode: tuple[Row, ...] = ()
    prefill: tuple[Row, ...] = ()
    begins: tuple[Begin, ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.decode + self.prefill

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(len(row.tokens) for row in self.prefill)

    @property
    def edited(self) -> bool:
        """Whether an Edit for one of the samples comes between forward and sampling."""
        return any(sample.edited for sample in self.samples)

    @property
    def grown(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """(index, first page, pages) of the rows that bring pages."""
        return [(row.index, row.first_page, row.pages) for row in self.rows if row.pages]

    @property
    def published(self) -> list[tuple[int, int]]:
        """(row, its end) where others shall see what it wrote. At each token that would cost as much as planning does:
        at the ends of pages and of prefilled chunks, and where a state has left the slot that it was read from."""
        return [
            (i, row.end)
            for i, row in enumerate(self.rows)
            if row.tokens or row.end % PAGE_TOKENS == 0 or row.read_slot != row.write_slot
        ]

    def whole(self) -> "Step":
        return self


@dataclass(frozen=True, slots=True)
class NextStep:
    """The decode rows and samples of a Step `ahead` tokens later, when nothing else has happened since.

    It is told by what is new, so that a step costs the host little whatever the batch; `whole` spells it out.
    base: a Step of decode rows alone, a sample for each in order, none of them edited; more_pages: (row, first page,
    pages) of the rows that bring pages.
    """

    base: Step
    ahead: int
    more_pages: tuple[tuple[int, int, tuple[int, ...]], ...] = ()

    prefill = begins = copies = ()
    edited = False

    @property
    def decode(self) -> tuple[Row, ...]:
        pages = {i: {"first_page": first, "pages": pages} for i, first, pages in self.more_pages}
        none = {"pages": ()}
        return tuple(
            row._replace(tokens=(), start=row.start + self.ahead, read_slot=row.write_slot, **pages.get(i, none))
            for i, row in enumerate(self.base.decode)
        )

    rows = decode

    @property
    def tokens(self) -> int:
        return len(self.base.decode)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample._replace(output=sample.output + self.ahead) for sample in self.base.samples)

    @property
    def grown(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """As a Step's."""
        return [(self.base.decode[i].index, first, pages) for i, first, pages in self.more_pages]

    @property
    def published(self) -> list[tuple[int, int]]:
        """As a Step's."""
        ends = [row.start + self.ahead + 1 for row in self.base.decode]
        return [(i, end) for i, end in enumerate(ends) if end % PAGE_TOKENS == 0]

    def whole(self) -> Step:
        return Step(decode=self.decode, samples=self.samples)


@dataclass(slots=True)
class StepChecker:
    """Follows the Steps of one engine and checks what each must keep: nothing that a row or a copy writes is touched by
    another, indices and pages are in range, positions follow each other. For tests and `--validate`."""

    pages: int
    slots: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    consumed: dict[int, int] = field(default_factory=dict)

    def check(self, step: Step) -> None:
        """Raises AssertionError with the broken rule."""
        for begin in step.begins:
            self.tables[begin.index], self.consumed[begin.index] = [], -1
        indices = [row.index for row in step.rows]
        assert len(set(indices)) == len(indices), f"an index has two rows: {sorted(indices)}"
        read_pages: list[int] = []
        written_pages: list[int] = []
        read_slots: list[int] = []
        written_slots: list[int] = []
        for row in step.rows:
            self._check_row(row, row in step.decode)
            table = self.tables[row.index]
            stored = range(max(row.start, row.kv_tokens), row.end)
            first = stored.start // PAGE_TOKENS if stored else len(table)
            written_pages += table[first:]
            read_pages += table[:first]
            read_slots += [row.read_slot] if row.start and row.read_slot != row.write_slot else []
            written_slots += [row.write_slot, *(slot for _, slot in row.snapshots)]
        copied = [target for _, target, _ in step.copies]
        assert len(set(copied)) == len(copied), f"a page is copied to twice: {copied}"
        assert not set(copied) & {source for source, _, _ in step.copies}, "a copy reads what another copy writes"
        # A copy may read the first rows of a page that a row appends to: it runs first, and appending leaves them.
        assert len(set(written_pages)) == len(written_pages), "two rows write one page"
        overlap = set(written_pages) & set(read_pages)
        assert not overlap, f"pages {overlap} are written by one row and read by another"
        assert len(set(written_slots)) == len(written_slots), f"two writes to one slot: {sorted(written_slots)}"
        assert not set(written_slots) & set(read_slots), "a slot is written by one row and read by another"
        assert all(0 <= slot < self.slots for slot in written_slots + read_slots), "a slot is out of range"
        assert all(0 <= page < self.pages for page in read_pages + written_pages + copied), "a page is out of range"
        logits = sum(row.logits for row in step.rows)
        assert all(sample.logits < logits for sample in step.samples), "a sample names logits that are not there"
        sampled = [sample.index for sample in step.samples]
        assert len(set(sampled)) == len(sampled), "two samples for one index"

    def _check_row(self, row: Row, decode: bool) -> None:
        table = self.tables.setdefault(row.index, [])
        assert row.first_page <= len(table), f"index {row.index}: pages {len(table)} to {row.first_page} are missing"
        table[row.first_page :] = row.pages if row.pages else table[row.first_page :]
        assert len(table) * PAGE_TOKENS >= row.end, (
            f"index {row.index}: {row.end} tokens need more than {len(table)} pages"
        )
        before = self.consumed.get(row.index, -1)
        assert before in (-1, row.start), f"index {row.index} goes on at {row.start}, not {before}"
        self.consumed[row.index] = row.end
        assert len(row.tokens) <= 1 if decode else row.tokens, f"a decode row has one token, a prefill row some: {row}"
        assert all(row.start < count <= row.end for count, _ in row.snapshots), f"snapshots outside the row: {row}"
        assert 0 <= row.logits <= row.end - row.start and len(row.scored) <= row.logits
