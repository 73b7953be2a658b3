"""Agent sessions: a shared system prompt with tools, a long first turn, then short ones.

Sessions start within one turn's time of each other; between turns each takes half to one and a half times that.

Some sessions reason, and their reasoning is dropped from the history. At any turn the user may edit the last message
and ask again, or fork the conversation at an earlier turn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from .replay import Turn

VOCABULARY = 248_000
GENERATION_PROMPT = np.arange(4, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Shape:
    sessions: int = 24
    system_prompts: int = 3
    system_tokens: int = 6_000
    first_turn: int = 50_000
    user_tokens: int = 400
    answer_tokens: int = 400
    reasoning_tokens: int = 600
    edits: float = 0.05  # of turns
    forks: float = 0.02  # of turns
    seed: int = 0


@dataclass(slots=True)
class Session:
    system: np.ndarray
    reasons: bool
    turns_left: int
    due: float  # when its next turn comes
    messages: list[np.ndarray] = field(default_factory=list)  # user, answer, user, ... without reasoning


def turns(shape: Shape) -> Iterator[Turn]:
    random = np.random.default_rng(shape.seed)

    def text(tokens: float) -> np.ndarray:
        return random.integers(10, VOCABULARY, max(8, int(tokens * random.uniform(0.5, 1.5))), dtype=np.int32)

    systems = [text(shape.system_tokens) for _ in range(shape.system_prompts)]
    sessions = [
        Session(systems[i % len(systems)], bool(random.integers(2)), int(random.integers(10, 16)), random.random())
        for i in range(shape.sessions)
    ]
    while sessions:
        session = min(sessions, key=lambda session: session.due)
        session.due += random.uniform(0.5, 1.5)
        dice = random.random()
        if session.messages and dice < shape.edits:
            del session.messages[-2:]  # the last question and its answer
        else:
            session.turns_left -= 1
            if len(session.messages) > 2 and dice > 1 - shape.forks:
                turn = 2 * int(random.integers(1, len(session.messages) // 2))
                session = replace(session, messages=session.messages[:turn], turns_left=max(session.turns_left, 1))
                sessions.append(session)
        session.messages.append(text(shape.user_tokens if session.messages else shape.first_turn))
        parts = [session.system, *session.messages]
        ends = np.cumsum([len(part) for part in parts])
        answer = text(shape.answer_tokens)
        output = np.concatenate([text(shape.reasoning_tokens), answer]) if session.reasons else answer
        # A history rendered again begins an answer with the generation prompt too.
        session.messages.append(np.concatenate([GENERATION_PROMPT, answer]))
        prompt = np.concatenate([*parts, GENERATION_PROMPT])
        # What ends in reasoning never comes back: the engine knows, and does not keep that state.
        yield Turn(prompt, (int(ends[0]), int(ends[-2]), int(ends[-1])), output, donate=not session.reasons)
        sessions = [session for session in sessions if session.turns_left > 0]
