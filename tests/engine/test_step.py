"""The checker of Steps finds what a Step must not do, rule by rule."""

from dataclasses import replace

import pytest

from tokenspeed.engine.schedule.step import Begin, DecodeRow, NewPages, PrefillRow, Sample, Step, StepChecker

BEGINS = tuple(Begin(i, 0.0, 0, 1.0, 0.0, 0) for i in range(2))
FIRST = Step(
    prefill=(PrefillRow((1,) * 60, 0, 0, 0, index=0), PrefillRow((1,) * 70, 0, 1, 1, index=1, snapshots=((64, 2),))),
    begins=BEGINS,
    pages=(NewPages(0, 0, (0,)), NewPages(1, 0, (1, 2))),
    samples=(Sample(0, 0), Sample(1, 1)),
)
NEXT = Step(decode=(DecodeRow(0, 0, 0), DecodeRow(1, 1, 1)), width=4, samples=(Sample(0, 0), Sample(1, 1)), drafts=3)


def checker(*steps: Step, counts=(1, 1)) -> StepChecker:
    """One that has seen these Steps launched and read."""
    made = StepChecker(pages=6, slots=4)
    for step in (FIRST, *steps):
        made.check(step)
        made.read(step, counts)
    return made


def test_what_keeps_the_rules_passes():
    made = checker(NEXT)
    assert made.upper == made.lower == {0: 61, 1: 71}


def test_bounds_follow_what_is_launched_and_tighten_with_what_is_read():
    made = StepChecker(pages=6, slots=4)
    made.check(FIRST)
    made.check(NEXT)
    assert (made.lower[1], made.upper[1]) == (70, 74)
    made.check(with_page(3))
    assert (made.lower[1], made.upper[1]) == (70, 78)
    made.read(FIRST, (1, 1))
    made.read(NEXT, (2, 4))
    assert (made.lower[1], made.upper[1], made.lower[0], made.upper[0]) == (74, 78, 62, 66)


def with_page(page: int) -> Step:
    return replace(NEXT, pages=(NewPages(0, 1, (page,)),))


BROKEN = {
    "an index has two rows": replace(NEXT, decode=(DecodeRow(0, 0, 0), DecodeRow(0, 1, 1))),
    "need more than": replace(NEXT, width=6),
    "are missing": replace(NEXT, pages=(NewPages(0, 2, (3,)),)),
    "two rows write one page": replace(with_page(3), pages=(NewPages(0, 1, (2,)), NewPages(1, 1, (2,)))),
    "written by one row and read by another": replace(NEXT, pages=(NewPages(1, 0, (0, 2)),)),
    "two writes to one slot": replace(NEXT, decode=(DecodeRow(0, 0, 1), DecodeRow(1, 1, 1))),
    "a slot is written by one row": replace(NEXT, decode=(DecodeRow(0, 1, 0), DecodeRow(1, 0, 1))),
    "a slot is out of range": replace(NEXT, decode=(DecodeRow(0, 0, 4), DecodeRow(1, 1, 1))),
    "a page is out of range": replace(with_page(6), width=6),
    "a page is copied to twice": replace(NEXT, copies=((0, 4, 3), (1, 4, 3))),
    "a copy reads what another": replace(NEXT, copies=((0, 4, 3), (4, 5, 3))),
    "has no sample of its own": replace(NEXT, samples=(Sample(1, 1), Sample(0, 0))),
    "which is no prefill row": replace(NEXT, samples=(*NEXT.samples, Sample(2, 3))),
    "goes on from nowhere": replace(NEXT, decode=(DecodeRow(3, 0, 0),), samples=(Sample(0, 3),)),
    "goes on at": Step(prefill=(PrefillRow((1,), 62, 0, 0),)),
    "a prefill row without tokens": Step(prefill=(PrefillRow((), 60, 0, 0),)),
    "snapshots outside the row": Step(prefill=(PrefillRow((1,), 60, 0, 0, snapshots=((60, 3),)),)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named(rule):
    with pytest.raises(AssertionError, match=rule):
        checker().check(BROKEN[rule])


def test_more_ids_than_a_row_can_have_are_found():
    made = checker()
    made.check(NEXT)
    with pytest.raises(AssertionError, match="got 5 ids of at most 4"):
        made.read(NEXT, (1, 5))
    made = StepChecker(pages=6, slots=4)
    made.check(FIRST)
    with pytest.raises(AssertionError, match="got 2 ids of at most 1"):
        made.read(FIRST, (2, 1))
