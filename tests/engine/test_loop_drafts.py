"""The loop's rules where a step verifies drafts, on a device that knows no tensors and drafts as well as it is told."""

import pytest
from hash_device import expected
from schedules import Bench, Setting
from test_loop import LETTERS, finish, prompt_of, request, reuse_of

from tokenspeed.engine.request import Acceptance
from tokenspeed.engine.schedule.scheduler import drafts_for


@pytest.mark.parametrize(("drafts", "length"), [(((10, 7),), 5), (((4, 7), (7, 5)), 90)])
def test_a_step_holds_no_more_tokens_than_it_may(drafts, length):
    bench = Bench(Setting(seqs=10, pages=64, slots=12, batch_tokens=64, drafts=drafts))
    finish(bench, *(request(str(i), prompt_of(length, i), max_tokens=60) for i in range(12)))
    assert max(step.tokens for step in bench.device.steps) <= 64
    assert max(step.width for step in bench.device.steps) == 8


def test_each_number_of_decoding_sequences_has_its_drafts():
    depths = ((1, 7), (3, 2))
    bench = Bench(Setting(seqs=5, drafts=depths))
    finish(bench, *(request(str(i), prompt_of(20, i), max_tokens=20 * (1 + i)) for i in range(5)))
    shown = set()
    for step in bench.device.steps:
        depth = drafts_for(depths, len(step.decode))
        assert step.drafts == depth and step.width in (1, 1 + depth)
        shown.add((len(step.decode), step.width))
    assert shown >= {(1, 8), (2, 3), (3, 3), (4, 1), (5, 1)}


def test_nothing_is_drafted_behind_last_ids():
    for others, drafts in (((), 0), ((request("b", prompt_of(20, 1), max_tokens=9),), 3)):
        bench = Bench(Setting(drafts=((4, 3),), right=100))
        finish(bench, request("a", prompt_of(20), max_tokens=1), *others)
        assert bench.device.steps[0].drafts == drafts and len(bench.outcome("a").ids) == 1


def test_no_draft_goes_beyond_the_room():
    bench = Bench(Setting(pages=2, slots=1, seqs=1, drafts=((1, 7),), right=100))
    finish(bench, request("a", prompt_of(50), max_tokens=78))
    assert len(bench.outcome("a").ids) == 78 and max(step.width for step in bench.device.steps) == 8


def test_nobody_gives_way_for_the_sake_of_drafts():
    """Both fit a page each, and there are no more; drafts of the first would need another."""
    params = {"max_tokens": 80, "seed": 4}
    ids = expected(request("a", prompt_of(40), **params), 4, 128).ids
    end = next(i for i in range(21, 24) if ids[i] not in ids[:i])
    bench = Bench(Setting(pages=2, slots=2, seqs=2, drafts=((2, 3),), right=100, cache={"enabled": False}))
    one = request("a", prompt_of(40), stop_token_ids=[ids[end]], **params)
    finish(bench, one, request("b", prompt_of(30, 1), max_tokens=34))
    assert len(bench.outcome("a").ids) == end + 1 and max(step.width for step in bench.device.steps) == 4
    assert bench.engine.scheduler.preemptions == 0


def test_drafts_behind_an_answer_take_no_page_that_another_needs():
    """The first ends with its page; what it would say beyond its limit has no page of its own."""
    bench = Bench(Setting(pages=3, slots=2, seqs=2, drafts=((2, 3),), right=100, cache={"enabled": False}))
    finish(bench, request("a", prompt_of(40), max_tokens=24), request("b", prompt_of(41, 1), max_tokens=70))
    assert bench.engine.scheduler.preemptions == 0 and max(step.width for step in bench.device.steps) == 4


@pytest.mark.parametrize("length", range(38, 50))
def test_where_text_ends_among_accepted_ids_nothing_behind_it_is_kept(length):
    """Around the end of a page: ids that the device has consumed behind a stop that the host alone finds."""
    params = LETTERS | {"max_tokens": 60}
    whole = expected(request("a", prompt_of(length), **params), 4, 2048).text
    stop = whole[18:23]
    bench = Bench(Setting(drafts=((4, 7),), right=100))
    bench.submit(request("a", prompt_of(length), stop=[stop], **params))
    (sequence,) = bench.engine.scheduler.waiting
    bench.run()
    bench.check()
    assert list(sequence.tokens) == [*prompt_of(length), *bench.outcome("a").ids], "what was not said"
    history = tuple(sequence.tokens)
    finish(bench, request("b", (*history, 1, 2), max_tokens=3))
    assert reuse_of(bench, "b").known_tokens <= len(history)


@pytest.mark.parametrize("drafts", [(), ((4, 3),)])
def test_each_continuation_of_a_request_is_gone_on_with_where_it_ended(drafts):
    bench = Bench(Setting(drafts=drafts, right=100))
    finish(bench, request("a", prompt_of(70), n=3, temperature=1.0, max_tokens=9))
    for child in range(3):
        history = (*prompt_of(70), *bench.outcome("a", child).ids)
        finish(bench, request(f"b{child}", (*history, 1, 2), max_tokens=2))
        assert reuse_of(bench, f"b{child}").cached_tokens == len(history) - 1


@pytest.mark.parametrize("right", [0, 100])
def test_it_is_counted_how_drafts_fare(right):
    bench = Bench(Setting(drafts=((4, 3),), right=right))
    finish(bench, request("a", prompt_of(20), max_tokens=41))
    found = bench.engine.acceptance
    assert found == bench.news["a", 0][-1].metrics.drafts
    assert found.drafted == [found.steps] * 3 and found.steps > 5
    assert found.accepted == [found.steps * (right > 0)] * 3
    assert found.ids == found.steps * (4 if right else 1)


def test_drafts_are_counted_by_their_place():
    found = Acceptance()
    for drafts, ids in ((1, 2), (3, 2), (3, 4), (3, 1)):
        found.count(drafts, ids)
    assert (found.steps, found.ids) == (4, 9)
    assert (found.drafted, found.accepted) == ([4, 3, 3], [3, 1, 1])


@pytest.mark.parametrize("drafts", [(), ((4, 3),)])
def test_a_bad_word_is_no_beginning_either(drafts):
    params = LETTERS | {"max_tokens": 12}
    begun = expected(request("a", prompt_of(20), **params), 4, 2048).text
    bench = Bench(Setting(drafts=drafts, right=100))
    finish(bench, request("a", prompt_of(20), bad_words=[begun[:2]], **params))
    assert bench.outcome("a").text[:2] != begun[:2] and bench.outcome("a").text[0] == begun[0]
