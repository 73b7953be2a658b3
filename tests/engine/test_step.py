"""A NextStep is the Step it stands for, told in fewer words."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tokenspeed.engine.batch import DecodeColumns, pack_rows
from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.step import NextStep, Row, Sample, Step

COUNTS = st.integers(0, 200)
# The mutation tests run these too, where making a failure smaller takes longer than all else.
FEW = settings(max_examples=40, deadline=None, phases=[Phase.generate])


@st.composite
def next_steps(draw) -> NextStep:
    indices = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True))
    ahead = draw(st.integers(1, 130))
    around_a_page = st.integers(-1, 1).map(lambda beyond: 4 * PAGE_TOKENS - ahead - 1 + beyond)
    rows, samples = [], []
    for index in indices:
        start, first = draw(st.one_of(COUNTS, around_a_page)), draw(st.integers(0, 9))
        read_slot, write_slot = draw(COUNTS), draw(COUNTS)
        named, pages = draw(st.sampled_from([(), (7,)])), draw(st.sampled_from([(), (5,), (5, 6)]))
        rows.append(Row(named, start, pages, read_slot, write_slot, index, first, draw(st.integers(0, start))))
        samples.append(Sample(len(samples), index, draw(COUNTS), draw(st.integers(-1, 3))))
    growing = draw(st.sets(st.integers(0, len(rows) - 1)))
    more_pages = tuple((i, draw(st.integers(0, 9)), (draw(COUNTS),)) for i in sorted(growing))
    return NextStep(Step(decode=tuple(rows), samples=tuple(samples)), ahead, more_pages)


@FEW
@given(next_steps())
def test_what_it_says_of_itself_is_what_its_rows_say(step):
    whole = step.whole()
    assert (step.rows, step.samples) == (whole.rows, whole.samples)
    for name in ("tokens", "edited", "grown", "published"):
        assert getattr(step, name) == getattr(whole, name), name
    for row, base in zip(whole.decode, step.base.decode, strict=True):
        assert row.tokens == () and row.start == base.start + step.ahead
        assert row.read_slot == row.write_slot == base.write_slot and row.kv_tokens == base.kv_tokens
    assert {whole.decode[i].pages for i, _, _ in step.more_pages} == {pages for _, _, pages in step.more_pages}


@FEW
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 2)), max_size=8), st.data())
def test_columns_are_those_of_the_rows_whatever_was_asked_before(asked, data):
    steps = [data.draw(next_steps()) for _ in range(2)]
    columns = DecodeColumns()
    for which, ahead, padding in asked:
        base = steps[which].base
        step = NextStep(base, ahead) if ahead else base
        found = columns.of(step, len(base.decode) + padding)
        np.testing.assert_array_equal(found, pack_rows(step.whole().decode, len(base.decode) + padding))
        found[:] = 99  # the caller's


@pytest.mark.parametrize("name", ["prefill", "begins", "copies"])
def test_it_has_nothing_else(name):
    step = NextStep(Step(decode=(Row((), 1, (), 0, 0),), samples=(Sample(0, 0, 0),)), 1)
    assert getattr(step, name) == getattr(step.whole(), name) == ()
