"""Planted bugs of several tokens a step: wrong functions in the place of right ones, and what must fail with them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

import mtp_oracle
import pytest
import scenarios
import test_drafting as drafting
import torch
from checkpoints import Shape
from lab import TOLERANCE, Lab, shipped_model, shipped_tokenizer
from planting import Bug, must_be_noticed, noticed
from test_speculation import load, prompt_of

from tokenspeed import ops
from tokenspeed.engine.executor import drafting as engine_drafting
from tokenspeed.engine.executor.batch import Tables
from tokenspeed.engine.executor.drafting import LookupDrafter, MtpDrafter
from tokenspeed.engine.executor.runner import Launched, Runner
from tokenspeed.engine.executor.sampling import Sampler
from tokenspeed.engine.text.constraints import Format
from tokenspeed.engine.text.grammar import json_object

DRAFTS = 3
SAMPLED = {"temperature": 2.5, "seed": 3}
FREQUENCY = {"temperature": 2.0, "frequency_penalty": 2.0, "seed": 6}
SCORED = {"temperature": 1.0, "logprobs": 1, "n": 2, "seed": 13}
WORDS = {"temperature": 1.0, "bad_words": ["the", "is", "call"], "seed": 14}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A dense model with a random head."""
    return load(mtp_oracle.write_checkpoint(tmp_path_factory.mktemp("dense"), Shape(), 5).directory)


def what_is_said(drafts: int, **params) -> tuple:
    """By the shipped model, and how many ids a step it took."""
    lab, scores = Lab(shipped_model(), drafts=drafts), []
    talk = lab.submit(prompt_of("shipped"), [], **{"max_tokens": 40, "ignore_eos": True} | params)
    for generation in lab.engine._requests[talk.request.id]:
        take = generation.sink
        generation.sink = lambda update, take=take: (scores.append((update.index, update.scores)), take(update))
    lab.run()
    by_id = [[score for i, found in scores if i == child for score in found] for child in range(len(talk.outputs))]
    return talk.outputs, [(s.ids, [round(x, 3) for x in s.logprobs]) for found in by_id for s in found]


@pytest.fixture(scope="module")
def right():
    """What is said without drafts and without bugs, by the names of the cases."""
    cases = {"sampled": SAMPLED, "frequency": FREQUENCY, "scored": SCORED, "words": WORDS}
    return {name: (params, what_is_said(0, **params)) for name, params in cases.items()}


class Planted:
    """Each method puts a bug into the engine or the model; its annotation says what notices: a scenario of the cache,
    or a case of what is said."""

    def noise_by_step(self, patch, model) -> "sampled":  # noqa: F821
        draw, steps = Sampler.draw, count()
        patch.setattr(Sampler, "draw", lambda s, x, i, output, *rest: draw(s, x, i, output * 0 + next(steps), *rest))

    def drafts_are_taken_unseen(self, patch, model) -> "sampled":  # noqa: F821
        accept = ops.accept_tokens

        def wrong(chosen, tokens, *rest):
            return accept(chosen, torch.cat([tokens[:, :1], chosen[:, :-1]], 1), *rest)

        patch.setattr(ops, "accept_tokens", wrong)

    def penalties_count_rejected_drafts(self, patch, model) -> "frequency":  # noqa: F821
        counted = Sampler.count
        patch.setattr(Sampler, "count", lambda s, samples, c, ids, n: counted(s, samples, c, ids, n * 0 + c.width))

    def the_heads_row_of_a_resume_is_anothers(self, patch, model) -> "mid_page_hit":  # noqa: F821
        follow = MtpDrafter._follow_prefill

        def wrong(drafter, rows, *rest):
            first = rows.cu_seqlens[:-1].long()
            follow(drafter, replace(rows, stored=rows.stored.index_fill(0, first, -1)), *rest)

        patch.setattr(MtpDrafter, "_follow_prefill", wrong)

    def a_resume_knows_no_state(self, patch, model) -> "mid_page_hit":  # noqa: F821
        follow = MtpDrafter._follow_prefill

        def wrong(drafter, rows, *rest):
            follow(drafter, replace(rows, read_slot=rows.write_slot), *rest)

        patch.setattr(MtpDrafter, "_follow_prefill", wrong)

    def no_state_is_kept_at_snapshots(self, patch, model) -> "chunks":  # noqa: F821
        follow = MtpDrafter._follow_prefill

        def wrong(drafter, rows, *rest):
            follow(drafter, replace(rows, snapshots=rows.snapshots[:0]), *rest)

        patch.setattr(MtpDrafter, "_follow_prefill", wrong)

    def the_state_of_the_last_draft_is_kept(self, patch, model) -> "long_answer":  # noqa: F821
        follow = MtpDrafter._follow_decode

        def wrong(drafter, rows, hidden, chosen):
            follow(drafter, rows, hidden, chosen._replace(counts=chosen.counts * 0 + chosen.ids.shape[1]))

        patch.setattr(MtpDrafter, "_follow_decode", wrong)

    def the_state_before_a_step_is_kept(self, patch, model) -> "long_answer":  # noqa: F821
        follow = MtpDrafter._follow_decode

        def wrong(drafter, rows, hidden, chosen):
            follow(drafter, rows, hidden, chosen._replace(counts=chosen.counts * 0))

        patch.setattr(MtpDrafter, "_follow_decode", wrong)

    def a_snapshot_gets_its_parents_later_state(self, patch, model) -> "fork_at_a_snapshot":  # noqa: F821
        follow = MtpDrafter._follow_decode

        def wrong(drafter, rows, *rest):
            follow(drafter, rows, *rest)
            drafter._keep(rows.read_slot, drafter._kept(rows.write_slot))

        patch.setattr(MtpDrafter, "_follow_decode", wrong)

    def entries_stand_one_position_on(self, patch, model) -> "long_answer":  # noqa: F821
        paged = engine_drafting.paged
        patch.setattr(engine_drafting, "paged", lambda *arguments: paged(*arguments[:-1], 0))

    def the_empty_first_row_is_read(self, patch, model) -> "long_answer":  # noqa: F821
        patch.setattr(model.mtp.program[3], "first_key", 0)


BUGS = {name: plant.__annotations__["return"] for name, plant in vars(Planted).items() if not name.startswith("_")}


def scenario(model, name: str) -> None:
    assert getattr(scenarios, name)(model, drafts=DRAFTS).difference() <= TOLERANCE


def same(right: dict, name: str) -> None:
    params, said = right[name]
    assert what_is_said(DRAFTS, **params) == said


def guard(model, right: dict, name: str) -> Callable[[], None]:
    return partial(same, right, name) if name in right else partial(scenario, model, name)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(monkeypatch, model, right, bug):
    getattr(Planted(), bug)(monkeypatch, model)
    assert noticed(guard(model, right, BUGS[bug])), f"{BUGS[bug]} does not notice {bug.replace('_', ' ')}"


@pytest.mark.parametrize("by", sorted({*BUGS.values(), "scored", "words"}))
def test_without_them_nothing_is_found(model, right, by):
    guard(model, right, by)()


def test_lines_of_the_runner_that_tell_rows_apart_are_needed(right):
    edited = ">= places[:, None]"
    must_be_noticed(Bug("an edited row takes any draft", Runner.choose, edited, "< 0", not_looking_ahead))
    place = "at += width"
    wrong = "at += len(ids[i])"
    must_be_noticed(Bug("scores of another row", Launched.read, place, wrong, partial(same, right, "scored")))


def not_looking_ahead() -> None:
    """A rule may look ahead less far than drafts go: what it has not seen does not count."""
    said = {}
    for ahead in (0, 3):
        with pytest.MonkeyPatch.context() as patch:
            verdicts = Format.verdicts
            patch.setattr(Format, "verdicts", lambda rule, *args, v=verdicts, n=ahead: v(rule, *args)[: 1 + n])
            lab = Lab(shipped_model(), drafts=3)
            lab.engine.eos_ids = frozenset([shipped_tokenizer().token_to_id("<|im_end|>")])
            talk = lab.submit(prompt_of("shipped"), [], grammar=json_object(), temperature=0.0, max_tokens=40)
            lab.run()
        said[ahead], steps = talk.outputs[0], lab.scheduler.steps
        assert (steps < 35) == bool(ahead)
    assert said[0] == said[3]


def test_a_rule_may_look_ahead_less_far_than_drafts_go():
    not_looking_ahead()


def looked_up() -> None:
    for name in drafting.LOOKED_UP:
        drafting.test_drafts_are(name)


@pytest.mark.parametrize(
    ("code", "instead"),
    [
        ("+ _PATTERN <= last[:, None]", "<= last[:, None] + width"),
        (".amax(1, keepdim=True)", ".amin(1, keepdim=True)"),
        ("torch.where(latest < 0, 0, drafted)", "drafted"),
    ],
)
def test_a_bug_of_looking_up_is_found(code, instead):
    must_be_noticed(Bug("drafts are looked up wrongly", LookupDrafter._look_up, code, instead, looked_up))


def test_drafts_that_a_predecessor_left_at_an_index_change_nothing(monkeypatch, right):
    begin = Tables.begin

    def left(tables, begins):
        begin(tables, begins)
        for each in begins:
            tables.ids[each.index] = torch.arange(1, 1 + tables.ids.shape[1])

    monkeypatch.setattr(Tables, "begin", left)
    for name in ("sampled", "scored"):
        same(right, name)
