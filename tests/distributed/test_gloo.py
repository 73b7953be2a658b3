"""Ranks as processes over gloo against one process. One set of processes serves the whole file: starting them costs
seconds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.parallel.comm import ONE_RANK, ProcessCommunicator
from tokenspeed.engine.parallel.mesh import Mesh

from . import models
from .ranks import collectives
from .threads import run_ranks

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "dense": models.config(moe=False, kv_heads=2, tied=True, mtp_num_hidden_layers=1),
    "moe": models.config(moe=True, kv_heads=2, mtp_num_hidden_layers=1),
}
CASES = [
    ("shipped", Mesh(2, 1)),
    ("shipped", Mesh(2, 4)),
    ("shipped", Mesh(1, 2)),
    ("dense", Mesh(2, 1)),
    ("dense", Mesh(4, 1)),
    *(("moe", Mesh(tp, ep)) for tp in (1, 2, 4) for ep in (1, 2, 4) if (tp, ep) != (1, 1)),
    ("fp8", Mesh(2, 1)),
    ("fp8", Mesh(2, 4)),
    ("dense in parts", Mesh(2, 1)),
    ("moe in parts", Mesh(4, 2)),
    ("", Mesh(4, 2)),
    ("", Mesh(2, 4)),
]
names = [f"{name or 'collectives'}-tp{mesh.tp}-ep{mesh.ep}" for name, mesh in CASES]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: models.write_checkpoint(root / name, raw) for name, raw in CONFIGS.items()}
    fp8 = models.write_fp8_checkpoint(root / "fp8", models.config(moe=True, kv_heads=2, **models.BLOCKS))
    in_parts = {f"{name} in parts": directory for name, directory in made.items()}
    return {"shipped": SHIPPED, "": "", "fp8": fp8, **made, **in_parts}


@pytest.fixture(scope="module")
def results(directories, tmp_path_factory):
    """Per case, what each rank left."""
    shared = tmp_path_factory.mktemp("ranks")
    cases = [(str(directories[name]), m.tp, m.ep, name.endswith("in parts")) for name, m in CASES]
    (shared / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.distributed.ranks"]
    processes = [
        subprocess.Popen([*command, str(rank), str(shared)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-4000:]
    return [
        [load_file(shared / f"case-{number}-rank-{rank}.safetensors") for rank in range(mesh.world)]
        for number, (_, mesh) in enumerate(CASES)
    ]


@pytest.fixture(scope="module")
def expected(directories):
    return {name: models.run(ONE_RANK, directories[name]) for name in ("shipped", "fp8", *CONFIGS)}


@pytest.mark.parametrize("number", [i for i, (name, _) in enumerate(CASES) if name], ids=lambda i: names[i])
def test_processes_give_the_logits_of_one_process_and_one_id(number, results, expected, directories):
    def outcome(tensors):
        lists = {}
        for name in ("logits", "greedy", "sampled", "drafts"):
            count = sum(key.startswith(f"{name}.") for key in tensors)
            lists[name] = [tensors[f"{name}.{i}"] for i in range(count)]
        return models.Outcome(**lists)

    whole = expected[CASES[number][0].removesuffix(" in parts")]
    assert len(whole.drafts) == 8 * ModelConfig.from_directory(directories[CASES[number][0]]).mtp_layers
    models.check([outcome(tensors) for tensors in results[number]], whole)


@pytest.mark.parametrize("number", [i for i, (name, _) in enumerate(CASES) if not name], ids=lambda i: names[i])
def test_collectives_between_processes_are_those_between_threads(number, results):
    mesh = CASES[number][1]
    for measured, wanted in zip(results[number], run_ranks(mesh, collectives), strict=True):
        assert measured.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(measured[name], tensor), name


def test_a_process_that_joined_no_ranks_is_told_so():
    with pytest.raises(ConfigError, match="2 ranks"):
        ProcessCommunicator(Mesh(2))


def test_a_process_that_is_another_rank_is_told_so(tmp_path):
    address = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"rank 0 of 1.*rank 1 of 2"):
            ProcessCommunicator(replace(Mesh(2), rank=1))
        assert ProcessCommunicator(Mesh()).describe() == "rank 0 of 1 over gloo"
    finally:
        torch.distributed.destroy_process_group()
