"""One measurement: requests of one shape, a number of them at once, timed token by token."""

import copy
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from ..core import Sink, Update
from ..llm import LLM
from ..request import Acceptance, Request, SamplingParams
from .drive import drive
from .spread import Spread


@dataclass(frozen=True, slots=True)
class Case:
    """Lengths in tokens. prefix_tokens: first tokens of a prompt that all have in common; requests, warm_up: how many
    are counted, and how many run before them."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    prefix_tokens: int
    requests: int
    warm_up: int

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens} + {self.output_tokens} tokens, {self.concurrency} at once"


@dataclass(frozen=True, slots=True)
class Measured:
    """Times in milliseconds. ttft: from submission to the first token; itl: between two steps that brought tokens of a
    request, one or several each; tpot: of a request, from its first tokens to its last over the tokens behind the
    first; tok_s: over the time from the first submission to the last token; hit_rate: of the prompt tokens, how many
    the prefix cache had; drafts: how they fared."""

    case: Case
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    output_tok_s: float
    total_tok_s: float
    hit_rate: float
    drafts: Acceptance

    def as_dict(self) -> dict:
        figures = {"output_tok_s": self.output_tok_s, "total_tok_s": self.total_tok_s, "hit_rate": self.hit_rate}
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            figures[name] = getattr(self, name)._asdict()
        drafts = asdict(self.drafts) | {"ids_a_step": self.drafts.ids_a_step}
        return asdict(self.case) | figures | {"drafts": drafts}

    @staticmethod
    def heading() -> str:
        units = (
            "tokens",
            "tokens",
            "",
            "ms p50",
            "ms p99",
            "ms p50",
            "ms p50",
            "ms p99",
            "tok/s",
            "tok/s",
            "%",
            "tokens",
            "% by position",
        )
        names = (
            "prompt",
            "output",
            "at once",
            "TTFT",
            "TTFT",
            "TPOT",
            "ITL",
            "ITL",
            "output",
            "in all",
            "cached",
            "a step",
            "drafts right",
        )
        return "\n".join("".join(f"{text:>9}" for text in line[:-1]) + f"  {line[-1]}" for line in (names, units))

    def row(self) -> str:
        c = self.case
        times = (self.ttft_ms.p50, self.ttft_ms.p99, self.tpot_ms.p50, self.itl_ms.p50, self.itl_ms.p99)
        return (
            f"{c.prompt_tokens:9d}{c.output_tokens:9d}{c.concurrency:9d}"
            + "".join(f"{value:9.2f}" for value in times)
            + f"{self.output_tok_s:9.1f}{self.total_tok_s:9.1f}{100 * self.hit_rate:9.1f}"
            + f"{self.drafts.ids_a_step:9.2f}  "
            + (" ".join(f"{100 * rate:.0f}" for rate in self.drafts.rates) or "-")
        )


@dataclass(slots=True)
class _Timed:
    """When a request's tokens came, in seconds of a monotonic clock, and how many each time."""

    submitted: float
    steps: list[tuple[float, int]] = field(default_factory=list)
    cached: int = 0

    def take(self, update: Update) -> None:
        if update.reuse:
            self.cached = update.reuse.cached_tokens
        if update.ids:
            self.steps.append((time.perf_counter(), len(update.ids)))

    @property
    def generated(self) -> int:
        return sum(count for _, count in self.steps)

    @property
    def tpot(self) -> float | None:
        """Seconds; None where everything came at once."""
        (first, at_first), (last, _) = self.steps[0], self.steps[-1]
        rest = self.generated - at_first
        return (last - first) / rest if rest else None


def measure(
    llm: LLM, case: Case, vary: random.Random, progress: Callable[[int], object] = lambda done: None
) -> Measured:
    """Run a case on an empty prefix cache. vary: source of the prompts' random ids; progress: told of each request."""
    llm.engine.cache.clear("")
    prefix = _ids(llm, case.prefix_tokens, vary)
    _run(llm, case, prefix, case.warm_up, vary, progress)
    before = copy.deepcopy(llm.engine.acceptance)
    timed = _run(llm, case, prefix, case.requests, vary, progress)
    gaps = [b - a for t in timed for (a, _), (b, _) in itertools.pairwise(t.steps)]
    wall = max(t.steps[-1][0] for t in timed) - min(t.submitted for t in timed)
    generated, prompts = sum(t.generated for t in timed), case.prompt_tokens * len(timed)
    return Measured(
        case,
        Spread.of([1e3 * (t.steps[0][0] - t.submitted) for t in timed]),
        Spread.of([1e3 * tpot for t in timed if (tpot := t.tpot) is not None]),
        Spread.of([1e3 * gap for gap in gaps]),
        generated / wall,
        (generated + prompts) / wall,
        sum(t.cached for t in timed) / prompts,
        llm.engine.acceptance.since(before),
    )


def _ids(llm: LLM, count: int, vary: random.Random) -> list[int]:
    return [vary.randrange(llm.engine.vocabulary) for _ in range(count)]


def _run(
    llm: LLM, case: Case, prefix: list[int], count: int, vary: random.Random, progress: Callable[[int], object]
) -> list[_Timed]:
    params = SamplingParams(temperature=0, max_tokens=case.output_tokens, ignore_eos=True)
    timed: list[_Timed] = []

    def work() -> Iterator[tuple[Request, Sink, None]]:
        for i in range(count):
            prompt = prefix + _ids(llm, case.prompt_tokens - len(prefix), vary)
            boundaries = {len(prefix), len(prompt) - 1} - {0}
            request = llm.frontend.request(f"bench-{i}", prompt, params, sorted(boundaries))
            own = _Timed(time.perf_counter())
            timed.append(own)

            def take(update: Update, own: _Timed = own) -> None:
                own.take(update)
                if update.finish_reason:
                    progress(1)

            yield request, take, None

    drive(llm.engine, work(), case.concurrency)
    return timed
