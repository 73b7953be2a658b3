"""What a load client asks: conversations of given lengths in tokens, made of words."""

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..errors import RequestError

_COMMON = """
able about above across add after again air all almost along also always among animal answer any area around ask
back base be because before began being below best better between big bird black body book both boy bring build
call came can car carry change children city close cold come could country cut day did different do does dog door
down draw early earth eat end enough even every example eye face fall family far farm father feel few field find
fire first fish five follow food for form found four friend from full game gave get girl give good great green
ground group grow had half hand hard have head hear help here high home horse hour house hundred idea if important
"""
# A text runs through all of them in random order, again and again, so that its tokens are in proportion to its words
# for any tokenizer that splits at spaces.
WORDS = tuple(_COMMON.split())


@dataclass(frozen=True, slots=True)
class Preset:
    """Lengths in tokens. first: of a conversation's first prompt, taken in turn; more: what each later turn adds to the
    answer before it; turns: the fewest and the most; output: of each answer."""

    first: tuple[int, ...]
    more: int
    turns: tuple[int, int]
    output: int

    def scaled(self, scale: float) -> "Preset":
        """Lengths times scale, at least 1; as many turns. Raises RequestError for a scale that is not positive."""
        if not 0 < scale < float("inf"):
            raise RequestError(f"--scale is {scale:g}; it must be above 0.")
        first, (more, output) = tuple(_times(n, scale) for n in self.first), (self.more, self.output)
        return replace(self, first=first, more=_times(more, scale), output=_times(output, scale))


def _times(tokens: int, scale: float) -> int:
    return max(round(tokens * scale), 1)


PRESETS = {
    "agentic": Preset((50_000,), 800, (10, 15), 500),
    "long": Preset((131_072, 262_144, 524_288, 1_000_000), 0, (1, 1), 1024),
    "chat": Preset((500,), 100, (3, 6), 200),
}


class Calibration(NamedTuple):
    """A prompt of n words has about `overhead + n * per_word` tokens. measured: False for a guess."""

    per_word: float
    overhead: float
    measured: bool

    def words(self, tokens: float) -> int:
        """As many words as come nearest to the tokens, at least one."""
        return max(round(tokens / self.per_word), 1)


GUESS = Calibration(1.3, 10.0, False)  # common English words, most tokenizers


@dataclass(frozen=True, slots=True)
class UserTurns:
    """The user's side: a text for each turn. system: what it shares with others, or empty."""

    system: str
    turns: tuple[str, ...]


def make_conversations(
    preset: Preset, count: int, shared: int, calibration: Calibration, vary: random.Random
) -> list[UserTurns]:
    """Conversations that share nothing but a system prompt of `shared` tokens, which is part of the first prompt.
    Raises RequestError where that leaves no token of its own."""
    if not 0 <= shared < min(preset.first):
        raise RequestError(
            f"--prefix-len comes to {shared} tokens; it must be below the shortest first prompt's {min(preset.first)}."
        )
    system = text(calibration.words(shared), vary) if shared else ""
    made = []
    for number in range(count):
        target = preset.first[number % len(preset.first)]
        first = text(calibration.words(target - shared - calibration.overhead), vary)
        later = (text(calibration.words(preset.more), vary) for _ in range(vary.randint(*preset.turns) - 1))
        made.append(UserTurns(system, (first, *later)))
    return made


def text(count: int, vary: random.Random) -> str:
    words: list[str] = []
    while len(words) < count:
        words += vary.sample(WORDS, len(WORDS))
    return " ".join(words[:count])
