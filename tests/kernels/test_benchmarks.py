"""Claims about the benchmark suite: what a row says, and that nothing is left out of it."""

import json

import pytest
import torch

from benchmarks import fp8, report, timing
from benchmarks.cases import CPU_SIZES, GPU_SIZES, Case, all_cases, operator_case
from tests.ops.backends import load_emulated
from tools.gpu_check import furthest_from_ceiling

CEILINGS = timing.Ceilings(copy=10.0, read=10.0, matmul=1.0)


def norm_case(**options) -> Case:
    return operator_case("silu_mul", "2 x 8", 96, lambda draw: (draw.randn(2, 16),), **options)


def test_every_kernel_has_a_benchmark():
    kernels = load_emulated()
    if not kernels:
        pytest.skip("no emulated kernels: they are not built")
    assert kernels <= {case.kernel for case in all_cases(GPU_SIZES)}


@pytest.mark.parametrize("sizes", [CPU_SIZES, GPU_SIZES])
def test_cases_are_distinct_and_count_their_bytes(sizes):
    cases = list(all_cases(sizes))
    names = [(case.kernel, case.shape) for case in cases]
    assert len(names) == len(set(names))
    assert all(case.bytes > 0 and (case.flops > 0 or case.ceiling != "matmul") for case in cases)
    assert all(hasattr(torch.ops.tokenspeed, case.kernel) for case in cases)


def test_a_row_names_every_peer_measured_missing_or_failing():
    def broken(x):
        raise ValueError("no such shape")

    row = report.measure(norm_case(peers={"installed": torch.clone, "absent": None, "broken": broken}), "cpu", CEILINGS)
    assert row["us"] > 0
    assert row["percent_of_ceiling"] == pytest.approx(100 * row["gb_per_s"] / 10.0, rel=0.5, abs=1.0)
    assert row["peers"]["installed"]["ratio"] > 0
    assert row["peers"]["absent"] == {"missing": True}
    assert row["peers"]["broken"] == {"failed": "ValueError: no such shape"}
    assert row["best_peer"] in ("torch", "installed")
    line = report.table_line(row)
    assert all(word in line for word in ("silu_mul", "2 x 8", "installed", "absent missing", "broken failed"))


def test_a_row_without_peers_says_unranked():
    case = Case("silu_mul", "2 x 8", 96, lambda draw: (draw.randn(2, 16),), torch.ops.tokenspeed.silu_mul.default)
    row = report.measure(case, "cpu", CEILINGS)
    assert (row["best_peer"], row["ratio"]) == (None, "unranked")
    assert report.table_line(row).endswith("unranked")


def test_a_kernel_that_fails_gives_a_row_that_says_so():
    def fails(x):
        raise RuntimeError("misaligned address")

    case = Case("silu_mul", "2 x 8", 96, lambda draw: (draw.randn(2, 16),), fails)
    assert report.measure(case, "cpu", CEILINGS)["failed"] == "RuntimeError: misaligned address"


def test_rows_are_stored_as_they_come_and_plotted(tmp_path):
    row = report.measure(norm_case(), "cpu", CEILINGS)
    for _ in range(2):
        report.append(tmp_path / "rows.jsonl", row)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [row, row]
    report.plot([{"machine": "CPU"}, row], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_table_has_a_line_for_each_row_and_marks_peers_that_were_timed_otherwise():
    peers = {
        "eager": {"us": 20.0, "ratio": 2.0, "method": "launches"},
        "graph": {"us": 5, "ratio": 0.5, "method": "graph"},
    }
    row = {"kernel": "linear", "shape": "1 x 8", "us": 10.04, "gb_per_s": 3.4, "tflops": 1.25, "method": "graph"}
    row |= {
        "percent_of_ceiling": 50.4,
        "ceiling": "copy",
        "peers": peers | {"absent": {"missing": True}, "broken": {"failed": "no"}},
    }
    slow = row | {"shape": "2 x 8", "us": 1234.0, "tflops": None, "peers": {}}
    failed = {"kernel": "linear", "shape": "3 x 8", "failed": "misaligned"}
    assert report.markdown([{"machine": "card"}, row, slow, failed]).splitlines() == [
        "### linear",
        "",
        "| shape | time | GB/s | TFLOP/s | % of ceiling | peers |",
        "|---|---|---|---|---|---|",
        "| 1 x 8 | 10.0 us | 3 | 1.2 | 50% of copy | eager 2.00x*, graph 0.50x, broken failed |",
        "| 2 x 8 | 1.23 ms | 3 | 0.0 | 50% of copy |  |",
        "| 3 x 8 | misaligned |  |  |  |  |",
    ]


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    results = timing.time_interleaved(contenders, [()], "cpu")
    assert "".join(calls[2:]) == "ab" * (len(calls) // 2 - 1)
    assert {name: timing_.method for name, timing_ in results.items()} == {"a": "host", "b": "host"}


def test_the_profiler_gets_the_worst_row_of_the_worst_kernels():
    rows = [
        {"kernel": "a", "shape": "1", "us": 50.0, "percent_of_ceiling": 80},
        {"kernel": "a", "shape": "2", "us": 50.0, "percent_of_ceiling": 60},
        {"kernel": "b", "shape": "1", "us": 50.0, "percent_of_ceiling": 70},
        {"kernel": "c", "shape": "1", "us": 50.0, "percent_of_ceiling": 90},
        {"kernel": "d", "shape": "short", "us": 2.0, "percent_of_ceiling": 1},
        {"kernel": "e", "failed": "reason"},
        {"machine": "card"},
    ]
    assert [(row["kernel"], row["shape"]) for row in furthest_from_ceiling(rows)] == [("a", "2"), ("b", "1")]


def test_formats_race_on_equal_work_and_count_their_bytes(monkeypatch, capsys):
    monkeypatch.setattr(fp8, "ROUNDS", 1)
    monkeypatch.setattr(fp8, "DECODED", 1)
    monkeypatch.setattr(fp8, "CONTEXT", 70)
    rows = fp8.measure("toy", fp8.TOY, [1], 10, 130, [2], CEILINGS, torch.device("cpu"), [(2, 1.5)], kernels=True)
    decode, prefill, pages, drafted = rows
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4 and all(line.startswith("toy ") and " x " in line for line in told)
    assert (drafted["drafts"], drafted["ids_a_step"]) == (2, 1.5) and "2 drafts, 1.5 ids a step" in told[3]
    for name in ("bf16", "fp8"):
        assert drafted[name]["tok_s"] == pytest.approx(1.5e6 / drafted[name]["us"])
    assert decode["fp8"]["bytes"]["experts hit"] * 1.9 < decode["bf16"]["bytes"]["experts hit"]
    assert pages["kv fp8"]["bytes"]["KV"] * 2 == pages["kv bf16"]["bytes"]["KV"] == 2 * 130 * 2 * 256 * 2
    assert prefill["tokens"] == 10 and prefill["bf16"]["tflops_of_products"] > 0
    for name in ("bf16", "fp8"):
        assert decode[name]["kernels"] == {}, "a CPU has no kernels to time"
        assert decode[name]["floor_us"] == pytest.approx(sum(decode[name]["bytes"].values()) / 10e3)
        assert decode[name]["of_floor"] == pytest.approx(decode[name]["floor_us"] / decode[name]["us"])


def test_kernels_of_both_formats_stand_beside_each_other():
    row = {"what": "decode", "bf16": {"kernels": {"a": (2.0, 1), "b": (1.0, 3)}}, "fp8": {"kernels": {"c": (4.0, 2)}}}
    assert [line.split() for line in fp8.told_kernels(row)] == [
        ["bf16", "2.0", "us", "1", "x", "fp8", "0.0", "us", "0", "x", "a"],
        ["bf16", "1.0", "us", "3", "x", "fp8", "0.0", "us", "0", "x", "b"],
        ["bf16", "0.0", "us", "0", "x", "fp8", "4.0", "us", "2", "x", "c"],
    ]
    assert fp8.told_kernels({"what": "prefill", "bf16": {"us": 1.0}}) == []
