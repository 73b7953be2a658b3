"""What forbids ids in view of the ids before them. The host decides between the forward pass and the sampling, when all
earlier ids are known; so each says beforehand whether it may have a say in an output, and the others need not wait."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import RequestError
from .grammar import Matcher
from .tokenizer import Tokenizer


class Verdict(NamedTuple):
    """allowed: one bit an id, int32, None for all; banned: ids."""

    allowed: np.ndarray | None = None
    banned: tuple[int, ...] = ()


class Constraint(Protocol):
    """One sequence's rule about its own outputs."""

    def may_act(self, output: int) -> bool:
        """Whether output number `output` may be restricted, as far as the accepted ids say."""

    def verdicts(self, outputs: Sequence[int], drafts: Sequence[int] = ()) -> list[Verdict]:
        """What the next output may be, after these, and what may follow on each of `drafts`, should they be the next
        outputs themselves: as far as the rule allows them."""

    def accept(self, id: int) -> None:
        """An output is known."""


class BadWords:
    """Words that are never completed, each spelled as at the start of a text and after a space.

    single: ids that are words by themselves, forbidden whatever came before; longer: spellings of several other ids.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer):
        spellings = {tuple(tokenizer.encode(text)) for word in words for text in (word, " " + word.lstrip())}
        self.single = tuple(sorted(ids[0] for ids in spellings if len(ids) == 1))
        self.longer = sorted(ids for ids in spellings if not set(ids) & set(self.single))

    def may_act(self, output: int) -> bool:
        return bool(self.longer) and output > 0

    def verdicts(self, outputs: Sequence[int], drafts: Sequence[int] = ()) -> list[Verdict]:
        said = [*outputs[-max(map(len, self.longer), default=1) :], *drafts]
        return [self._verdict(said[: len(said) - ahead]) for ahead in range(len(drafts), -1, -1)]

    def _verdict(self, outputs: Sequence[int]) -> Verdict:
        ends = [ids[-1] for ids in self.longer if tuple(outputs[-len(ids) + 1 :]) == ids[:-1]]
        return Verdict(banned=tuple(ends))

    def accept(self, id: int) -> None:
        pass


class ThinkingBudget:
    """After so many tokens of reasoning the end of it is the only choice."""

    def __init__(self, budget: int, prompt: Sequence[int], start_id: int, end_id: int, mask_size: int):
        """mask_size: int32 numbers of a bit mask over the vocabulary."""
        self._budget, self._start, self._end, self._mask_size = budget, start_id, end_id, mask_size
        self._thinking, self._spent = False, 0
        for id in prompt:
            if id in (start_id, end_id):
                self._thinking = id == start_id
        self._outputs = 0

    def may_act(self, output: int) -> bool:
        # Ids on their way may be reasoning too, or open it.
        return self._spent + output - self._outputs >= self._budget and (self._thinking or output > self._outputs)

    def verdicts(self, outputs: Sequence[int], drafts: Sequence[int] = ()) -> list[Verdict]:
        thinking, spent = self._thinking, self._spent
        found = [self._verdict(thinking, spent)]
        for id in drafts:
            thinking, spent = self._after(id, thinking, spent)
            found.append(self._verdict(thinking, spent))
        return found

    def _verdict(self, thinking: bool, spent: int) -> Verdict:
        if not thinking or spent < self._budget:
            return Verdict()
        mask = np.zeros(self._mask_size, dtype=np.uint32)
        mask[self._end // 32] = 1 << (self._end % 32)
        return Verdict(mask.view(np.int32))

    def accept(self, id: int) -> None:
        self._outputs += 1
        self._thinking, self._spent = self._after(id, self._thinking, self._spent)

    def _after(self, id: int, thinking: bool, spent: int) -> tuple[bool, int]:
        """Whether an output belongs to reasoning that goes on, and how many tokens of it are spent."""
        if id == self._end:
            return False, 0
        return thinking or id == self._start, spent + thinking


class Format:
    """The answer follows a grammar."""

    def __init__(self, matcher: Matcher):
        self._matcher = matcher

    def may_act(self, output: int) -> bool:
        return True

    def verdicts(self, outputs: Sequence[int], drafts: Sequence[int] = ()) -> list[Verdict]:
        """Raises RequestError where the grammar cannot go on."""
        found, ahead = [Verdict(self._matcher.mask())], self._matcher.copy()
        for id in drafts:
            try:
                # A mask may admit less than the grammar.
                if not found[-1].allowed[id // 32] >> id % 32 & 1 or not ahead.accept(id):
                    break
                found.append(Verdict(ahead.mask()))
            except RequestError:  # it matters if this is what will be said
                break
        return found

    def accept(self, id: int) -> None:
        with suppress(RequestError):  # the grammar cannot go on, as the next verdict says
            self._matcher.accept(id)


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """What all of them leave."""
    allowed = None
    for verdict in verdicts:
        if verdict.allowed is not None:
            allowed = verdict.allowed if allowed is None else allowed & verdict.allowed
    return Verdict(allowed, tuple(sorted({id for verdict in verdicts for id in verdict.banned})))
