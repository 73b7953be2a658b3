"""What went to host memory and came back computes what was never away: logits, fp32, through all that can happen."""

from collections import Counter
from random import Random

import pytest
from lab import TOLERANCE, Lab, Talk, random_model, shipped_model
from lives import live
from scenarios import text

from tokenspeed.engine.errors import CapacityError, ConfigError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.scheduler import State


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


def away(model, **settings) -> tuple[Lab, Talk]:
    """A conversation that the device has let go, while host memory has it."""
    lab = Lab(model, **{"pages": 10, "slots": 3, "host_pages": 40, "host_slots": 8} | settings)
    first = lab.ask(text(1, 200), max_tokens=20)
    for seed in range(2, 6):
        lab.settle()
        lab.ask(text(seed, 190), max_tokens=4)
    assert lab.cache.probe("", lab.runner and int32(first.history())).state_tokens > 200
    return lab, first


def int32(ids):
    import numpy as np

    return np.array(ids, np.int32)


def test_a_conversation_comes_back_from_host_memory(model):
    lab, first = away(model)
    computed_before = lab.stats()["moved_in"]
    again = lab.ask([*first.history(), *text(9, 30)])
    assert again.reuse.moved_tokens > 200 and again.reuse.cached_tokens >= 200
    assert lab.tokens_computed(again) == len(again.request.prompt) - again.reuse.cached_tokens < 40
    assert "from host memory" in str(again.reuse)
    assert lab.stats()["moved_in"] == computed_before + 1 and lab.difference() <= TOLERANCE
