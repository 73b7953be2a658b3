"""Load on an endpoint: users who hold conversations, and what their waiting came to."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..request import Acceptance
from .endpoint import Answer, Endpoint
from .spread import Spread
from .workload import GUESS, WORDS, Calibration, UserTurns, text


class Level(NamedTuple):
    """How much is asked: by as many users as `concurrency`, each waiting for answers (closed loop), or at `rate`
    requests a second whatever the answers take (open loop). One of the two."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} req/s"


@dataclass(slots=True)
class Run:
    """A level while it runs. answers: of requests that have ended, in the order of their ends; unsent: turns that a
    failed turn before them left without a history."""

    level: Level
    started: float
    answers: list[Answer] = field(default_factory=list)
    unsent: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in milliseconds, rates per second of the whole run, failed requests' time included. None: nothing to
    measure it by.

    ttft: from when a request was due to its first text; itl: between two events with text of an answer; tpot: of an
    answer, the time from its first text to its end over the tokens generated in it; tok_s_user: 1000 / mean tpot;
    prompt_tokens, output_tokens: means by the endpoint's usage; hit_rate: cached / prompt tokens, of the answers that
    say what was cached; drafts: how they fared meanwhile, by the endpoint's counters, whoever else asked it.
    """

    level: Level
    complete: bool
    seconds: float
    requests: int
    failed: int
    unsent: int
    errors: dict[str, int]
    prompt_tokens: float | None
    output_tokens: float | None
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    tok_s_user: float | None
    output_tok_s: float
    total_tok_s: float
    requests_s: float
    hit_rate: float | None
    drafts: Acceptance | None

    @classmethod
    def of(cls, run: Run, ended: float, complete: bool = True, drafts: Acceptance | None = None) -> "Figures":
        """ended: on the clock of the run's times."""
        good = [answer for answer in run.answers if answer.error is None]
        seconds = ended - run.started
        tpot = [1e3 * (a.last - a.texts[0]) / rest for a in good if (rest := a.generated - a.first_tokens) > 0]
        prompts = [a.prompt_tokens for a in good if a.prompt_tokens is not None]
        told = [a for a in good if a.cached_tokens is not None and a.prompt_tokens]
        output = sum(a.generated for a in good)
        gaps = [1e3 * (b - a) for answer in good for a, b in itertools.pairwise(answer.texts)]
        mean = _mean(tpot)
        return cls(
            level=run.level,
            complete=complete,
            seconds=seconds,
            requests=len(good),
            failed=len(run.answers) - len(good),
            unsent=run.unsent,
            errors=dict(Counter(a.error for a in run.answers if a.error is not None)),
            prompt_tokens=_mean(prompts),
            output_tokens=_mean([a.generated for a in good]),
            ttft_ms=_spread([1e3 * (a.texts[0] - a.asked) for a in good]),
            tpot_ms=_spread(tpot),
            itl_ms=_spread(gaps),
            tok_s_user=1e3 / mean if mean else None,
            output_tok_s=output / seconds if seconds else 0.0,
            total_tok_s=(output + sum(prompts)) / seconds if seconds else 0.0,
            requests_s=len(good) / seconds if seconds else 0.0,
            hit_rate=sum(a.cached_tokens for a in told) / sum(a.prompt_tokens for a in told) if told else None,
            drafts=drafts,
        )

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self) | self.level._asdict()
        del found["level"]
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            spread = getattr(self, name)
            found[name] = spread._asdict() if spread else None
        return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(values) if values else None


class Client:
    """Holds conversations with an endpoint. fields: of every request's body, beside messages and max_tokens;
    None leaves one out."""

    def __init__(self, endpoint: Endpoint, fields: dict[str, Any]):
        self.endpoint = endpoint
        # Usage in every event, where the endpoint knows it: the first text may come with more than one token.
        usual = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        self._fields = {name: value for name, value in (usual | fields).items() if value is not None}

    async def ask(self, messages: list[dict], tokens: int, asked: float | None = None) -> Answer:
        return await self.endpoint.chat(
            self._fields | {"messages": messages, "max_tokens": tokens, "stream": True}, asked
        )

    async def calibrate(self, vary: random.Random) -> tuple[Calibration, Answer]:
        """Tokens of a word and of what the template adds, by the usage of two short requests; they warm up, too.
        The second value is the first answer that failed, or the last one."""
        found = []
        for times in (1, 3):
            words = times * len(WORDS)
            answer = await self.ask([{"role": "user", "content": text(words, vary)}], 1)
            # One token may be without text: a special one, or part of a character.
            if answer.error not in (None, "empty answer") or not answer.prompt_tokens:
                return GUESS, answer
            found.append((words, answer.prompt_tokens))
        (few, small), (many, large) = found
        per_word = (large - small) / (many - few)
        return (Calibration(per_word, small - few * per_word, True) if per_word > 0 else GUESS), answer

    async def closed(
        self, run: Run, conversations: list[UserTurns], tokens: int, done: Callable[[int], object]
    ) -> None:
        """As many users as the level says, each with the next conversation until none is left."""
        waiting = iter(conversations)

        async def user() -> None:
            for conversation in waiting:
                await self._talk(run, conversation, tokens, None, done)

        await _all([user() for _ in range(run.level.concurrency)])

    async def open(
        self,
        run: Run,
        conversations: list[UserTurns],
        tokens: int,
        done: Callable[[int], object],
        vary: random.Random,
    ) -> None:
        """Conversations begin as a Poisson process, so often that their turns make up the level's rate."""
        turns = sum(len(conversation.turns) for conversation in conversations) / len(conversations)

        async def later(conversation: UserTurns, due: float) -> None:
            await asyncio.sleep(due - self.endpoint.clock())
            await self._talk(run, conversation, tokens, due, done)

        due, users = run.started, []
        for conversation in conversations:
            due += vary.expovariate(run.level.rate / turns)
            users.append(later(conversation, due))
        await _all(users)

    async def _talk(
        self,
        run: Run,
        conversation: UserTurns,
        tokens: int,
        due: float | None,
        done: Callable[[int], object],
    ) -> None:
        """One conversation, each turn after the answer to the one before, which is in the history as it came."""
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for number, turn in enumerate(conversation.turns):
            messages.append({"role": "user", "content": turn})
            answer = await self.ask(messages, tokens, due if number == 0 else None)
            run.answers.append(answer)
            left = len(conversation.turns) - number - 1
            if answer.error is not None:
                run.unsent += left
                done(1 + left)
                return
            done(1)
            messages.append(answer.message())


async def _all(work: Sequence) -> None:
    """Run them side by side; however it ends, none runs after it."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
