"""The replay that the published hit rates come from, on small generated input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.prefix_cache import agents, trace
from benchmarks.prefix_cache.replay import replay
from tokenspeed.engine.schedule.cache import CacheConfig, Policy


@pytest.fixture(scope="module")
def records():
    """Conversations of a few turns among prompts that never come back."""
    random, fresh, talks, made = np.random.default_rng(3), iter(range(1, 100_000)), [], []
    for _ in range(300):
        if talks and random.random() < 0.5:
            talk = talks[int(random.integers(max(0, len(talks) - 30), len(talks)))]
        else:
            talk = [0]
            talks.append(talk)
        talk += [next(fresh) for _ in range(int(random.integers(1, 9)))]
        made.append(trace.Record(512 * len(talk) + 100, (*talk, next(fresh))))
    return made


def hit_rate(records, slots, policy, branch_points=True):
    config = CacheConfig(pages=60_000, slots=slots, ghost_nodes=60_000, policy=policy, branch_points=branch_points)
    return replay(config, trace.turns(records), len(records), "")


def test_scarce_slots_serve_better_by_value_than_by_recency_and_no_better_than_foresight(records):
    value, lru = hit_rate(records, 12, Policy.VALUE), hit_rate(records, 12, Policy.LRU, branch_points=False)
    assert lru["hit_rate"] < value["hit_rate"] <= trace.clairvoyant(records, 12) <= value["kv_ideal"]
    assert value["stats"]["snapshots_evicted"] > 50


def test_with_slots_for_everything_the_endpoints_reach_nearly_the_ideal(records):
    result = hit_rate(records, 4096, Policy.VALUE)
    assert result["hit_rate"] > 0.95 * result["kv_ideal"] and result["stats"]["snapshots_evicted"] == 0


def test_two_instances_fed_the_same_calls_stay_identical(records):
    assert hit_rate(records, 12, Policy.VALUE)["stats"] == hit_rate(records, 12, Policy.VALUE)["stats"]


def test_agents_with_slots_for_everything_recompute_at_most_a_generation_prompt_again():
    shape = agents.Shape(sessions=4, system_tokens=700, first_turn=1500, user_tokens=80, answer_tokens=80)
    made = list(agents.turns(shape))
    config = CacheConfig(pages=20_000, slots=4 * len(made), ghost_nodes=20_000)
    stats = replay(config, made, len(made), "")["stats"]
    # Where reasoning was dropped, the history goes on with the tokens that opened the answer; no state is kept there.
    after_dropped_reasoning = sum(not turn.donate for turn in made)
    again = stats["known_tokens"] - stats["cached_tokens"]
    assert stats["cached_tokens"] > 100_000 and 0 < after_dropped_reasoning < len(made)
    assert again <= len(agents.GENERATION_PROMPT) * after_dropped_reasoning


def test_the_command_line_writes_rows_and_a_plot(tmp_path, records):
    path = tmp_path / "trace.jsonl"
    entries = ({"input_length": record.length, "hash_ids": record.blocks} for record in records[:60])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    out, png = tmp_path / "rows.json", tmp_path / "rows.png"
    command = [sys.executable, "-m", "benchmarks.prefix_cache", "--trace", str(path), "--state-slots", "8", "0"]
    subprocess.run([*command, "--json", str(out), "--plot", str(png)], check=True, capture_output=True)
    rows = json.loads(out.read_text())
    assert [row["policy"] for row in rows] == ["value", "lru"] * 2 and png.stat().st_size > 5000


def test_a_broken_trace_line_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 5, "hash_ids": [1]}\n{"input_length": 5}\n')
    with pytest.raises(SystemExit, match=r"trace.jsonl:2: expected an object"):
        trace.read(path)
