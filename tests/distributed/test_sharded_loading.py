"""A rank loads its slices, all of them, and reads nothing else."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.model import weights
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.ops.fp8 import dequantise

from . import models

MESHES = [Mesh(4, 2, rank) for rank in range(4)] + [Mesh(2, 4, 3), Mesh(4, 1, 1), Mesh(1, 1, 0)]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same checkpoint with the experts one by one, and fused; and its tensors one by one."""
    split, fused = (tmp_path_factory.mktemp(name) for name in ("split", "fused"))
    models.write_checkpoint(split, models.config(moe=True, kv_heads=2))
    tensors = load_file(split / "model.safetensors")
    merged = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
    for layer in range(4):
        base = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{base}{expert}.{name}_proj.weight"] for expert in range(8)])
            for name in ("gate", "up", "down")
        )
        merged |= {f"{base}gate_up_proj": torch.cat([gate, up], dim=1), f"{base}down_proj": down}
    (fused / "config.json").write_text((split / "config.json").read_text())
    save_file(merged, fused / "model.safetensors")
    return split, fused, tensors


def heads(tensor: torch.Tensor, first: int, count: int, width: int) -> torch.Tensor:
    return tensor[first * width : (first + count) * width]


def mesh_name(mesh: Mesh) -> str:
    return f"tp{mesh.tp}-ep{mesh.ep}-rank{mesh.rank}"


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_a_rank_holds_its_heads_columns_experts_and_vocabulary(layouts, mesh):
    split, _, tensors = layouts
    stages = dict(zip((m := models.load(split, Communicator(mesh))).names, m.program, strict=True))
    tp, rank = mesh.tp, mesh.rank % mesh.tp

    vocabulary = models.VOCAB // tp
    rows = slice(rank * vocabulary, (rank + 1) * vocabulary)
    assert torch.equal(stages["embed_tokens"].weight, tensors["model.embed_tokens.weight"][rows])
    assert torch.equal(stages["lm_head"].weight, tensors["lm_head.weight"][rows])

    key = "model.layers.0.linear_attn."
    keys, values = 4 // tp, 8 // tp
    q, k, v = tensors[key + "in_proj_qkv.weight"].split([64, 64, 192])
    taps = tensors[key + "conv1d.weight"][:, 0].split([64, 64, 192])
    z, b, a = (tensors[f"{key}in_proj_{name}.weight"] for name in "zba")
    blocks = [heads(q, rank * keys, keys, 16), heads(k, rank * keys, keys, 16), heads(v, rank * values, values, 24)]
    blocks += [heads(z, rank * values, values, 24), heads(b, rank * values, values, 1)]
    expected = torch.cat([*blocks, heads(a, rank * values, values, 1)])
    gdn = stages["layers.0.linear_attn"]
    assert (
        torch.equal(gdn.in_proj[0].data[: len(expected)], expected) and not gdn.in_proj[0].data[len(expected) :].any()
    )
    parts = ((taps[0], keys, 16), (taps[1], keys, 16), (taps[2], values, 24))
    assert torch.equal(gdn.conv, torch.cat([heads(t, rank * count, count, width) for t, count, width in parts]))
    assert torch.equal(gdn.a_log, heads(tensors[key + "A_log"], rank * values, values, 1))
    assert torch.equal(gdn.dt_bias, heads(tensors[key + "dt_bias"], rank * values, values, 1))
    assert torch.equal(gdn.out.data, heads(tensors[key + "out_proj.weight"].T, rank * values, values, 24).T)
    assert torch.equal(gdn.norm, tensors[key + "norm.weight"])

    key = "model.layers.3.self_attn."
    queries, kv = 8 // tp, max(1, 2 // tp)
    first_kv = rank * 2 // tp
    attention = stages["layers.3.self_attn"]
    blocks = [heads(tensors[key + "q_proj.weight"], rank * queries, queries, 64)]
    blocks += [heads(tensors[f"{key}{name}_proj.weight"], first_kv, kv, 32) for name in "kv"]
    assert torch.equal(attention.qkv.data, torch.cat(blocks))
    assert torch.equal(attention.out.data, heads(tensors[key + "o_proj.weight"].T, rank * queries, queries, 32).T)

    key, moe = "model.layers.3.mlp.", stages["layers.3.mlp"]
    slices, held = mesh.world // mesh.ep, 8 // mesh.ep
    first, place, width = mesh.rank // slices * held, mesh.rank % slices, 32 // slices
    for local in range(held):
        expert = f"{key}experts.{first + local}."
        gate, up = (heads(tensors[f"{expert}{name}_proj.weight"], place, 1, width) for name in ("gate", "up"))
        assert torch.equal(moe.gate_up.data[local], torch.cat([gate, up]))
        assert torch.equal(moe.down.data[local], heads(tensors[expert + "down_proj.weight"].T, place, 1, width).T)
    columns = 48 // mesh.world
    gate, up = (heads(tensors[f"{key}shared_expert.{n}_proj.weight"], mesh.rank, 1, columns) for n in ("gate", "up"))
    joined = torch.cat([gate, up, tensors[key + "gate.weight"], tensors[key + "shared_expert_gate.weight"]])
    assert torch.equal(moe.in_proj[0].data[: len(joined)], joined)
    assert not moe.in_proj[0].data[len(joined) :].any()
    down = tensors[key + "shared_expert.down_proj.weight"]
    assert torch.equal(moe.shared_down.data, heads(down.T, mesh.rank, 1, columns).T)


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_both_layouts_of_experts_fill_a_rank_alike(layouts, mesh):
    split, fused = (models.load(directory, Communicator(mesh)) for directory in layouts[:2])
    assert all(torch.equal(a, b) for a, b in zip(split.parameters(), fused.parameters(), strict=True))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    raw = models.config(moe=True, kv_heads=2, **models.BLOCKS)
    return models.write_fp8_checkpoint(tmp_path_factory.mktemp("fp8"), raw)


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_a_rank_holds_the_blocks_of_its_part(fp8, mesh):
    """Values and scales, and where it quantises them itself they are those that one process makes of the whole."""
    whole, part = (models.load(fp8, Communicator(m)) for m in (Mesh(), mesh))
    tensors = load_file(fp8 / "model.safetensors")
    place, share = mesh.rank % mesh.tp, 512 // mesh.tp
    names = ("layers.3.self_attn", "layers.0.linear_attn", "layers.1.mlp")
    attention, gdn, moe = (part.program[part.names.index(name)] for name in names)

    def columns(key: str, first: int, size: int):
        values, scale = tensors[key], tensors[f"{key}_scale_inv"]
        return values[:, first : first + size], scale[:, first // 128 : (first + size) // 128]

    def same(weight, values, scale) -> bool:
        bits = weight.data.view(torch.uint8), values.contiguous().view(torch.uint8)
        return torch.equal(*bits) and torch.equal(weight.scale, scale)

    assert same(attention.out, *columns("model.layers.3.self_attn.o_proj.weight", 2 * place * share, 2 * share))
    assert same(gdn.out, *columns("model.layers.0.linear_attn.out_proj.weight", place * share, share))
    key, count = "model.layers.1.mlp.shared_expert.down_proj.weight", 512 // mesh.world
    assert same(moe.shared_down, *columns(key, mesh.rank * count, count))
    slices, held = mesh.world // mesh.ep, 8 // mesh.ep
    width, first = 512 // slices, mesh.rank // slices * held
    for local in range(held):
        key = f"model.layers.1.mlp.experts.{first + local}.down_proj.weight"
        values, scale = columns(key, mesh.rank % slices * width, width)
        assert torch.equal(moe.down.data[local].view(torch.uint8), values.contiguous().view(torch.uint8))
        assert torch.equal(moe.down.scale[local], scale)
        rows = slice(mesh.rank % slices * width, (mesh.rank % slices + 1) * width)
        blocks = slice(rows.start // 128, rows.stop // 128)
        for half, name in zip(moe.gate_up.part.split([width, width]), ("gate", "up"), strict=True):
            key = f"model.layers.1.mlp.experts.{first + local}.{name}_proj.weight"
            assert torch.equal(half.data[local].view(torch.uint8), tensors[key][rows].view(torch.uint8))
            assert torch.equal(half.scale[local], tensors[f"{key}_scale_inv"][blocks])
    assert {p.dtype for p in part.parameters()} == {p.dtype for p in whole.parameters()}


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_a_rank_quantises_its_part_as_one_process_does_the_whole(tmp_path, mesh):
    models.write_checkpoint(tmp_path, models.config(moe=True, kv_heads=2, **models.BLOCKS))
    fp8 = models.write_fp8_checkpoint(tmp_path / "fp8", models.config(moe=True, kv_heads=2, **models.BLOCKS))
    here, there = (models.load(d, Communicator(mesh), q) for d, q in ((tmp_path, "fp8"), (fp8, "auto")))
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_a_rank_dequantises_its_part_though_it_cuts_blocks(tmp_path, mesh):
    """Parts of 24, 48 and 64 rows and columns; to be held in FP8 they would have to be whole blocks."""
    raw = models.config(moe=True, kv_heads=2, moe_intermediate_size=256, shared_expert_intermediate_size=192)
    models.write_fp8_checkpoint(tmp_path / "fp8", raw)
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        scale, name = tensors.pop(key), key.removesuffix("_scale_inv")
        tensors[name] = dequantise(tensors[name], scale)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tmp_path / "fp8" / "config.json").read_text())
    here, plain = (models.load(d, Communicator(mesh), "none") for d in (tmp_path / "fp8", tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), plain.parameters(), strict=True))
    if mesh.world > 1:
        with pytest.raises(ConfigError, match=r"(num|linear_num|moe|shared)_\w+ \d+ over the \d ranks.*blocks of 128"):
            models.load(tmp_path / "fp8", Communicator(mesh))


@pytest.mark.parametrize("layout", ["split", "fused", "fp8"])
@pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)
def test_a_rank_reads_what_it_holds_and_no_more(layouts, fp8, mesh, layout, monkeypatch):
    read = []

    class Slice:
        def __init__(self, inner):
            self.inner = inner
            self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

        def __getitem__(self, slices):
            value = self.inner[slices]
            read.append(value.numel())
            return value

    class File:  # no get_tensor: a whole tensor cannot be asked for
        def __init__(self, path, framework):
            inner = safe_open(path, framework)
            self.keys, self.get_slice = inner.keys, lambda name: Slice(inner.get_slice(name))

    monkeypatch.setattr(weights, "safe_open", File)
    directory = {"split": layouts[0], "fused": layouts[1], "fp8": fp8}[layout]
    model = models.load(directory, Communicator(mesh))
    held = sum(p.numel() for p in model.parameters())
    padding = sum(p.padding * p.shape[1] for p in model.parameters() if p.padding)
    assert sum(read) == held - padding
    assert max(read) <= max(p.numel() for p in model.parameters())


def test_a_missing_expert_is_named_by_the_rank_that_needs_it(layouts, tmp_path):
    tensors = dict(layouts[2])
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((layouts[0] / "config.json").read_text())
    models.load(tmp_path, Communicator(Mesh(1, 4, rank=0)))
    with pytest.raises(ConfigError, match=r"experts\.6\.up_proj"):
        models.load(tmp_path, Communicator(Mesh(1, 4, rank=3)))


def test_a_misshaped_tensor_is_named_even_where_another_rank_needs_it(layouts, tmp_path):
    tensors = dict(layouts[2])
    tensors["model.layers.1.mlp.experts.6.up_proj.weight"] = torch.ones(32, 63)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((layouts[0] / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"experts\.6\.up_proj.*\[32, 63\].*\[32, 64\]"):
        models.load(tmp_path, Communicator(Mesh(1, 4, rank=0)))
