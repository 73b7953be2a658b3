"""Drafts where they bring more than they cost: at every rate at which they are right a token takes about as long as
with drafts always or never, whichever is better, by a clock of known costs."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from schedules import Bench, Setting, run_schedule
from test_loop import finish, prompt_of, request

from tokenspeed.engine.schedule.drafting import Drafting, Fortune
from tokenspeed.engine.schedule.step import Step

COSTS = [(3, 2.2), (3, 1.3), (3, 2.6), (1, 1.5)]  # drafts, and how many times a step without one takes that makes them
NEVER = 1e9


def took(cost: float, width: int, drafts: int) -> float:
    """A step, in those without drafts: verifying and drafting each take half of what drafts cost."""
    return 1 + (cost - 1) * ((width > 1) + (drafts > 0)) / 2


def time_a_token(drafts: int, cost: float, right: Callable[[int], float], tokens: int, length: int = 1 << 30) -> float:
    """Of one sequence after another, each of so many tokens. right: how likely a draft is right, by the tokens so far.
    What a step brought is known when the step behind the next is planned."""
    random, drafting, time, said = Random(1), Drafting(((1, cost),)), 0.0, 0
    while said < tokens:
        fortune, news, made, number, end = Fortune(), [], True, 0, min(said + length, tokens)
        drafting.pays([], drafts)  # while its prompt is prefilled
        while said < end:
            if len(news) > 1 and (known := news.pop(0)):
                fortune.note(*known)
            width = 1 + drafts * made
            made, agreed = drafting.pays([fortune], drafts), 0
            while agreed < width - 1 and random.random() < right(said):
                agreed += 1
            news.append((number, agreed / drafts) if width > 1 else None)
            time, said, number = time + took(cost, width, drafts * made), said + 1 + agreed, number + 1
    return time / said


def best(drafts: int, cost: float, rate: float) -> float:
    return min(1.0, cost / sum(rate**k for k in range(1 + drafts)))


@pytest.mark.parametrize("length", [200, 1 << 30], ids=["answers of 200 tokens", "one text"])
@pytest.mark.parametrize(("drafts", "cost"), COSTS)
def test_a_token_takes_about_as_long_as_with_drafts_always_or_never(drafts, cost, length):
    for rate in (k / 20 for k in range(21)):
        found = time_a_token(drafts, cost, lambda said, rate=rate: rate, 8000, length)
        assert found <= 1.05 * best(drafts, cost, rate), f"{rate} of the drafts are right"


@pytest.mark.parametrize(("drafts", "cost"), COSTS)
def test_a_change_of_text_is_followed(drafts, cost):
    """From one kind of text to the other and back, 500 tokens each: half of what is lost by not following is lost."""
    low, high = 0.05, 0.9
    found = time_a_token(drafts, cost, lambda said: (low, high)[said // 500 % 2], 8000)
    always, never = cost / sum(low**k for k in range(1 + drafts)), 1.0
    good = (best(drafts, cost, low) + best(drafts, cost, high)) / 2
    one_way = min((always + best(drafts, cost, high)) / 2, never)
    assert found < (good + one_way) / 2


def steps_of(right: int, cost: float, tokens: int = 600) -> list[Step]:
    """Of one answer of the whole engine."""
    bench = Bench(Setting(drafts=((4, 3),), right=right, draft_costs=((4, cost),)))
    finish(bench, request("a", prompt_of(20), max_tokens=tokens, ignore_eos=True))
    return [step for step in bench.device.steps if step.decode]


@pytest.mark.parametrize("right", [0, 40, 100])
def test_the_engine_drafts_where_it_pays(right):
    def time(cost: float) -> float:
        return sum(took(2.2, step.width, step.drafts) for step in steps_of(right, cost))

    assert time(2.2) <= 1.05 * min(time(0.0), time(NEVER))


def test_drafts_are_verified_by_the_next_step_and_no_other():
    steps = steps_of(30, 2.2)
    assert {(a.drafts, b.width) for a, b in pairwise(steps)} == {(0, 1), (3, 4)}
    assert sum(step.drafts > 0 for step in steps) < len(steps) / 4


def test_what_others_said_does_not_show():
    """The same request behind texts of all kinds has the same steps."""
    found = []
    for before in (None, 0, 100):
        bench = Bench(Setting(drafts=((4, 3),), draft_costs=((4, 2.2),), cache={"enabled": False}))
        if before is not None:
            bench.device.right = before
            finish(bench, request("before", prompt_of(30, 1), max_tokens=150, ignore_eos=True))
        bench.device.right, start = 50, len(bench.device.steps)
        finish(bench, request("a", prompt_of(20), max_tokens=200, ignore_eos=True, seed=3))
        found.append([(step.width, step.drafts) for step in bench.device.steps[start:] if step.decode])
    assert found[0] == found[1] == found[2] and len(set(found[0])) > 2


def test_a_batch_drafts_where_all_together_gain():
    bench = Bench(Setting(drafts=((4, 3),), draft_costs=((1, NEVER), (4, 1.5)), right=100))
    finish(bench, *(request(str(i), prompt_of(20, i), max_tokens=60 * (1 + i), ignore_eos=True) for i in range(2)))
    shown = {(len(step.decode), step.drafts) for step in bench.device.steps if step.decode}
    assert {(2, 3), (1, 0)} <= shown and bench.engine.stats()["steps_without_drafts"] > 20


def test_who_begins_behind_anothers_prompt_has_no_drafts_that_could_be_wrong():
    bench = Bench(Setting(drafts=((4, 3),), draft_costs=((4, 2.6),), right=100))
    finish(bench, request("a", prompt_of(20), n=4, max_tokens=60, ignore_eos=True))
    assert bench.device.drafts["right"] > 0 and bench.engine.stats()["steps_without_drafts"] == 0


@pytest.mark.thinned(4, "seed")
@pytest.mark.parametrize("seed", range(16))
def test_random_lives_whose_drafts_come_and_go(seed):
    def setting(random: Random) -> Setting:
        made = Setting.random(random)
        made.drafts, made.draft_costs = ((3, 3), (6, 1)), ((1, 2.0), (6, random.choice([1.2, 2.0])))
        return made

    run_schedule(seed, settings=setting)


def test_more_sequences_than_were_timed_cost_what_the_most_did():
    drafting = Drafting(((1, 2.0), (4, 3.0)))
    wrong = Fortune(share=0.1)
    assert not drafting.pays([wrong] * 9, 3)
    assert drafting.pays([Fortune(share=0.9)] * 9, 3)
    assert Drafting(()).pays([wrong] * 9, 3), "nothing was timed"
