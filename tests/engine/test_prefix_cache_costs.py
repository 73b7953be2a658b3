"""How many tokens a prompt costs, and what its request is told about it."""

import pytest
from lab import ENDS, TOLERANCE, Lab, random_model
from scenarios import OPENING, branch, computed_sooner, eviction, mid_page_hit, pending, text

from tokenspeed.engine.schedule.cache import Reason


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


@pytest.mark.parametrize("ends", [(), ENDS], ids=["length", "end token"])
def test_a_linear_turn_computes_its_new_tokens_and_the_last_of_the_answer(model, ends):
    lab = Lab(model)
    history = lab.ask(text(1, 90), max_tokens=60, stop_token_ids=ends, temperature=1.0).history()
    for turn in range(3):
        stopped = lab.talks[-1].reasons[0] == "stop"
        assert stopped == bool(ends)
        talk = lab.ask(history + text(10 + turn, 17), max_tokens=60, stop_token_ids=ends, temperature=1.0)
        assert lab.tokens_computed(talk) == 17 + 1
        history = talk.history()


def test_the_second_user_of_a_system_prompt_computes_only_what_is_his(model):
    for tokens in (64, 65, 100, 128):
        lab = Lab(model)
        system = text(tokens, tokens)
        lab.ask(system + text(1, 30), [tokens])
        talk = lab.ask(system + text(2, 21), [tokens])
        assert talk.reuse.cached_tokens == tokens and lab.tokens_computed(talk) == 21


def test_after_dropped_reasoning_recompute_starts_where_it_was_dropped(model):
    lab = Lab(model)
    question = text(1, 110)
    end = len(question) + len(OPENING)
    talk = lab.ask(question + OPENING, [len(question), end], max_tokens=30, ignore_eos=True)
    rest = talk.outputs[0][20:] + text(2, 15)
    following = lab.ask(question + OPENING + rest, [end])
    assert following.reuse.cached_tokens == end and lab.tokens_computed(following) == len(rest)
    assert lab.difference() <= TOLERANCE


@pytest.mark.parametrize("count", [64, 65, 150])
def test_the_same_prompt_again_costs_one_token(model, count):
    lab = Lab(model)
    lab.ask(text(1, count))
    talk = lab.ask(text(1, count))
    assert lab.tokens_computed(talk) == 1 and talk.reuse.reason == "WHOLE_PROMPT_KNOWN"


def test_what_a_preempted_sequence_computed_is_not_computed_again_where_memory_keeps_it(model):
    lab = Lab(model, pages=8)
    talks = [lab.submit(text(i, 58), [], max_tokens=75) for i in range(3)]
    lab.run()
    (given_way,) = (talk.sequences[0] for talk in talks if talk.sequences[0].preemptions)
    first, second = lab.admissions[given_way.id]
    assert second.match.state_tokens == lab.ends[given_way.id][0] > first.match.state_tokens
    assert len({end for _, end in lab.computed[given_way.id]}) == len(lab.computed[given_way.id])


def test_waiting_for_anothers_state_is_bounded_and_then_says_so(model):
    lab = Lab(model, max_num_batched_tokens=100, limits={"wait_steps": 2})  # chunks of 64 leave room for the second
    system = text(1, 500)
    lab.submit(system + text(2, 20), [500])
    lab.engine.step()  # it is on the device before the second arrives
    second = lab.submit(system + text(3, 20), [500])
    lab.run()
    assert second.sequences[0].waited == 2 and second.reuse.reason == "PENDING"
    assert second.reuse.cached_tokens == 0 and lab.difference() <= TOLERANCE


def tight_memory(model) -> Lab:
    lab = Lab(model, pages=3, slots=4)
    history = text(1, 129)
    lab.ask(history, [], max_tokens=1)
    lab.ask([*history, 5], [], max_tokens=1)  # fills the page further
    lab.ask([*history, 6, 7], [], max_tokens=1)
    return lab


def whole_prompt(model) -> Lab:
    lab = Lab(model)
    for logprobs in (None, None, 0):
        lab.ask(text(1, 100), prompt_logprobs=logprobs)
    return lab


def switched_off(model) -> Lab:
    lab = Lab(model, enabled=False)
    lab.ask(text(1, 100))
    return lab


def gives_up_waiting(model) -> Lab:
    lab = Lab(model, max_num_batched_tokens=64, limits={"wait_steps": 0})
    for user in (2, 3):
        lab.submit(text(1, 200) + text(user, 20), [200])
    lab.run()
    return lab


def test_every_reason_is_told_to_its_request_with_numbers_that_agree(model):
    told = set()
    for scenario in (
        mid_page_hit,
        branch,
        eviction,
        pending,
        gives_up_waiting,
        tight_memory,
        whole_prompt,
        switched_off,
        computed_sooner,
    ):
        for talk in scenario(model).talks:
            reuse = talk.reuse
            told.add(reuse.reason)
            assert reuse.recomputed_tokens == reuse.kv_tokens - reuse.cached_tokens >= 0
            assert reuse.cached_tokens < len(talk.request.prompt) and reuse.kv_tokens <= reuse.known_tokens
            words = str(reuse)
            assert f"{reuse.cached_tokens} resumed" in words and reuse.reason.lower().replace("_", " ") in words
    assert told == set(Reason.__members__)
