"""A model split over ranks is the model: logits, ids, memory and traffic. Ranks are threads here; see test_gloo."""

import pytest
import torch

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.commands.info import weight_bytes
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.parallel.program import traffic

from ..driving import forward
from . import models
from .threads import run_ranks

DENSE = [Mesh(2, 1), Mesh(4, 1)]
MOE = [Mesh(tp, ep) for tp in (1, 2, 4) for ep in (1, 2, 4) if max(tp, ep) > 1]
CASES = {
    "dense": (models.config(moe=False, kv_heads=4), DENSE),
    "dense-shared-kv-tied": (models.config(moe=False, kv_heads=2, tied=True), DENSE),
    "dense-one-kv": (models.config(moe=False, kv_heads=1), DENSE),
    "moe": (models.config(moe=True, kv_heads=4, tied=True), [Mesh(4, 1), Mesh(4, 2), Mesh(2, 4)]),
    "moe-shared-kv": (models.config(moe=True, kv_heads=2), MOE),
    "dense-mtp": (models.config(moe=False, kv_heads=1, tied=True, mtp_num_hidden_layers=1), DENSE),
    "moe-mtp": (models.config(moe=True, kv_heads=2, mtp_num_hidden_layers=1), [Mesh(2, 1), Mesh(1, 2), Mesh(4, 2)]),
    "fp8-dense": (models.config(moe=False, kv_heads=2, **models.BLOCKS), DENSE),
    "fp8-moe": (models.config(moe=True, kv_heads=2, **models.BLOCKS), [Mesh(2, 1), Mesh(4, 2), Mesh(2, 4)]),
}


def mesh_name(mesh: Mesh) -> str:
    return f"tp{mesh.tp}-ep{mesh.ep}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Directory and one-process outcome of each case, made when first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            directory = tmp_path_factory.mktemp(name) if name in CASES else SHIPPED
            if name.startswith("fp8"):
                models.write_fp8_checkpoint(directory, CASES[name][0])
            elif name in CASES:
                models.write_checkpoint(directory, CASES[name][0], fused_experts=name == "moe")
            made[name] = directory, models.run(ONE_RANK, directory)
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param(name, mesh, id=f"{name}-{mesh_name(mesh)}") for name, (_, meshes) in CASES.items() for mesh in meshes]
    + [pytest.param("shipped", mesh, id=f"shipped-{mesh_name(mesh)}") for mesh in (Mesh(2, 1), Mesh(2, 4), Mesh(1, 4))],
)
def test_ranks_give_the_logits_of_one_process_and_one_id(checkpoints, name, mesh):
    directory, expected = checkpoints(name)
    assert len(expected.drafts) == (8 if ModelConfig.from_directory(directory).mtp_layers else 0)
    models.check(run_ranks(mesh, lambda communicator: models.run(communicator, directory)), expected)


@pytest.mark.parametrize("mesh", [Mesh(4, 2, rank=3), Mesh(2, 4, rank=3), Mesh(4, 1, rank=1)], ids=mesh_name)
def test_what_info_states_is_what_a_rank_allocates_and_sends(checkpoints, mesh):
    directory, _ = checkpoints("moe-shared-kv")
    config = ModelConfig.from_directory(directory)
    empty = Qwen3_5.empty(config, torch.float32, torch.device("meta"), Communicator(mesh))
    layout = MemoryLayout(empty.share, torch.float32)

    def work(communicator):
        model = models.load(directory, communicator)
        memory = Memory(layout, pages=5, slots=4, device=models.CPU)
        forward(Runner(model, memory), *models.steps(config.vocab)[1])
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        return sum(storages.values()), memory.kv.nbytes, memory.slots.nbytes, communicator.payload

    tokens, logit_rows = 18, 18
    sent = traffic(empty.compiled, mesh, config.hidden * 4, empty.share.vocab * 4)
    payload = tokens * sent.token + logit_rows * sent.logit_row
    for measured in run_ranks(mesh, work):
        assert measured == (weight_bytes(empty), 5 * layout.page_bytes, 4 * layout.slot_bytes, payload)
    # The same from the architecture: 4 layers with 2 sums each, and that of the embedding.
    assert payload == 64 * 4 * 18 * (4 * 2 + 1)
    assert layout.page_bytes == 1 * 2 * max(1, 2 // mesh.tp) * 64 * 32 * 4
    assert layout.recurrent_bytes == 3 * 8 // mesh.tp * 16 * 24 * 4
    heads, kv = 8 // mesh.tp, max(1, 2 // mesh.tp)
    attention = 64 * (2 * heads + 2 * kv + heads) * 32 + 2 * 32
    channels = (2 * 4 * 16 + 8 * 24) // mesh.tp
    projected = -(-(channels + heads * 24 + 2 * heads) // 8) * 8  # rows of 16 bytes in bf16
    gdn = 64 * projected + channels * 4 + 2 * heads + 24 + 64 * heads * 24
    routed = 8 * 3 * 64 * 32 // mesh.world
    joined = -(-(2 * 48 // mesh.world + 8 + 1) // 8) * 8  # shared gate and up, router, shared expert's gate
    moe = 64 * joined + routed + 64 * 48 // mesh.world
    whole = attention + 3 * gdn + 4 * moe + 9 * 64 + 2 * 64 * models.VOCAB // mesh.tp
    assert weight_bytes(empty) == 4 * whole


def test_a_head_split_over_ranks_drafts_by_an_fp8_copy_of_each_rank_s_rows(checkpoints):
    directory, expected = checkpoints("dense-mtp")

    def work(communicator):
        model = models.load(directory, communicator)
        model.mtp.copy_head(fp8=True)
        return models.drafts(model)

    first, *rest = run_ranks(Mesh(2, 1), work)
    for ours, whole in zip(first, expected.drafts, strict=True):
        assert (ours - whole).abs().max() <= 0.1 * whole.abs().max()
    assert not torch.equal(first[0], expected.drafts[0]) and torch.equal(first[0], rest[0][0])


def test_a_draft_vocabulary_is_refused_where_the_head_is_split(checkpoints):
    model = models.load(checkpoints("dense-mtp")[0], Communicator(Mesh(2, 1)))
    with pytest.raises(ConfigError, match="there are 2"):
        model.mtp.copy_head(torch.arange(10))


def test_a_rank_alone_says_so_and_does_its_own_work(checkpoints):
    directory, _ = checkpoints("moe")
    alone = Communicator(Mesh(4, 2, rank=1))
    assert "ALONE" in alone.describe() and "no-op" in alone.describe()
    assert "ALONE" not in ONE_RANK.describe()
    model = models.load(directory, alone)
    runner = models.new_runner(model)
    for decode, prefill in models.steps(models.VOCAB):
        logits = forward(runner, decode, prefill).logits
        assert logits.shape[1] == models.VOCAB // 4 and logits.isfinite().all()
