"""The loop's rules one by one, on a device that knows no tensors."""

from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
from hash_device import EOS, VOCAB, Letters, expected
from schedules import Bench, Setting

from tokenspeed.engine.request import Request, SamplingParams
from tokenspeed.engine.schedule.cache import CacheConfig, PrefixCache
from tokenspeed.engine.schedule.scheduler import Leaving, State

NEVER_ENDS = {"ignore_eos": True, "temperature": 0.0}


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * i + 13 * seed + i * i * (seed + 1)) % VOCAB for i in range(length))


def request(id: str, prompt, *, boundaries=(), priority: int = 0, name_space: str = "", **params) -> Request:
    return Request(id, tuple(prompt), SamplingParams(**NEVER_ENDS | params), tuple(boundaries), name_space, priority)


def finish(bench: Bench, *requests: Request) -> Bench:
    for one in requests:
        bench.submit(one)
    bench.run()
    bench.check()
    return bench


def reuse_of(bench: Bench, id: str):
    return bench.news[id, 0][0].reuse


# ---- what a state is worth


def test_after_an_end_token_the_state_stands_before_it():
    bench = Bench(Setting())
    prompt = next(p for p in map(lambda s: prompt_of(20, s), range(50)) if expected_stop(p) > 3)
    finish(bench, Request("a", prompt, SamplingParams(max_tokens=100)))
    history = prompt + tuple(bench.outcome("a").ids)
    assert history[-1] == EOS
    finish(bench, request("b", (*history, 1, 2), max_tokens=2))
    assert reuse_of(bench, "b").cached_tokens == len(history) - 1


def expected_stop(prompt) -> int:
    outcome = expected(Request("", prompt, SamplingParams(max_tokens=100)), 0, 1000)
    return len(outcome.ids) if outcome.reason == "stop" else 0


def test_after_a_length_stop_the_last_id_was_not_consumed():
    bench = finish(Bench(Setting()), request("a", prompt_of(20), max_tokens=9))
    history = prompt_of(20) + tuple(bench.outcome("a").ids)
    finish(bench, request("b", (*history, 1, 2), max_tokens=2))
    assert reuse_of(bench, "b").cached_tokens == len(history) - 1


@pytest.mark.parametrize("held", [True, False])
def test_an_end_that_will_not_come_back_is_kept_only_with_what_makes_it_come_back(held):
    prompt = prompt_of(70)
    ids = finish(Bench(Setting()), request("a", prompt, max_tokens=9)).outcome("a").ids
    others = set(range(VOCAB)) - set(ids)
    bench = Bench(Setting())
    kept = replace(
        request("a", prompt, boundaries=(66,), max_tokens=9), snapshot_token_id=ids[4] if held else min(others)
    )
    finish(bench, kept, request("b", prompt_of(9, 1), max_tokens=2))
    finish(bench, request("c", (*prompt, *ids, 1, 2), max_tokens=2))
    assert reuse_of(bench, "c").cached_tokens == (len(prompt) + 8 if held else 66)


def test_a_turn_that_comes_with_the_last_news_of_the_one_before_resumes_from_its_end():
    prompt = prompt_of(70)
    ids = finish(Bench(Setting()), request("a", prompt, max_tokens=9)).outcome("a").ids
    bench = Bench(Setting())
    bench.submit(request("a", prompt, max_tokens=9, stop_token_ids=[ids[6]]))
    while not bench.outcome("a").reason:
        bench.step()
    said = bench.outcome("a").ids
    assert len(said) < 9
    assert any(s.state is State.RETIRING for s in bench.engine.scheduler.running), "a launched Step holds it"
    finish(bench, request("b", (*prompt, *said, 1, 2), max_tokens=2))
    assert reuse_of(bench, "b").cached_tokens == len(prompt) + len(said) - 1


def test_who_gives_way_keeps_its_state_whatever_will_come_back():
    bench, donated = Bench(Setting(pages=4, seqs=2)), []
    finish_in_cache = bench.cache.finish
    bench.cache.finish = lambda *args, donate: donated.append(donate) or finish_in_cache(*args, donate=donate)
    finish(
        bench, *(replace(request(str(i), prompt_of(60, i), max_tokens=120), snapshot_token_id=VOCAB) for i in range(2))
    )
    assert sum(donated) == bench.engine.scheduler.preemptions > 0 and len(donated) == sum(donated) + 2


def test_an_aborted_request_leaves_what_was_published_and_no_state_of_its_own():
    bench = Bench(Setting())
    bench.submit(request("a", prompt_of(130), max_tokens=100, boundaries=[100]))
    while len(bench.news["a", 0]) < 5:
        bench.step()
    bench.abort("a")
    bench.run()
    bench.check()
    assert bench.cache.stats()["snapshots_donated"] == 0
    finish(bench, request("b", prompt_of(130), max_tokens=1))
    assert reuse_of(bench, "b").cached_tokens == 100


def test_one_snapshot_serves_a_second_request_that_goes_on_differently_inside_its_page():
    bench = finish(Bench(Setting()), request("a", prompt_of(100), max_tokens=30, boundaries=[90]))
    finish(bench, request("b", (*prompt_of(90), *prompt_of(60, 1)), max_tokens=3))
    assert reuse_of(bench, "b").cached_tokens == 90
    assert any(copy[2] == 90 % 64 for step in bench.device.steps for copy in step.copies)


# ---- who goes when


def test_a_request_waits_for_a_state_that_another_is_writing_and_says_for_how_long():
    bench = Bench(Setting(batch_tokens=64))
    one, two = (request(id, (*prompt_of(300), n), max_tokens=2, boundaries=[299]) for n, id in enumerate("ab"))
    finish(bench, one, two)
    assert bench.news["b", 0][-1].metrics.waited_steps > 0
    assert reuse_of(bench, "b").cached_tokens == 299


def test_waiting_is_bounded():
    bench = Bench(Setting(batch_tokens=100, wait_steps=2))
    finish(bench, *(request(id, (*prompt_of(900), n), max_tokens=2, boundaries=[899]) for n, id in enumerate("ab")))
    assert bench.news["b", 0][-1].metrics.waited_steps == 2
    assert reuse_of(bench, "b").cached_tokens < 899


def test_a_request_that_needs_all_logits_waits_for_no_state():
    bench = Bench(Setting(batch_tokens=100))
    one = request("a", (*prompt_of(300), 1), max_tokens=2, boundaries=[299])
    finish(bench, one, request("b", (*prompt_of(300), 2), max_tokens=2, prompt_logprobs=0))
    assert bench.news["b", 0][-1].metrics.waited_steps == 0


def test_decoding_does_not_starve_a_prompt_however_small_the_steps():
    bench = Bench(Setting(seqs=3, batch_tokens=64))
    bench.submit(request("a", prompt_of(10), max_tokens=500))
    while not bench.news["a", 0]:
        bench.step()
    bench.submit(request("b", prompt_of(200, 1), max_tokens=1))
    before = len(bench.device.steps)
    while not bench.news["b", 0]:
        bench.step()
    assert len(bench.device.steps) - before < 10, "a prompt of 200 tokens needs a few steps"
    bench.run()
    bench.check()


def test_decode_goes_on_while_a_long_prompt_is_prefilled():
    bench = Bench(Setting(seqs=2, batch_tokens=100))
    bench.submit(request("a", prompt_of(10), max_tokens=60))
    while not bench.news["a", 0]:
        bench.step()
    bench.submit(request("b", prompt_of(900, 1), max_tokens=1))
    said = []
    while not bench.news["b", 0]:
        said.append(len(bench.news["a", 0]))
        bench.step()
    assert all(later == sooner + 1 for sooner, later in pairwise(said[1:]))


def test_a_short_prompt_does_not_wait_until_a_long_one_has_ended():
    bench = Bench(Setting(seqs=3, batch_tokens=256, pages=64))
    bench.submit(request("long", prompt_of(2000), max_tokens=1))
    bench.step()
    for number, id in enumerate("ab"):
        bench.submit(request(id, prompt_of(100, 1 + number), max_tokens=1))
    while not (bench.news["a", 0] and bench.news["b", 0]):
        bench.step()
    assert not bench.news["long", 0] and len(bench.device.steps) < 6
    bench.run()
    bench.check()
    longest = [max(len(row.tokens) for row in step.prefill) for step in bench.device.steps if step.prefill]
    assert min(longest[:-1]) >= 128 and longest.count(256) >= 5, "half of a step at least, all of it when alone"


def test_a_step_holds_no_more_tokens_than_it_may():
    for most in (64, 256):  # of which the second is shared by several prompts
        bench = Bench(Setting(seqs=4, batch_tokens=most, pages=64))
        finish(bench, *(request(str(i), prompt_of(3 * most + i, i), max_tokens=40) for i in range(8)))
        assert max(step.tokens for step in bench.device.steps) <= most


@pytest.mark.parametrize("drafts", [(), ((4, 3),)])
def test_where_the_same_go_on_a_step_is_the_one_before_but_for_pages(drafts):
    bench = Bench(Setting(drafts=drafts))
    finish(bench, *(request(str(i), prompt_of(20 + i, i), max_tokens=100) for i in range(3)))
    pairs = list(pairwise(bench.device.steps))
    again = [step for before, step in pairs if step == replace(before, pages=step.pages) and not step.prefill]
    assert len(again) > len(bench.device.steps) - 15
    assert sum(len(step.pages) for step in again) >= 3, "pages are asked for on the way"


def test_a_request_that_comes_while_others_decode_is_prefilled_in_the_next_step():
    bench = Bench(Setting())
    bench.submit(request("a", prompt_of(20), max_tokens=100))
    for _ in range(10):
        bench.step()
    bench.submit(request("b", prompt_of(30, 1), max_tokens=3))
    bench.step()
    assert bench.device.steps[-1].prefill and bench.device.steps[-1].decode


def test_one_that_got_no_page_while_another_was_leaving_is_asked_again_in_the_next_step():
    bench = Bench(Setting())
    for id, length in (("a", 10), ("b", 60), ("c", 20)):
        bench.submit(request(id, prompt_of(length, length), max_tokens=100))
    while len(bench.news["b", 0]) < 3:
        bench.step()
    _, short, leaving = bench.engine.scheduler.running
    full = PrefixCache(CacheConfig(pages=1, slots=1))
    _, no_room = (full.admit(i, "", array("i", range(i, 20)), ()) for i in range(2))
    extend = bench.cache.extend

    def refuse_once(id, count):
        if id != short.id or bench.engine.scheduler.steps > refused_at:
            return extend(id, count)
        bench.engine.scheduler.end(leaving, Leaving.FINISHED)
        return no_room

    bench.cache.extend, refused_at = refuse_once, short.last_step + 65 - short.launched
    while bench.engine.scheduler.steps <= refused_at:
        bench.step()
    assert short.last_step < refused_at, "it was refused"
    bench.step()
    assert short.last_step == refused_at + 1 and leaving.state is State.ENDED


def test_one_whose_outputs_are_enough_is_not_gone_on_with():
    bench = finish(Bench(Setting()), *(request(str(i), prompt_of(20, i), max_tokens=10 + i) for i in range(3)))
    assert sum(len(step.decode) for step in bench.device.steps) == sum(10 + i - 1 for i in range(3))


def test_chunks_are_cut_at_whole_pages():
    bench = finish(Bench(Setting(seqs=1, batch_tokens=100)), request("a", prompt_of(500), max_tokens=2))
    ends = [row.end for step in bench.device.steps for row in step.prefill]
    assert ends == [64, 128, 192, 256, 320, 384, 448, 500]


def test_lower_priority_numbers_go_first_and_arrival_breaks_ties():
    bench = Bench(Setting(seqs=1))
    finish(bench, *(request(id, prompt_of(9, i), max_tokens=1, priority=p) for i, (id, p) in enumerate(ORDER.items())))
    assert sorted(ORDER, key=first_step(bench).get) == ["c", "a", "b", "e", "d"]


ORDER = {"a": 0, "b": 0, "c": -1, "d": 5, "e": 0}


def first_step(bench: Bench) -> dict[str, int]:
    """The Step in which each request's first id was sampled."""
    prompts = {one.prompt[: len(one.prompt)]: id for id, one in bench.requests.items()}
    found = {}
    for number, step in enumerate(bench.device.steps):
        for row in step.prefill:
            for prompt, id in prompts.items():
                if row.logits and row.tokens and prompt[row.start :] == row.tokens:
                    found.setdefault(id, number)
    return found


def test_one_that_does_not_fit_is_passed_a_bounded_number_of_times():
    setting = Setting(pages=8, seqs=4, skip_ahead=3, cache={"enabled": False})
    bench = Bench(setting)
    bench.submit(request("first", prompt_of(64), max_tokens=100))
    bench.step()
    bench.submit(request("big", prompt_of(64 * 7, 1), max_tokens=1))
    for i in range(10):
        bench.submit(request(str(i), prompt_of(5, 2 + i), max_tokens=120))
    bench.run()
    bench.check()
    order = first_step(bench)
    passed = [i for i in range(10) if order[str(i)] < order["big"]]
    assert passed == [0, 1, 2]


def test_the_youngest_gives_way_and_never_the_oldest():
    bench = Bench(Setting(pages=6, slots=6, seqs=3, cache={"enabled": False}))
    finish(bench, *(request(str(i), prompt_of(60, i), max_tokens=150) for i in range(3)))
    preemptions = [bench.news[str(i), 0][-1].metrics.preemptions for i in range(3)]
    assert preemptions[0] == 0 and preemptions[2] > 0


def test_a_request_of_several_continuations_is_prefilled_once():
    bench = finish(Bench(Setting(seqs=4)), request("a", prompt_of(200), n=4, temperature=1.0, max_tokens=5))
    assert sum(len(row.tokens) for step in bench.device.steps for row in step.prefill) == 200
    assert len({tuple(bench.outcome("a", child).ids) for child in range(4)}) == 4
    assert len(set(bench.seeds["a"])) == 4


# ---- ends


def test_aborting_at_any_moment_gives_everything_back_once_the_device_is_done():
    for moment in range(12):
        bench = Bench(Setting(seqs=4, batch_tokens=64))
        bench.submit(request("a", prompt_of(150), n=3, max_tokens=20))
        bench.submit(request("b", prompt_of(90, 1), max_tokens=20))
        for _ in range(moment):
            bench.step()
        assert bench.abort("a")
        assert not bench.abort("a"), "twice is harmless"
        held = bench.cache.stats()["pages_held"]
        launched = any(s.request.id == "a" for s in bench.engine.scheduler.running)
        assert not launched or held > 0, "its memory was freed under a launched Step"
        bench.run()
        bench.check()


def test_aborting_what_never_was_or_is_done_says_so():
    bench = finish(Bench(Setting()), request("a", prompt_of(9), max_tokens=2))
    assert not bench.abort("a") and not bench.abort("nobody")


LETTERS = {"allowed_token_ids": [9, 10, 11], "temperature": 1.0, "seed": 4}  # "9", ":" and ";"


def text_of(**params) -> tuple[str, object]:
    bench = finish(Bench(Setting()), request("a", prompt_of(20), **LETTERS | {"max_tokens": 60} | params))
    outcome = bench.outcome("a")
    return outcome.text, outcome.stop


def test_a_stop_string_ends_the_text_before_it_or_after_it_when_asked():
    whole, _ = text_of()
    stop = whole[20:24]
    cut = whole.index(stop)
    assert text_of(stop=[stop]) == (whole[:cut], stop)
    assert text_of(stop=[stop], include_stop_str_in_output=True) == (whole[: cut + 4], stop)


def test_nothing_ends_before_min_tokens():
    whole, _ = text_of()
    assert text_of(stop=[whole[3:5]], min_tokens=30)[0][:29] == whole[:29]
    bench = Bench(Setting())
    finish(bench, Request("a", prompt_of(5), SamplingParams(max_tokens=50, min_tokens=50, stop_token_ids=[9])))
    assert len(bench.outcome("a").ids) == 50 and not {EOS, 9} & set(bench.outcome("a").ids[:49])


def test_a_stop_string_counts_that_only_begins_in_the_first_min_tokens():
    """As in vLLM: what ends with the last of them does not. A token is a character here."""
    whole, _ = text_of()
    for begin in range(14, 22):
        stop = whole[begin : begin + 9]
        assert whole.count(stop) == 1
        text, found = text_of(stop=[stop], min_tokens=26)
        assert (text, found) == ((whole[:begin], stop) if begin + 9 > 26 else (whole, None))


def test_a_stop_id_is_named_and_its_text_left_out_unless_asked_for():
    whole, _ = text_of()
    stop = Letters().encode(whole[8])[0]
    first = whole.index(whole[8])
    assert text_of(stop_token_ids=[stop]) == (whole[:first], stop)
    assert text_of(stop_token_ids=[stop], include_stop_str_in_output=True) == (whole[: first + 1], stop)


def test_a_stop_id_that_completes_a_stop_string_says_no_text_twice():
    whole, _ = text_of()
    cut = next(i for i in range(60) if whole[i] != whole[0])
    last = Letters().encode(whole[cut])[0]
    params = {"stop": [whole[cut - 1 : cut + 1]], "stop_token_ids": [last], "include_stop_str_in_output": True}
    assert text_of(**params) == (whole[: cut + 1], last)


def test_half_a_character_at_the_end_is_told():
    bench = Bench(Setting())
    bench.engine.tokenizer = HalfCharacters()
    bench.submit(request("a", prompt_of(20), max_tokens=1))
    bench.run()
    assert bench.outcome("a").text == "\ufffd"


class HalfCharacters(Letters):
    def token_bytes(self, id: int) -> bytes:
        return b"\xc3"


@pytest.mark.parametrize("max_tokens", [None, 43])
def test_a_sequence_may_fill_the_context_to_its_last_token(max_tokens):
    bench = finish(Bench(Setting(pages=1, slots=1, seqs=1)), request("a", prompt_of(21), max_tokens=max_tokens))
    assert len(bench.outcome("a").ids) == 43


def test_one_of_low_priority_is_overtaken_for_a_while_and_no_longer():
    bench = Bench(Setting(seqs=1))
    bench.submit(request("running", prompt_of(9), max_tokens=2))
    bench.step()
    bench.submit(request("patient", prompt_of(9, 1), max_tokens=1, priority=1))
    hasty = 0
    while not bench.news["patient", 0]:  # there is always one of higher priority that waits
        if hasty == 0 or bench.news[f"hasty {hasty - 1}", 0]:
            bench.submit(request(f"hasty {hasty}", prompt_of(9, 2 + hasty), max_tokens=1))
            hasty += 1
        bench.step()
    assert 60 <= hasty <= 66
    bench.run()
    bench.check()


def test_thousands_of_requests_are_queued_in_order_of_arrival():
    bench = Bench(Setting(seqs=1))
    for i in range(3000):
        bench.submit(request(str(i), (i % VOCAB, i // VOCAB), max_tokens=1))
    waiting = bench.engine.scheduler.waiting
    assert [s.request.id for s in waiting] == [str(i) for i in range(3000)]
