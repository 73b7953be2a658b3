"""What went to host memory and came back computes what was never away: logits, fp32, through all that can happen."""

from collections import Counter
from random import Random

import pytest
from lab import TOLERANCE, Lab, random_model, shipped_model
from lives import live
from scenarios import aborted_on_the_way, arriving, computed_sooner, text, there_and_back

from tokenspeed.engine.errors import CapacityError, ConfigError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.schedule.scheduler import State


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


def test_a_conversation_comes_back_from_host_memory(model):
    lab = there_and_back(model, ring_rows=3)
    assert "from host memory" in str(lab.talks[-1].reuse) and lab.difference() <= TOLERANCE


# --- random lives ----------------------------------------------------------------------------------------------------


def events(lab: Lab) -> Counter:
    stats, found = lab.stats(), [a for admissions in lab.admissions.values() for a in admissions]
    names = ("moved_in", "moved_out", "moves_void", "host_evicted", "snapshots_evicted", "forks", "aborted", "no_room")
    return Counter(
        {name: stats[name] for name in names}
        | {
            "back into a snapshot": sum(a.move > 0 and a.read_slot != a.write_slot for a in found),
            "back into the working slot": sum(a.move > 0 and a.read_slot == a.write_slot for a in found),
            "pages that stayed": sum(-(-a.match.state_tokens // 64) for a in found if a.move) - stats["moved_in_pages"],
            "preemptions": lab.scheduler.preemptions,
        }
    )


def random_settings(seed: int) -> dict:
    random = Random(seed)
    return {
        "pages": random.choice([8, 10, 14, 20]),
        "slots": random.choice([2, 3, 4, 6]),
        "host_pages": random.choice([6, 12, 40]),
        "host_slots": random.choice([2, 4, 12]),
        "max_seqs": random.choice([3, 4, 6]),
        "max_num_batched_tokens": random.choice([33, 64, 100, 256]),
        "ring_rows": random.choice([0, 3]),
        "slow_moves": random.choice([0, 1 + seed]),
    }


def nothing_leaks(lab: Lab) -> None:
    """Whatever is held is held by the tree, and goes with it."""
    lab.cache.clear_all()
    stats, config = lab.stats(), lab.cache.config
    assert (stats["host_pages_free"], stats["host_slots_free"]) == (config.host_pages, config.host_slots)
    assert (stats["pages_free"], stats["slots_free"]) == (config.pages, config.slots)


def test_random_lives_over_two_tiers_compute_what_they_would_without_a_cache(model):
    total = Counter()
    for seed in range(5):
        lab = Lab(model, **random_settings(seed))
        live(lab, seed, turns=12)
        assert lab.difference() <= TOLERANCE, f"seed {seed}: {random_settings(seed)}"
        total += events(lab)
        nothing_leaks(lab)
    missing = [event for event in events(lab) if not total[event]]
    assert not missing, f"{missing} never happened in {total}"


@pytest.mark.parametrize("drafts", [0, 3])
def test_random_lives_of_the_shipped_model_too_with_drafts(drafts):
    moved = 0
    for seed in (3, 4):
        lab = Lab(shipped_model(), **random_settings(seed), drafts=drafts)
        live(lab, seed, turns=6)
        assert lab.difference() <= TOLERANCE
        moved += lab.stats()["moved_in"]
        nothing_leaks(lab)
    assert moved > 0


# --- while a move is under way ---------------------------------------------------------------------------------------


def test_others_compute_while_a_conversation_comes_back(model):
    lab, again = arriving(model, pages=20)
    other = lab.submit(text(20, 100), max_tokens=5)
    lab.run(other)
    assert not again.outputs[0]
    lab.let_moves_finish()
    lab.run()
    assert lab.difference() <= TOLERANCE


def test_an_abort_while_it_comes_back_waits_for_the_bytes_and_leaves_nothing(model):
    lab = aborted_on_the_way(model)
    assert lab.difference() <= TOLERANCE
    nothing_leaks(lab)


def test_what_gives_way_while_it_comes_back_comes_again(model):
    lab, again = arriving(model)
    lab.scheduler._preempt(again.sequences[0])
    assert again.sequences[0].state is State.RETIRING
    lab.let_moves_finish()
    lab.run()
    assert again.sequences[0].preemptions == 1 and len(again.outputs[0]) == 8
    assert lab.difference() <= TOLERANCE


def test_a_second_request_waits_for_the_same_unit_rather_than_moving_it_twice(model):
    lab, again = arriving(model, slots=4, pages=20)
    moved = lab.stats()["moved_in"]
    other = lab.submit([*again.request.prompt[:-5], *text(30, 10)])
    lab.engine.step()
    assert other.sequences[0].state is State.WAITING and other.sequences[0].waited > 0
    lab.let_moves_finish()
    lab.run()
    assert lab.stats()["moved_in"] == moved and other.reuse.cached_tokens > 200
    assert lab.difference() <= TOLERANCE


def test_what_is_computed_sooner_is_not_brought_back(model):
    assert computed_sooner(model).difference() <= TOLERANCE


def test_clearing_while_a_unit_comes_back_leaves_nothing(model):
    lab, _ = arriving(model)
    lab.engine.clear_cache()
    lab.let_moves_finish()
    lab.run()
    assert lab.difference() <= TOLERANCE
    lab.settle()
    nothing_leaks(lab)


# --- the engine as it is used ----------------------------------------------------------------------------------------


def test_an_engine_with_host_memory_answers_as_one_without():
    sizes = {"progress": False, "kv_pages": 12, "state_slots": 4, "max_num_seqs": 2, "validate": True, "threads": 1}
    prompts = [f"Tell me about the number {i}. " * 12 for i in range(6)]
    greedy = SamplingParams(temperature=0, max_tokens=8)
    tiered, plain = LLM(**sizes, host_memory=0.3), LLM(**sizes)
    for prompt in [*prompts, *prompts]:
        [own], [other] = tiered.generate([prompt], greedy), plain.generate([prompt], greedy)
        assert own.outputs[0].token_ids == other.outputs[0].token_ids
    stats = tiered.engine.stats()
    assert stats["moved_out"] > 0 and stats["moved_in"] > 0 and stats["host_slots"] > 4
    assert stats["cached_tokens"] > plain.engine.stats()["cached_tokens"]


def test_host_memory_is_checked():
    with pytest.raises(ConfigError, match="host_memory is -1"):
        LLM(progress=False, host_memory=-1)
    with pytest.raises(ConfigError, match="0 where the prefix cache is off"):
        LLM(progress=False, host_memory=1, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="host_memory is 1e-06; it must be 0, or at least"):
        LLM(progress=False, host_memory=1e-6)
    with pytest.raises(CapacityError, match="host tier needs"):
        LLM(progress=False, host_memory=10**6)
