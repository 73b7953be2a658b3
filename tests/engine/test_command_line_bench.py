"""`bench`: what it measures, and that a run's step log replays."""

import json
import random

import pytest

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.bench.measure import Case, measure
from tokenspeed.engine.bench.spread import Spread
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import Acceptance

SMALL = ["--max-num-seqs", "4", "--quiet"]


def test_a_row_for_each_combination_with_its_figures_and_a_log_that_replays(tmp_path, capsys):
    json_, plot, log = (tmp_path / name for name in ("b.json", "b.png", "steps.jsonl"))
    lengths = ["--input-len", "12", "--output-len", "3", "--concurrency", "1", "3", "--requests", "3"]
    files = ["--json", str(json_), "--plot", str(plot), "--log-steps", str(log)]
    assert main(["bench", *lengths, "--warm-up", "1", *files, *SMALL]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split().count("ms") == 5 and "tok/s" in out[1]
    assert [row.split()[:3] for row in out[2:]] == [["12", "3", "1"], ["12", "3", "3"]]
    rows = json.loads(json_.read_text())
    assert len(rows) == 2
    for row in rows:
        assert row["hit_rate"] == 0, "random prompts share nothing"
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
        assert 0 < row["itl_ms"]["p50"] <= row["itl_ms"]["p99"]
        assert row["total_tok_s"] == pytest.approx(row["output_tok_s"] * (row["prompt_tokens"] + 3) / 3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "replay", str(log), "--quiet"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_a_shared_prefix_is_computed_once(capsys):
    llm = LLM(progress=False, max_num_seqs=2, validate=True)
    case = Case(prompt_tokens=20, output_tokens=2, concurrency=2, prefix_tokens=16, requests=4, warm_up=1)
    done = []
    measured = measure(llm, case, random.Random(0), done.append)
    assert measured.hit_rate == 16 / 20
    assert sum(done) == 5
    # The next case must not find what this one left.
    assert measure(llm, case, random.Random(0)).hit_rate == 16 / 20
    assert not llm.engine.has_work


def test_the_clock_counts_from_submission_to_each_token(monkeypatch):
    llm = LLM(progress=False, max_num_seqs=2, draft_tokens=0)
    now = [0.0]
    monkeypatch.setattr("tokenspeed.engine.bench.measure.time.perf_counter", lambda: now[0])
    step = llm.engine.step

    def slow():
        now[0] += 0.5
        step()

    llm.engine.step = slow
    measured = measure(llm, Case(8, 5, 1, 0, requests=2, warm_up=0), random.Random(0))
    # A step is read one step late; the next request comes when the one before has ended.
    assert measured.ttft_ms == (1000, 1000, 1000)
    assert measured.itl_ms == measured.tpot_ms == (500, 500, 500)
    assert measured.output_tok_s == pytest.approx(10 / (2 * 3.0))


def test_tokens_that_come_together_are_one_event_and_drafts_are_told(monkeypatch):
    llm = LLM(progress=False, max_num_seqs=2, draft_tokens=3)
    now = [0.0]
    monkeypatch.setattr("tokenspeed.engine.bench.measure.time.perf_counter", lambda: now[0])
    step, reconcile, brought = llm.engine.step, llm.engine.scheduler.reconcile, []

    def slow():
        now[0] += 0.5
        step()

    def told(planned, ids):
        if planned.step.decode and planned.step.width > 1 and ids[0]:
            brought.append(len(ids[0]))
        reconcile(planned, ids)

    llm.engine.step, llm.engine.scheduler.reconcile = slow, told
    measured = measure(llm, Case(8, 21, 1, 0, requests=1, warm_up=1), random.Random(2))
    own = brought[len(brought) - measured.drafts.steps :]
    assert measured.drafts.steps == len(own) > 3 and measured.drafts.ids == sum(own)
    assert measured.drafts.drafted == [len(own)] * 3
    assert measured.drafts.accepted == [sum(count > place for count in own) for place in (1, 2, 3)]
    assert measured.itl_ms.p50 == 500 and measured.tpot_ms.p50 < 500
    assert measured.row().split()[11] == f"{sum(own) / len(own):.2f}"
    assert [*map(float, measured.row().split()[12:])] == [round(100 * rate) for rate in measured.drafts.rates]
    assert measured.as_dict()["drafts"]["ids_a_step"] == sum(own) / len(own)


def test_acceptance_adds_up_and_counts_since():
    def counted(*steps):
        acceptance = Acceptance()
        for drafts, ids in steps:
            acceptance.count(drafts, ids)
        return acceptance

    early, late = [(3, 4), (1, 1), (3, 2)], [(1, 2), (2, 2)]
    both = counted(*early)
    both.add(counted(*late))
    both.add(None)
    assert both == counted(*early, *late)
    assert both.since(counted(*early)) == counted(*late)
    assert both.since(both) == Acceptance() and str(Acceptance()) == "no drafts"
    assert counted(*early).rates == [2 / 3, 1 / 2, 1 / 2]
    assert counted(*early).prediction_tokens() == {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 3}
    assert Acceptance().prediction_tokens() == {}


@pytest.mark.parametrize(
    ("values", "spread"),
    [
        ([], (0, 0, 0)),
        ([3], (3, 3, 3)),
        ([2, 1], (1, 2, 2)),
        (range(1, 101), (50, 90, 99)),
        (range(1, 102), (51, 91, 100)),
    ],
)
def test_percentiles_are_by_the_nearest_rank(values, spread):
    assert Spread.of(values) == spread
