"""Assistant turns as they were generated, for prompts that send them back.

A client returns a turn as text, and the tokenizer may spell that text otherwise than the model did: `"a", "b"` where
the model chose `"ab"`. Keys, values and states are of the ids that were generated, so the prompt would leave the known
path there. Here the generated ids stand in for the spelled ones, wherever a prompt has the same ids before the turn and
the same turn after them.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

_TAIL = 8  # ids compared before anything is hashed


@dataclass(frozen=True, slots=True)
class _Turn:
    length: int  # of the prompt
    tail: tuple[int, ...]  # its last ids
    digest: bytes  # of all of it
    generated: tuple[int, ...]


class TurnHistory:
    """The latest turns, bounded in number and in ids; what is used again stays longer. Any thread may call."""

    def __init__(self, end_ids: Collection[int], most_turns: int = 4096, most_ids: int = 1 << 22):
        """end_ids: the ids that end a turn."""
        self._ends = frozenset(end_ids)
        self._most_turns, self._most_ids = most_turns, most_ids
        self._turns: OrderedDict[tuple[str, bytes], _Turn] = OrderedDict()
        self._ids = 0
        self._lock = threading.Lock()

    def store(self, name_space: str, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """A turn that was generated to its end after `prompt`. One that was cut short is no turn to come back."""
        if not generated or generated[-1] not in self._ends or len(generated) > self._most_ids:
            return
        digest = _digest(prompt)
        turn = _Turn(len(prompt), tuple(prompt[-_TAIL:]), digest, tuple(generated))
        with self._lock:
            self._drop((name_space, digest))
            self._turns[name_space, digest] = turn
            self._ids += len(generated)
            while len(self._turns) > self._most_turns or self._ids > self._most_ids:
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
        tails: dict[int, set[tuple[int, ...]]] = {}  # of the known prompts, by their length
        with self._lock:
            for (space, _), turn in self._turns.items():
                if space == name_space:
                    tails.setdefault(turn.length, set()).add(turn.tail)
        position = 0  # turns before it are settled
        for length in sorted(tails):
            if not position <= length < len(ids) or tuple(ids[max(length - _TAIL, 0) : length]) not in tails[length]:
                continue
            turn = self._find(name_space, ids[:length])
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
            self._ids = 0

    def _find(self, name_space: str, prompt: list[int]) -> _Turn | None:
        key = (name_space, _digest(prompt))
        with self._lock:
            if key in self._turns:
                self._turns.move_to_end(key)
            return self._turns.get(key)

    def _drop(self, key: tuple[str, bytes]) -> None:
        turn = self._turns.pop(key, None)
        self._ids -= len(turn.generated) if turn else 0


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("i", ids).tobytes(), digest_size=16).digest()
