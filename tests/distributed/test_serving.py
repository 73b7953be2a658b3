"""The engine over several ranks: what one process gives, and an orderly end when a rank is lost."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenspeed.engine.checkpoint import SHIPPED

from . import models
from .serving import run

ROOT = Path(__file__).parents[2]
TIGHT = {"kv_pages": 14, "state_slots": 9, "max_num_seqs": 6, "max_num_batched_tokens": 96}
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    made = {"shipped": None}
    for name, moe in (("dense", False), ("moe", True)):
        # The shipped tokenizer needs its own vocabulary.
        directory = models.write_checkpoint(root / name, models.config(moe=moe, kv_heads=2, vocab_size=640))
        for file in TEXT_FILES:
            (directory / file).write_bytes((SHIPPED / file).read_bytes())
        made[name] = str(directory)
    return made


def start(model: str | None, **settings) -> subprocess.Popen:
    job = json.dumps({"model": model, "settings": TIGHT | settings})
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.serving", job],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def by_one_process(checkpoints):
    return functools.cache(lambda name: run(checkpoints[name], TIGHT))


def test_ranks_bring_units_back_from_their_parts_of_host_memory():
    tight = {"host_memory": 0.3, "kv_pages": 12, "state_slots": 4, "max_num_seqs": 4}
    split, alone = outcome(start(None, **tight, tensor_parallel_size=2)), run(None, TIGHT | tight)
    assert alone["events"]["moved_in"] > 0 and split["events"]["moved_in"] > 0
    assert split["memory"] == alone["memory"] == ""
    assert [ours["ids"] for ours in split["results"]] == [theirs["ids"] for theirs in alone["results"]]


@pytest.mark.parametrize(
    ("name", "tp", "ep", "sums"),
    [
        ("dense", 2, 1, "auto"),
        ("dense", 4, 1, "auto"),
        ("moe", 2, 4, "auto"),
        ("shipped", 2, 2, "auto"),
        ("moe", 2, 2, "in-parts"),
    ],
)
def test_ranks_give_what_one_process_gives(checkpoints, by_one_process, name, tp, ep, sums):
    ranks = {"tensor_parallel_size": tp, "expert_parallel_size": ep, "prefill_sums": sums}
    split, alone = outcome(start(checkpoints[name], **ranks)), by_one_process(name)
    for event in ("preemptions", "forks", "cached_tokens", "aborted"):
        assert alone["events"][event] > 0, f"{event} did not happen: the test shows less than it claims"
    assert split["events"] == alone["events"] and split["memory"] == alone["memory"] == ""
    for ours, theirs in zip(split["results"], alone["results"], strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=2e-3)


def ranks_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in found if b"tokenspeed.engine.executor.ranks" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture
def chatting():
    """Two ranks that generate without end."""
    command = [sys.executable, "-m", "tokenspeed.engine", "generate", "Hello!", "--tp", "2", "--ignore-eos"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "8000", "--threads", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.read(20)  # it generates
    yield process
    process.kill()
    process.wait()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("victim", ["other", "first"])
def test_a_lost_rank_ends_the_others_within_ten_seconds_with_the_reason(chatting, victim):
    (other,) = ranks_of(chatting)
    os.kill(other if victim == "other" else chatting.pid, signal.SIGKILL)
    begin = time.monotonic()
    if victim == "other":
        _, error = chatting.communicate(timeout=10)
        assert chatting.returncode == 1
        assert "error:" in error.strip().splitlines()[-1]
    while not gone(other):
        assert time.monotonic() - begin < 10
        time.sleep(0.1)


def test_torchrun_starts_the_ranks():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    arguments = ["-m", "tokenspeed.engine", "generate", "Hello!", "--tp", "2", "--max-tokens", "6", "--threads", "1"]
    done = subprocess.run(
        [*torchrun, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    alone = subprocess.run(
        [sys.executable, *arguments[:-6], *arguments[-4:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == alone.stdout != ""
