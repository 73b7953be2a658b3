"""Logits with the cache equal logits without it, fp32, whatever happened to the prefix; a damaged snapshot shows."""

from collections import Counter
from random import Random

import pytest
from lab import TOLERANCE, Lab, random_model, shipped_model
from lives import live
from scenarios import SCENARIOS, append_or_copy, chunks, consumed, copy_on_write, fork, text

FEW = (append_or_copy, chunks, consumed, copy_on_write, fork)
RING = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


def named(scenario) -> str:
    return scenario.__name__


@pytest.mark.parametrize("scenario", SCENARIOS, ids=named)
def test_cached_logits_are_the_uncached_ones(model, scenario):
    assert scenario(model, ring_rows=RING).difference() <= TOLERANCE


@pytest.mark.parametrize("scenario", FEW, ids=named)
def test_cached_logits_of_the_shipped_model_are_the_uncached_ones(scenario):
    assert scenario(shipped_model()).difference() <= TOLERANCE


@pytest.mark.parametrize("max_num_batched_tokens", [5, 64, 100, 1000])
def test_the_size_of_a_step_changes_nothing(model, max_num_batched_tokens):
    assert copy_on_write(model, max_num_batched_tokens=max_num_batched_tokens).difference() <= TOLERANCE


# --- random lives ----------------------------------------------------------------------------------------------------


def events(lab: Lab) -> Counter:
    stats, found = lab.stats(), [a for admissions in lab.admissions.values() for a in admissions]
    names = ("snapshots_evicted", "pages_evicted", "forks", "snapshots_consumed", "page_copies", "aborted")
    return Counter(
        {name: stats[name] for name in (*names, "pages_appended_in_place", "no_room")}
        | {
            "hits inside a page": sum(a.match.state_tokens % 64 > 0 for a in found),
            "copies on write": sum(a.read_slot >= 0 and a.read_slot != a.write_slot for a in found),
            "state behind keys": sum(0 < a.match.state_tokens < a.match.kv_tokens for a in found),
            "ends resumed": sum(a.match.state_tokens in ends for a in found for ends in lab.ends.values()),
            "preemptions": lab.scheduler.preemptions,
            "waits": sum(sequence.waited > 0 for talk in lab.talks for sequence in talk.sequences),
        }
    )


def random_settings(seed: int) -> dict:
    random = Random(seed)
    return {
        "pages": random.choice([8, 10, 14, 64]),
        "slots": random.choice([1, 2, 3, 6, 24]),
        "max_seqs": random.choice([3, 4, 6]),
        "max_num_batched_tokens": random.choice([7, 33, 64, 100, 256, 1000]),
        "ring_rows": random.choice([0, RING]),
        "grid_tokens": random.choice([0, 50]),
    }


def test_random_lives_compute_what_they_would_without_a_cache(model):
    total = Counter()
    for seed in range(6):
        lab = Lab(model, **random_settings(seed))
        live(lab, seed, turns=10)
        assert lab.difference() <= TOLERANCE, f"seed {seed}: {random_settings(seed)}"
        total += events(lab)
    missing = [event for event in events(lab) if not total[event]]
    assert not missing, f"{missing} never happened"


def test_random_lives_of_the_shipped_model_too():
    for seed in (3, 4):
        lab = Lab(shipped_model(), **random_settings(seed))
        live(lab, seed, turns=6)
        assert lab.difference() <= TOLERANCE and lab.stats()["snapshot_hits"] > 0


def test_switched_off_every_prompt_is_computed_whole(model):
    lab = Lab(model, enabled=False)
    live(lab, 5, turns=6)
    assert lab.difference() <= TOLERANCE
    assert {admission.match.reason.name for found in lab.admissions.values() for admission in found} == {"DISABLED"}
    again = lab.ask(list(lab.talks[0].request.prompt), [])
    assert lab.tokens_computed(again) == len(again.request.prompt) and again.reuse.cached_tokens == 0
    stats = lab.stats()
    assert stats["pages_free"] == 64 and stats["slots_free"] == 16


# --- damage ----------------------------------------------------------------------------------------------------------


def first_layer(lab: Lab):
    """The states of the first Gated DeltaNet layer."""
    return lab.memory.layers[0]


def damage_state(lab, admission):
    first_layer(lab).state[admission.read_slot, 0] += 0.05


def damage_ring(lab, admission):
    """An update that is not there, in a state that says it has yet to be folded."""
    first_layer(lab).ring[admission.read_slot] = 0.05
    first_layer(lab).cursor[admission.read_slot] -= 1


def damage_cursor(lab, admission):
    """The ring holds nothing: whoever reads it reads poison."""
    first_layer(lab).cursor[admission.read_slot] -= 1


def damage_window(lab, admission):
    first_layer(lab).window[admission.read_slot, (admission.match.state_tokens - 1) % 4] += 0.5


def damage_whole_page(lab, admission):
    lab.memory.kv[admission.pages[0], 0, 1, :, 17] += 0.5


def damage_partial_page(lab, admission):
    source = admission.copies[0][0] if admission.copies else admission.pages[1]
    lab.memory.kv[source, 0, 0, :, admission.match.state_tokens % 64 - 1] += 0.5


DAMAGES = (damage_state, damage_ring, damage_cursor, damage_window, damage_whole_page, damage_partial_page)


@pytest.mark.parametrize("damage", [None, *DAMAGES], ids=lambda damage: getattr(damage, "__name__", "intact"))
def test_a_damaged_snapshot_shows_in_the_logits(model, damage):
    lab = Lab(model, ring_rows=RING)
    history = lab.ask(text(1, 85), [], max_tokens=6).history()
    resumed = []

    def tamper(sequence, admission):
        resumed.append(admission.match.state_tokens)
        if damage:
            damage(lab, admission)

    lab.tamper = tamper
    lab.ask(history + text(2, 20), [])
    assert resumed == [len(history) - 1]
    assert (lab.difference() > 10 * TOLERANCE) == (damage is not None)
