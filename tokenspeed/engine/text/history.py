"""Assistant turns as they were generated, for prompts that send them back.

A client returns a turn as text, and the tokenizer may spell that text otherwise than the model did: `"a", "b"` where
the model chose `"ab"`. Keys, values and states are of the ids that were generated, so the prompt would leave the known
path there. Here the generated ids stand in for the spelled ones, wherever a prompt has the same ids before the turn and
the same turn after them.
"""

import hashlib
import threading
from array import array
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

_TAIL = 8  # ids compared before anything is hashed
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Turn:
    name_space: str
    length: int  # of the prompt
    tail: tuple[int, ...]  # its last ids
    generated: tuple[int, ...]


class TurnHistory:
    """The latest turns, bounded in number and in ids; what is used again stays longer. Any thread may call."""

    def __init__(self, end_ids: Collection[int], max_turns: int = 4096, max_ids: int = 1 << 22):
        """end_ids: the ids that end a turn."""
        self._ends = frozenset(end_ids)
        self._max_turns, self._max_ids = max_turns, max_ids
        self._turns: OrderedDict[tuple[str, bytes], _Turn] = OrderedDict()
        self._ids = 0
        # Where the known prompts of a name space end, ascending, and what their last ids are there.
        self._lengths: dict[str, list[int]] = {}
        self._tails: dict[tuple[str, int], Counter[tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    def store(self, name_space: str, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """A turn that was generated to its end after `prompt`. One that was cut short is no turn to come back."""
        if not generated or generated[-1] not in self._ends or len(generated) > self._max_ids:
            return
        key = name_space, hashlib.blake2b(array("i", prompt), digest_size=_DIGEST_BYTES).digest()
        turn = _Turn(name_space, len(prompt), tuple(prompt[-_TAIL:]), tuple(generated))
        with self._lock:
            self._drop(key)
            self._turns[key] = turn
            self._ids += len(generated)
            place = name_space, turn.length
            if place not in self._tails:
                self._tails[place] = Counter()
                insort(self._lengths.setdefault(name_space, []), turn.length)
            self._tails[place][turn.tail] += 1
            while len(self._turns) > self._max_turns or self._ids > self._max_ids:
                self._drop(next(iter(self._turns)))

    def restore(
        self,
        name_space: str,
        ids: Sequence[int],
        counts: Sequence[int],
        same: Callable[[Sequence[int], Sequence[int]], bool],
    ) -> tuple[list[int], list[int], int]:
        """A prompt with its known turns as they were generated.

        counts: token counts in the prompt, which move with it; same: whether two spellings of a turn, without its end,
        say the same. Returns the ids, the counts and how many turns were put back.
        """
        ids, counts, done = list(ids), list(counts), 0
        with self._lock:
            lengths = list(self._lengths.get(name_space, ()))
        position = hashed = 0  # turns before it are settled; ids that `digest` has seen
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for length in lengths:
            if length >= len(ids):  # which grow where a turn is longer as generated
                break
            if length < position or not self._may_be(name_space, length, ids):
                continue
            digest.update(array("i", ids[hashed:length]))
            hashed = length
            turn = self._find(name_space, digest.digest())
            end = next((i for i in range(length, len(ids)) if ids[i] in self._ends), None) if turn else None
            if end is None:
                continue
            spelled, generated = ids[length:end], list(turn.generated[:-1])
            if spelled != generated:
                if not same(spelled, generated):
                    continue
                ids[length : end + 1] = turn.generated
                moved = len(generated) - len(spelled)
                counts = [count + moved if count > end else count for count in counts if not length < count <= end]
                done += 1
            position = length + len(generated) + 1
        return ids, counts, done

    def clear(self) -> None:
        with self._lock:
            self._turns.clear()
            self._lengths.clear()
            self._tails.clear()
            self._ids = 0

    def _may_be(self, name_space: str, length: int, ids: list[int]) -> bool:
        """Whether a known prompt ends like these ids at this length."""
        tails = self._tails.get((name_space, length))  # None: forgotten meanwhile
        return tails is not None and tuple(ids[max(length - _TAIL, 0) : length]) in tails

    def _find(self, name_space: str, digest: bytes) -> _Turn | None:
        key = name_space, digest
        with self._lock:
            if key in self._turns:
                self._turns.move_to_end(key)
            return self._turns.get(key)

    def _drop(self, key: tuple[str, bytes]) -> None:
        turn = self._turns.pop(key, None)
        if turn is None:
            return
        self._ids -= len(turn.generated)
        place = turn.name_space, turn.length
        tails, lengths = self._tails[place], self._lengths[turn.name_space]
        tails[turn.tail] -= 1
        if not tails[turn.tail]:
            del tails[turn.tail]
        if not tails:
            del self._tails[place], lengths[bisect_left(lengths, turn.length)]
        if not lengths:
            del self._lengths[turn.name_space]
