"""Random schedules: whatever else runs, a request gets what it gets alone, and all memory comes back."""

from collections import Counter

import pytest
from schedules import run_schedule

SEEDS = range(100)
EVENTS = """
abort, copy, copy-on-write, decode beside prefill, edited sample, end by CorruptedError, end by RequestError, end by
length, end by stop, end by text, ended while giving way, fork, fork without room, keys known further than state, no
room, preempted then whole, poisoned, preemption, prefill cut inside a page, prompt scores, resumed inside a page,
retiring while launched, same again, same again with a page, skip-ahead, skipped stores, snapshot consumed, snapshot
evicted, snapshot while prefilling, wait
"""


@pytest.fixture(scope="module")
def series():
    """What happened in all of them."""
    events = Counter()
    for seed in SEEDS:
        try:
            events += run_schedule(seed).events
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    return events


def test_each_request_gets_what_it_gets_alone_and_no_memory_is_lost(series):
    assert series["end by length"] + series["end by stop"] + series["end by text"] > 3 * len(SEEDS)


@pytest.mark.parametrize("event", [event.strip() for event in EVENTS.replace("\n", " ").split(",")])
def test_the_schedules_are_about(event, series):
    assert series[event] > 0


def test_equal_calls_give_equal_steps():
    first, second = run_schedule(3), run_schedule(3)
    assert first.device.steps == second.device.steps
