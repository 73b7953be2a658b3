"""On two cards: what ranks over NCCL say, by CUDA graphs and with drafts, is what one card would have said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenspeed.engine.checkpoint import SHIPPED

from . import models
from .test_serving import TEXT_FILES, gone, ranks_of

ROOT = Path(__file__).parents[2]
# Heads, widths and expert counts that the kernels serve, in one rank and in two.
SIZES = {
    "hidden_size": 512,
    "vocab_size": 640,
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "intermediate_size": 1024,
}
EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,  # two ranks have a block of FP8 each
}
# model, its drafts, and the ranks
CASES = [
    ("dense", 0, {"tensor_parallel_size": 2}),
    ("dense", 0, {"tensor_parallel_size": 2, "prefill_sums": "in-parts"}),
    ("dense-mtp", 3, {"tensor_parallel_size": 2}),
    ("dense", 3, {"tensor_parallel_size": 2}),
    ("moe-mtp", 3, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    ("moe", 0, {"tensor_parallel_size": 2}),
    ("dense-fp8", 0, {"tensor_parallel_size": 2}),
    ("moe-fp8", 0, {"tensor_parallel_size": 1, "expert_parallel_size": 2}),
    ("moe", 0, {"tensor_parallel_size": 1, "expert_parallel_size": 2}),
    ("shipped", 0, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
]
PROMPTS = [[(7 * i + 13 * j) % 600 for j in range(length)] for i, length in enumerate((5, 70, 131, 64, 90, 300))]
# Largest and mean distance of log-probabilities: bf16 terms are summed in another order, and where experts nearly tie,
# that decides who is chosen. The shipped model is sure of itself, so another expert moves it by more: it runs in fp32.
# FP8: what was decoded from exact activations is scored by a prefill, which rounds them to e4m3.
ROUNDING = {
    "dense": (0.08, 0.03),
    "moe": (1.0, 0.12),
    "shipped": (1e-2, 1e-3),
    "dense-fp8": (0.6, 0.1),
    "moe-fp8": (3.0, 0.3),
}

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    made = {"shipped": None}

    def get(name: str) -> str | None:
        if name not in made:
            sizes = SIZES | (EXPERTS if "moe" in name else {}) | {"mtp_num_hidden_layers": int("mtp" in name)}
            raw = models.config(moe="moe" in name, kv_heads=2, **sizes)
            directory = models.write_checkpoint(root / name, raw)
            for file in TEXT_FILES:
                (directory / file).write_bytes((SHIPPED / file).read_bytes())
            made[name] = str(directory)
        return made[name]

    return get


def result(model: str | None, settings: dict, params: dict, known: tuple = ()) -> dict:
    job = {"model": model, "settings": settings, "prompts": PROMPTS, "params": params, "known": known}
    command = [sys.executable, "-m", "tests.distributed.cards", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_sums_by_peer_memory_are_those_of_nccl(tmp_path):
    ranks = next(count for count in (8, 4, 2) if count <= torch.cuda.device_count())
    command = [sys.executable, "-m", "tests.distributed.card_sums"]
    arguments = [str(ranks), f"file://{tmp_path / 'meeting'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], cwd=ROOT, text=True, **pipes) for rank in range(ranks)
    ]
    try:
        for process in processes:
            out, error = process.communicate(timeout=120)
            assert (process.returncode, out) == (0, "equal\n"), error[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("name", "drafts", "ranks"), CASES, ids=str)
def test_two_cards_say_what_one_would(checkpoints, name, drafts, ranks):
    limits = {"max_num_seqs": 8, "max_model_len": 1024, "gpu_memory_utilization": 0.2}
    limits |= {"quantization": "fp8"} if "fp8" in name else {}
    limits["dtype"] = "float32" if name == "shipped" else "bfloat16"
    greedy = {"max_tokens": 40, "temperature": 0}
    split = result(checkpoints(name), limits | ranks | {"draft_tokens": drafts}, greedy)
    assert split["communicator"] == "rank 0 of 2 over nccl and peer memory"
    assert split["drafts"] is bool(drafts)
    if name != "shipped":  # whose sizes no kernel serves
        assert split["graphs"]
    if drafts:
        assert split["stats"]["draft_steps"] > 0
    largest, mean = ROUNDING[name.removesuffix("-mtp")]
    for ids in (split["ids"], split["plain"]):
        assert all(len(said) == 40 for said in ids)
        one = result(checkpoints(name), limits, greedy, ids)
        short = distances(one["largest"], one["scores"])  # of what was said from the likeliest
        assert max(short) < largest and sum(short) / len(short) < mean
        if ids is split["ids"]:
            apart = distances(split["scores"], one["scores"])
            assert max(apart) < largest and sum(apart) / len(apart) < mean


def distances(ours: list[list[float]], theirs: list[list[float]]) -> list[float]:
    return [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]


def test_sampled_ids_of_two_cards_are_those_of_a_second_run(checkpoints):
    limits = {"max_num_seqs": 8, "max_model_len": 1024, "gpu_memory_utilization": 0.2, "tensor_parallel_size": 2}
    limits["prefill_sums"] = "all-reduce"  # what is measured may differ between runs, and the forms round otherwise
    sampled = {"max_tokens": 24, "temperature": 1.0, "seed": 3, "top_k": 20, "top_p": 0.9}
    first, second = (result(checkpoints("dense"), limits, sampled) for _ in range(2))
    assert first["plain"] == second["plain"] and len(set(map(tuple, first["plain"]))) == len(PROMPTS)


@pytest.mark.parametrize("victim", ["other", "first"])
def test_a_lost_rank_ends_the_others_within_ten_seconds_with_the_reason(checkpoints, victim):
    command = [
        sys.executable,
        "-m",
        "tokenspeed.engine",
        "generate",
        "Hello!",
        "--tensor-parallel-size",
        "2",
        "--ignore-eos",
    ]
    command += ["--model", checkpoints("dense"), "--max-tokens", "20000", "--gpu-memory-utilization", "0.5"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        process.stdout.read(20)  # it generates
        (other,) = ranks_of(process)
        os.kill(other if victim == "other" else process.pid, signal.SIGKILL)
        begin = time.monotonic()
        if victim == "other":
            _, error = process.communicate(timeout=10)
            assert process.returncode == 1
            assert "rank 1 ended with status -9" in error
        while not gone(other):
            assert time.monotonic() - begin < 10
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
