"""On a CPU ids are told before what follows on them is computed: the MTP head's keys and values, and the drafts."""

import pytest
from lab import Lab, shipped_model
from test_speculation import prompt_of

from tokenspeed.engine.errors import EngineError


def watched(**params) -> tuple[Lab, list[str]]:
    """A request, and in which order its ids were told and followed on."""
    lab, order = Lab(shipped_model(), drafts=3), []
    follow = lab.engine.runner._drafter.follow
    lab.engine.runner._drafter.follow = lambda *args: (order.append("followed"), follow(*args))
    talk = lab.submit(prompt_of("shipped"), **{"max_tokens": 20, "ignore_eos": True} | params)
    take = talk.take
    for generation in lab.engine._requests[talk.request.id]:
        generation.sink = lambda update: (order.append("told"), take(update))
    return lab, order


def test_ids_are_told_before_what_follows_on_them():
    lab, order = watched()
    while not order:
        lab.engine.step()
    assert order == ["told"]
    lab.engine.finish()
    assert order == ["told", "followed"]
    lab.run()
    assert order == ["told", "followed"] * (len(order) // 2), "each before the next"


def test_where_no_step_comes_next_nothing_is_left_to_do():
    lab, order = watched(max_tokens=1)
    lab.run()
    assert order == ["told", "followed"]


def test_a_failure_behind_the_news_ends_the_engine_as_any_other():
    lab, order = watched()
    lab.engine.runner._drafter.follow = lambda *args: 1 / 0
    while not order:
        lab.engine.step()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        lab.engine.finish()
    assert lab.talks[0].errors and lab.talks[0].finished
