"""Random schedules over the hash device: one seed, one engine, ten requests, and what every request must get."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from zlib import crc32

from hash_device import (
    END_THINK,
    EOS,
    POISON,
    THINK,
    VOCAB,
    HashDevice,
    Letters,
    Outcome,
    as_bytes,
    expected,
    finite,
    first_poisoned,
    scores_of,
)

from tokenspeed.engine import core
from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.errors import CorruptedError, RequestError
from tokenspeed.engine.request import Request, SamplingParams, Update
from tokenspeed.engine.schedule import scheduler
from tokenspeed.engine.schedule.cache import CacheConfig, Policy, PrefixCache
from tokenspeed.engine.schedule.scheduler import Leaving, State

MAX_STEPS = 4000  # of a schedule: far more than any needs


@dataclass
class Setting:
    """Sizes of one engine."""

    pages: int = 32
    slots: int = 8
    seqs: int = 4
    batch_tokens: int = 256
    skip_ahead: int = 16
    wait_steps: int = 64
    drafts: tuple[tuple[int, int], ...] = ()
    right: int = 60  # of a hundred drafts
    draft_costs: tuple[tuple[int, float], ...] = ()
    cache: dict = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS

    @classmethod
    def tight(cls, random: Random) -> "Setting":
        """Hardly room for two sequences of which many run, with drafts: somebody always gives way."""
        return cls(
            pages=random.choice([2, 3, 3, 4, 5]),
            slots=random.choice([1, 2, 2, 3, 4]),
            seqs=random.randint(3, 6),
            batch_tokens=random.choice([30, 64, 100, 1000]),
            wait_steps=random.choice([0, 2, 64]),
            drafts=random.choice([((6, 1),), ((6, 3),), ((6, 7),), ((1, 7), (3, 2))]),
            right=random.choice([0, 60, 95]),
            cache={"grid_tokens": random.choice([0, 64]), "policy": random.choice([Policy.VALUE, Policy.LRU])},
        )

    @classmethod
    def random(cls, random: Random) -> "Setting":
        cache = {"grid_tokens": random.choice([0, 0, 64, 128]), "enabled": random.random() < 0.85}
        cache |= {"policy": random.choice([Policy.VALUE, Policy.LRU]), "ghost_nodes": random.choice([0, 8, 64])}
        return cls(
            pages=random.choice([2, 3, 4, 5, 6, 8, 12]),
            slots=random.choice([1, 2, 3, 4, 6, 10]),
            seqs=random.randint(1, 6),
            batch_tokens=random.choice([30, 64, 65, 100, 200, 1000]),
            skip_ahead=random.choice([0, 1, 16]),
            wait_steps=random.choice([0, 2, 64]),
            drafts=random.choice([(), ((6, 1),), ((6, 3),), ((1, 7), (3, 2)), ((2, 3), (4, 1))]),
            right=random.choice([0, 60, 95]),
            cache=cache,
        )


class Bench:
    """An engine over the hash device, and what it said about every continuation."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.device = HashDevice(setting.pages, setting.slots, setting.seqs, setting.tokens, setting.right)
        self.cache = PrefixCache(CacheConfig(pages=setting.pages, slots=setting.slots, **setting.cache))
        limits = scheduler.Limits(
            setting.seqs,
            setting.batch_tokens,
            setting.tokens,
            setting.skip_ahead,
            setting.wait_steps,
            setting.drafts,
            setting.draft_costs,
        )
        self.engine = core.Engine(self.device, self.cache, limits, Letters(), [EOS], validate=True)
        self.device.watch(self.engine.scheduler)
        self.requests: dict[str, Request] = {}
        self.seeds: dict[str, list[int]] = {}
        self.news: dict[tuple[str, int], list[Update]] = {}
        self.aborted: set[str] = set()
        self.events: Counter[str] = Counter()
        self._idle = 0  # steps in a row that launched nothing

    def submit(self, request: Request) -> None:
        # Not before the engine took it: a refused request leaves nothing.
        before = set(self.engine._generations)
        self.engine.submit(request, self._sink)
        self.requests[request.id] = request
        fresh = [self.engine._generations[id].sequence for id in sorted(set(self.engine._generations) - before)]
        self.seeds[request.id] = [sequence.seed for sequence in fresh]
        for child in range(request.params.n):
            self.news[request.id, child] = []

    def _sink(self, update: Update) -> None:
        self.news[update.request_id, update.index].append(update)  # what is raised here, the engine keeps to itself

    def abort(self, id: str) -> bool:
        found = self.engine.abort(id)
        if found:
            self.aborted.add(id)
            self.events["abort"] += 1
        return found

    def step(self) -> None:
        """One step of the engine, and what happened in it."""
        planner = self.engine.scheduler
        preemptions, waiting, steps = planner.preemptions, list(planner.waiting), len(self.device.steps)
        running = {s.id: s.preemptions for s in planner.running}
        sequences = list(planner.running)
        self.engine.step()
        self._idle = 0 if len(self.device.steps) > steps else self._idle + 1
        assert self._idle < 3 and len(self.device.steps) < MAX_STEPS, "no progress"
        self.events["preemption"] += planner.preemptions - preemptions
        for before, step in pairwise(self.device.steps[max(steps - 1, 0) :]):
            self.events["copy"] += len(step.copies)
            if not step.prefill and step.decode == before.decode:
                self.events["same again"] += 1
                self.events["same again with a page"] += bool(step.pages)
            self.events["drafts verified"] += step.width > 1 and bool(step.decode)
            self.events["drafts beside prefill"] += step.width > 1 and bool(step.decode and step.prefill)
            self.events["edit among drafts"] += step.width > 1 and step.edited
            self.events["edited sample"] += any(sample.edited for sample in step.samples)
            self.events["snapshot while prefilling"] += sum(len(row.snapshots) for row in step.prefill)
            self.events["copy-on-write"] += sum(row.read_slot not in (-1, row.write_slot) for row in step.rows)
            self.events["decode beside prefill"] += bool(step.decode and step.prefill)
            sampled = {sample.row for sample in step.samples}
            self.events["prefill cut inside a page"] += any(
                row.end % PAGE_TOKENS and i not in sampled for i, row in enumerate(step.prefill, len(step.decode))
            )
            self.events["skipped stores"] += any(row.kv_tokens > row.start for row in step.prefill)
        admitted = [i for i, s in enumerate(waiting) if s.index >= 0]
        self.events["skip-ahead"] += bool(admitted) and any(s.index < 0 for s in waiting[: admitted[-1]])
        self.events["wait"] += any(s.waited for s in waiting)
        gave_way = [s for s in sequences if s.preemptions > running[s.id]]
        self.events["ended while giving way"] += any(s.leaving is Leaving.FINISHED for s in gave_way)
        self.events["fork without room"] += any(s.child and s.outputs <= 1 and not s.holds_memory for s in gave_way)
        self.events["retiring while launched"] += any(s.state is State.RETIRING for s in planner.running)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.engine.has_work:
            self.step()

    def outcome(self, id: str, child: int = 0) -> Outcome:
        said = self.news[id, child]
        last = said[-1] if said else Update(id, child)
        ids = [i for update in said for i in update.ids]
        return Outcome(ids, "".join(update.text for update in said), last.finish_reason, last.stop_reason)

    def check(self) -> None:
        """Every continuation got what it gets alone, and all memory is back."""
        for id, request in self.requests.items():
            for child, seed in enumerate(self.seeds[id]):
                self._check_continuation(request, child, seed)
                self._check_cached(request, child)
        stats, planner = self.cache.stats(), self.engine.scheduler
        held = ("pages_held", "slots_working", "slots_promised", "slots_draining", "running")
        assert {name: stats[name] for name in held} == dict.fromkeys(held, 0), "memory is missing"
        assert stats["pages_free"] + stats["pages_evictable"] == self.setting.pages
        assert sorted(planner._free) == list(range(self.setting.seqs)), "an index is missing"
        begins = sum(len(step.begins) for step in self.device.steps)
        assert begins <= planner._next_id + planner.preemptions, "a sequence began more often than it gave way"
        assert not planner.running and not planner.waiting and not planner._children
        assert not self.engine._requests and not self.engine._generations
        assert self.cache.check() == ""
        self.events["draft accepted"] += self.device.drafts["right"]
        self.events["draft rejected"] += self.device.drafts["verified"] - self.device.drafts["right"]
        self.events["fork"] += stats["forks"]
        self.events["snapshot consumed"] += stats["snapshots_consumed"]
        self.events["snapshot evicted"] += stats["snapshots_evicted"]
        self.events["no room"] += stats["no_room"]

    def _ends(self, request: Request) -> list[bytes]:
        """What stands before the ends of the continuations that cannot go on."""
        alone = [expected(request, seed, self.setting.tokens) for seed in self.seeds[request.id]]
        return [as_bytes((*request.prompt, *outcome.ids)) for outcome in alone if outcome.reason == "error"]

    def _check_cached(self, request: Request, child: int) -> None:
        """Nobody can find what is not finite."""
        tokens = (*request.prompt, *self.outcome(request.id, child).ids)
        before = first_poisoned(tokens)
        if before is not None:
            self.events["poisoned"] += 1
            match = self.cache.probe(request.name_space, array("i", tokens))
            assert max(match.kv_tokens, match.state_tokens) <= before, f"{request.id}.{child}: published"

    def _check_continuation(self, request: Request, child: int, seed: int) -> None:
        alone, got = expected(request, seed, self.setting.tokens), self.outcome(request.id, child)
        said = self.news[request.id, child]
        ends = [update.finish_reason is not None for update in said]
        assert ends[-1] and sum(ends) == 1, "a continuation never ended, or there was news after its last"
        if got.reason == "error":  # of one continuation, which ends them all
            kinds = {CorruptedError if not finite(history) else RequestError for history in self._ends(request)}
            assert kinds and type(said[-1].error.error) in kinds
            self.events[f"end by {said[-1].error.kind}"] += 1
        if got.reason in ("abort", "error"):
            assert got.reason == "error" or request.id in self.aborted
            assert got.ids == alone.ids[: len(got.ids)] and alone.text.startswith(got.text)
        else:
            assert got == alone, f"{request.id}.{child} got {got}, not {alone}"
            self.events[f"end by {'text' if isinstance(got.stop, str) else got.reason}"] += 1
        params, history = request.params, as_bytes(request.prompt + tuple(got.ids))
        scores, at = [score for update in said for score in update.scores], len(request.prompt)
        if params.logprobs is not None:
            wanted = [scores_of(history[: 4 * (at + i)], id, params.logprobs) for i, id in enumerate(got.ids)]
            assert scores == wanted
        if params.prompt_logprobs is not None and child == 0 and got.ids:
            ids = request.prompt
            wanted = [scores_of(history[: 4 * i], ids[i], params.prompt_logprobs) for i in range(1, len(ids))]
            assert said[0].prompt_scores == wanted
            self.events["prompt scores"] += 1
        if reuse := said[0].reuse:
            self.events["resumed inside a page"] += reuse.cached_tokens % PAGE_TOKENS > 0
            self.events["keys known further than state"] += reuse.recomputed_tokens > 0
        metrics = said[-1].metrics
        self.events["preempted then whole"] += metrics.preemptions > 0 and got.reason != "abort"


def random_params(random: Random, room: int) -> SamplingParams:
    chosen = {"max_tokens": random.choice([1, 2, 5, 20, 70, 100]), "temperature": random.choice([0.0, 1.0, 0.7])}
    if room < 100 and random.random() < 0.3:
        chosen["max_tokens"] = None
    if random.random() < 0.6:
        chosen["seed"] = random.randrange(100)
    if random.random() < 0.5:
        chosen["ignore_eos"] = True
    if random.random() < 0.3:
        chosen["include_stop_str_in_output"] = True
    for name, values in {
        "n": [2, 3, 4],
        "logprobs": [0, 2],
        "prompt_logprobs": [0, 3],
        "presence_penalty": [0.5],
        "repetition_penalty": [1.2],
        "top_k": [5],
        "stop_token_ids": [[9], [9, 11, EOS]],
        "logit_bias": [{5: 1.5}],
        "allowed_token_ids": [[EOS, 9, 10, 11], [17, 18, THINK, END_THINK]],
        "stop": ["9:", [":;", "AB", ";:9"]],
        "bad_words": [["::"], ["AA", "AAB", ";"]],
        "thinking_token_budget": [0, 1, 4],
    }.items():
        if random.random() < (0.35 if name == "n" else 0.15):
            chosen[name] = random.choice(values)
    if random.random() < 0.5 and {"stop", "bad_words", "thinking_token_budget"} & chosen.keys():
        chosen["allowed_token_ids"] = [9, 10, 11, 17, 18, THINK, END_THINK]
    if chosen["max_tokens"]:
        chosen["max_tokens"] = min(chosen["max_tokens"], room)
    if random.random() < 0.2:
        chosen["min_tokens"] = random.randint(0, min(chosen["max_tokens"] or 30, 30))
    return SamplingParams(**chosen)


def random_request(random: Random, number: int, setting: Setting, histories: list[tuple[int, ...]]) -> Request:
    """Half of the prompts begin like one before them, cut anywhere."""
    prompt: tuple[int, ...] = ()
    if histories and random.random() < 0.75:
        prompt = random.choice(histories)
        prompt = prompt[: random.choice([len(prompt), random.randint(0, len(prompt))])]
    fresh = random.choice([0, 1, 3, 30, 63, 64, 65, 130])
    prompt = (prompt + tuple(random.randrange(VOCAB) for _ in range(fresh)))[: setting.tokens - 1] or (1,)
    luck = Random(crc32(as_bytes(prompt)) + number)
    if luck.random() < 0.05:
        at = luck.randrange(len(prompt))
        prompt = (*prompt[:at], *POISON, *prompt[at + 3 :])[: setting.tokens - 1]
    length = len(prompt)
    params = random_params(random, setting.tokens - length)
    if luck.random() < 0.05:
        params = replace(params, allowed_token_ids=POISON)
    if params.n > setting.seqs:
        params = SamplingParams(max_tokens=params.max_tokens)
    boundaries = [random.randint(1, length) for _ in range(random.randint(0, 3))]
    boundaries += [length - 1] * (length > 1) + [length] * (random.random() < 0.3)
    name_space, priority = random.choice(["", "", "", "other"]), random.choice([0, 0, 0, -1, 1])
    return Request(str(number), prompt, params, tuple(sorted(boundaries)), name_space, priority)


def run_schedule(seed: int, requests: int = 10, settings: Callable[[Random], Setting] = Setting.random) -> Bench:
    """One random life of an engine. Raises AssertionError, or what the engine raises, where anything is wrong."""
    random = Random(seed)
    bench = Bench(settings(random))
    histories: list[tuple[int, ...]] = []
    busy = random.choice([0.05, 0.3, 0.9])  # how fast requests arrive
    impatient = random.choice([0, 0, 0.02, 0.1])
    number = 0
    while number < requests or bench.engine.has_work:
        while number < requests and (random.random() < busy or not bench.engine.has_work):
            request = random_request(random, number, bench.setting, histories)
            bench.submit(request)
            histories.append(request.prompt)
            number += 1
        if random.random() < impatient:
            bench.abort(str(random.randrange(number + 1)))
        if bench.engine.has_work:
            bench.step()
        for id in [id for id, child in bench.news if child == 0 and len(histories) < 3 * requests]:
            said = bench.news[id, 0]
            if said and said[-1].finish_reason and random.random() < 0.2:
                histories.append(bench.requests[id].prompt + tuple(bench.outcome(id).ids))
    bench.check()
    return bench
