"""A Step: all that the device does in one forward pass, the sampling after it and the drafting after that, as plain
data, so it can be logged, replayed bit for bit, sent to ranks, and checked without a device.

Sequences are known to the device by their *index*, 0 .. max_num_seqs - 1: it keeps per index the page table, how many
tokens were consumed, the id chosen last and the drafts of the ids behind it, sampling parameters and penalty counts.
Steps carry what changes, and bounds where only the device knows: a Step whose sequences merely go on is the same Step
as the one before, but for the pages that come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config import PAGE_TOKENS


class Begin(NamedTuple):
    """A sequence takes an index: how its ids are chosen, and when it ends. Fields as in SamplingParams.

    prompt_tokens: tokens before its first output, whose choice has number 0; left: outputs it may still have; stops:
    ids that end it once it has min_tokens outputs; banned: ids forbidden until then; prompt, output: ids so far, where
    a penalty counts them; history: ids so far, where drafts are looked up in them.
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
    prompt_tokens: int = 0
    left: int = 1 << 30
    stops: tuple[int, ...] = ()
    history: tuple[int, ...] = ()

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    @property
    def adjusted(self) -> bool:
        """Whether its logits are changed before an id is chosen."""
        return self.penalised or bool(self.bias or self.allowed or self.min_tokens)


class DecodeRow(NamedTuple):
    """A sequence that goes on from where the device knows it to be. read_slot, write_slot: state slots, equal for an
    update in place."""

    index: int
    read_slot: int
    write_slot: int


class PrefillRow(NamedTuple):
    """A run of a sequence's tokens that the host knows.

    tokens: the ids to consume; start: tokens consumed before them; kv_tokens: stores of tokens below this count are
    skipped, their pages hold them already; snapshots: (token count, slot) pairs with start < count <= end; logits: how
    many of the last tokens need logits, one at least: it shows whether the row's numbers are finite; scored: ids whose
    log-probabilities are wanted under the first logits, in order, each with that many alternatives.
    """

    tokens: tuple[int, ...]
    start: int
    read_slot: int
    write_slot: int
    index: int = 0
    kv_tokens: int = 0
    snapshots: tuple[tuple[int, int], ...] = ()
    logits: int = 1
    scored: tuple[int, ...] = ()
    alternatives: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class NewPages(NamedTuple):
    """KV pages that enter an index's table from its page `first` on, 64 tokens each."""

    index: int
    first: int
    pages: tuple[int, ...]


class Sample(NamedTuple):
    """Choose ids for an index behind a row of the Step: of a decode row its own, one and as many more as its drafts
    agree with; of a prefill row one, behind its last token, for whoever begins there.

    logprobs: alternatives, -1 for none; edited: Edits for it come between forward and sampling.
    """

    row: int
    index: int
    logprobs: int = -1
    edited: bool = False


class Edit(NamedTuple):
    """What the host decides about a Sample after the forward pass was launched: the ids it may take.

    sample: its place in Step.samples; allowed: 32 ids an int32, little-endian, b"" for all; banned: ids; place: behind
    how many of the row's drafts, from 0. Drafts behind the last place that has an Edit do not count.
    """

    sample: int
    allowed: bytes = b""
    banned: tuple[int, ...] = ()
    place: int = 0


class Move(NamedTuple):
    """Pages and a state slot to copy between the device and host memory, beside Steps. out: to host memory; sources[i]
    goes to targets[i], source to target."""

    number: int
    out: bool
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Step:
    """decode: rows of `width` tokens, the id chosen last and drafts, consumed by the recurrent kernels; prefill: rows
    consumed in chunks; copies: (source page, target page, rows) before anything is stored; samples: of every decode row
    in order, then of prefill rows; drafts: how many are made behind the ids that are chosen; moves: to be started
    beside it; moved: numbers of those that are done before it. A Step of moves has no rows."""

    decode: tuple[DecodeRow, ...] = ()
    width: int = 1
    prefill: tuple[PrefillRow, ...] = ()
    begins: tuple[Begin, ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()
    pages: tuple[NewPages, ...] = ()
    samples: tuple[Sample, ...] = ()
    drafts: int = 0
    moves: tuple[Move, ...] = ()
    moved: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[DecodeRow | PrefillRow, ...]:
        return self.decode + self.prefill

    @property
    def tokens(self) -> int:
        return len(self.decode) * self.width + sum(len(row.tokens) for row in self.prefill)

    @property
    def edited(self) -> bool:
        """Whether an Edit for one of the samples comes between forward and sampling."""
        return any(sample.edited for sample in self.samples)


@dataclass(slots=True)
class StepChecker:
    """Follows the Steps of one engine and checks what each must keep: nothing that a row or a copy writes is touched by
    another, indices and pages are in range, positions follow each other. For tests and `--validate`.

    coming: pages and slot that each move back under way writes, by its number. lower, upper: between which counts an
    index's consumed tokens lie once all that was launched is done.
    """

    pages: int
    slots: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    lower: dict[int, int] = field(default_factory=dict)
    upper: dict[int, int] = field(default_factory=dict)
    coming: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def check(self, step: Step) -> None:
        """A Step is launched. Raises AssertionError with the broken rule."""
        for begin in step.begins:
            self.tables[begin.index], self.upper[begin.index] = [], -1
        for index, first, pages in step.pages:
            table = self.tables.setdefault(index, [])
            assert first <= len(table), f"index {index}: pages {len(table)} to {first} are missing"
            table[first:] = pages
        indices = [row.index for row in step.rows]
        assert len(set(indices)) == len(indices), f"an index has two rows: {sorted(indices)}"
        read_pages: list[int] = []
        written_pages: list[int] = []
        read_slots: list[int] = []
        written_slots: list[int] = []
        for row in step.rows:
            first, end = self._advance(row, step.width)
            table = self.tables.setdefault(row.index, [])
            assert len(table) * PAGE_TOKENS >= end, f"index {row.index}: {end} tokens need more than {len(table)} pages"
            whole = first // PAGE_TOKENS if first < end else len(table)
            written_pages += table[whole:]
            read_pages += table[:whole]
            read_slots += [row.read_slot] if first and row.read_slot != row.write_slot else []
            written_slots += [row.write_slot]
            written_slots += [slot for _, slot in row.snapshots] if isinstance(row, PrefillRow) else []
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
        for number in step.moved:
            self.coming.pop(number, None)
        self.coming |= {move.number: (move.targets, move.target) for move in step.moves if not move.out}
        for number, (pages, slot) in self.coming.items():
            used = set(pages) & {*read_pages, *written_pages, *copied} or {slot} & {*read_slots, *written_slots}
            assert not used, f"{used} are used before move {number} has brought what they hold"
        rows, decoding = step.rows, len(step.decode)
        assert step.width >= 1 and step.drafts >= 0, f"width {step.width}, {step.drafts} drafts"
        own = [(sample.row, sample.index) for sample in step.samples[:decoding]]
        assert own == [(i, row.index) for i, row in enumerate(step.decode)], "a decode row has no sample of its own"
        for sample in step.samples[decoding:]:
            assert decoding <= sample.row < len(rows), f"a sample of row {sample.row}, which is no prefill row"
        sampled = [sample.index for sample in step.samples]
        assert len(set(sampled)) == len(sampled), "two samples for one index"
        for sample in step.samples[decoding:]:
            self.lower[sample.index] = self.upper[sample.index] = rows[sample.row].end

    def read(self, step: Step, counts: Sequence[int]) -> None:
        """It is known how many ids each of the samples got, of the oldest Step that was not read yet. Raises
        AssertionError where there are too many."""
        for sample, count in zip(step.samples, counts, strict=True):
            limit = 1 if sample.row >= len(step.decode) else step.width
            assert count <= limit, f"index {sample.index} got {count} ids of at most {limit}"
            if sample.row < len(step.decode):
                self.lower[sample.index] += count
                self.upper[sample.index] -= step.width - count

    def _advance(self, row: DecodeRow | PrefillRow, width: int) -> tuple[int, int]:
        """What the row may store into: from its first token on, to its end."""
        before = self.upper.get(row.index, -1)
        if isinstance(row, DecodeRow):
            assert before >= 0, f"index {row.index} goes on from nowhere"
            self.upper[row.index] = before + width
            return self.lower[row.index], before + width
        assert row.tokens, f"a prefill row without tokens: {row}"
        assert before in (-1, row.start), f"index {row.index} goes on at {row.start}, not {before}"
        assert all(row.start < count <= row.end for count, _ in row.snapshots), f"snapshots outside the row: {row}"
        assert 1 <= row.logits <= len(row.tokens) and len(row.scored) <= row.logits
        self.lower[row.index] = self.upper[row.index] = row.end
        return max(row.start, row.kv_tokens), row.end
