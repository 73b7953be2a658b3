"""Decode steps of which pieces replay: whatever chooses the ids, the rest of a step is captured, and says the same."""

import pytest
import torch
from lab import Lab, shipped_model
from rerun_graphs import RerunGraphs
from test_speculation import ASKED, FORMATS, SHIPPED, in_formats, load, prompt_of, shipped_tokenizer

from tokenspeed.engine.executor import draft_costs as measuring
from tokenspeed.engine.executor.draft_costs import draft_costs
from tokenspeed.engine.request import Acceptance

DRAFTS = 3


def captured(lab: Lab) -> RerunGraphs:
    """The lab's decode steps replay from now on."""
    lab.runner.graphs = RerunGraphs(lab.runner, lambda sequences: (0, DRAFTS))
    return lab.runner.graphs


def said(lab: Lab, **asked: dict) -> tuple[list, Acceptance]:
    """And how drafts fared: a wrong draft changes no text."""
    talks = [lab.submit(prompt_of("shipped"), [], **{"max_tokens": 25} | params) for params in asked.values()]
    lab.run()
    return [(talk.outputs, talk.reasons) for talk in talks], lab.engine.acceptance


@pytest.mark.parametrize("mtp", [True, False], ids=["head", "looked up"])
def test_what_is_said_is_what_is_said_step_by_step(mtp):
    """Some of ASKED choose by a graph and some cannot; with two at a time, beside each other and beside prompts."""
    answers = []
    for graphs in (False, True):
        lab = Lab(load(SHIPPED, mtp=mtp), drafts=DRAFTS, max_seqs=3)
        replayed = captured(lab).replayed if graphs else []
        answers.append(said(lab, **ASKED))
        assert lab.engine.acceptance.ids_a_step > 1.3 or not mtp
    assert answers[0] == answers[1]
    assert ["forward", "choose", f"follow {DRAFTS}"] in replayed and ["forward", f"follow {DRAFTS}"] in replayed


def test_formats_are_spoken_as_step_by_step(monkeypatch):
    without, alone = in_formats(shipped_model(), drafts=DRAFTS)
    made, run = [], Lab.run
    monkeypatch.setattr(Lab, "run", lambda lab: (made.append(captured(lab)), run(lab)))
    found, lab = in_formats(shipped_model(), drafts=DRAFTS)
    assert found == without and lab.engine.acceptance == alone.engine.acceptance
    assert ["forward", f"follow {DRAFTS}"] in made[0].replayed, "the host has a say in the ids, and the rest replays"


EDITED = {"grammar": FORMATS[3][0], "temperature": 0.0}
CASES = {
    "plain": ({"temperature": 0.0}, ["forward", "choose", f"follow {DRAFTS}"]),
    "edited": (EDITED, ["forward", f"follow {DRAFTS}"]),
    "penalised": ({"temperature": 0.0, "frequency_penalty": 0.5}, ["forward", f"follow {DRAFTS}"]),
    "scored": ({"temperature": 0.0, "logprobs": 1}, ["forward", f"follow {DRAFTS}"]),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_follows_on_a_decode_step_but_by_a_graph(name):
    """Also behind last ids, where nothing is drafted."""
    params, expected = CASES[name]
    lab = Lab(shipped_model(), drafts=DRAFTS)
    lab.engine.eos_ids = frozenset([shipped_tokenizer().token_to_id("<|im_end|>")])
    replayed = captured(lab).replayed
    for _ in range(2):
        lab.submit(prompt_of("shipped"), [], **{"max_tokens": 9} | params)
    lab.run()
    last = [*expected[:-1], "follow 0"]
    assert {tuple(step) for step in replayed} == {tuple(expected), tuple(last)}


def test_what_nothing_captured_is_done_without_padding():
    """Three sequences in rows for four: another number of drafts, and as if the pieces behind a forward pass were no
    graphs at all."""
    answers = []
    for pieces in (None, "all", "no follow"):
        lab = Lab(shipped_model(), drafts=DRAFTS, limits={"drafts": ((2, 2), (4, DRAFTS))})
        graphs = captured(lab) if pieces else None
        for found in graphs._captured.values() if pieces == "no follow" else ():
            found.follow.clear()
        answers.append(said(lab, **{name: ASKED[name] | {"max_tokens": 60} for name in ("greedy", "sampled", "cut")}))
        if pieces:
            behind = [f"follow {DRAFTS}"] if pieces == "all" else []
            assert graphs.replayed[0] == ["forward", "choose", *behind] and [] in graphs.replayed, "rows of 3 tokens"
    assert answers[0] == answers[1] == answers[2]


def test_a_model_that_drafts_nothing_has_no_graphs_of_what_follows():
    lab = Lab(load(SHIPPED, mtp=False))
    lab.runner.graphs = RerunGraphs(lab.runner, lambda sequences: ())
    said(lab, one={"temperature": 0.0})
    assert {tuple(step) for step in lab.runner.graphs.replayed} == {("forward", "choose")}


def test_what_drafts_cost_is_measured_and_leaves_nothing_behind(monkeypatch):
    """By a clock that knows how many drafts a step makes, and rows."""
    lab = Lab(shipped_model(), drafts=DRAFTS, slots=3, max_seqs=4)
    graphs = captured(lab)

    def timed(work, device, *times) -> float:
        work()
        (forward, choose, follow), width = graphs.replayed[-1], lab.runner.tables.length.max().item()
        assert (forward, choose) == ("forward", "choose") and width > 1, "real rows ran"
        return {"follow 0": 10.0, f"follow {DRAFTS}": 21.3}[follow]

    monkeypatch.setattr(measuring, "microseconds", timed)
    assert draft_costs(lab.runner, lambda sequences: DRAFTS) == ((1, 2.15), (2, 2.15))  # 4 sequences have no 3 slots
    fresh = Lab(shipped_model(), drafts=DRAFTS, slots=3, max_seqs=4)
    for name in ("pages", "ids", "stops", "capacity", "length", "left", "prompt", "min_tokens"):
        assert torch.equal(getattr(lab.runner.tables, name), getattr(fresh.runner.tables, name)), name
    several = {str(seed): {"seed": seed, "max_tokens": 12} for seed in range(4)}
    assert said(lab, **several) == said(fresh, **several)
    assert draft_costs(fresh.runner, lambda sequences: DRAFTS) == () == draft_costs(lab.runner, lambda sequences: 0)
