"""Checkpoints: every layout loads, and every broken one is refused by name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import CPU, VOCAB, Shape, load, oracle, oracle_logits
from lab import uncached_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tokenspeed.engine.checkpoint import SHIPPED, resolve
from tokenspeed.engine.config import EngineConfig, ModelConfig
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.executor.loading import load_runner, read_model_config
from tokenspeed.engine.model import weights
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import fill_with_noise, load_weights
from tokenspeed.engine.parallel.comm import ONE_RANK, Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.ops.fp8 import FP8


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    oracle(Shape(moe=True, tied=False)).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A writable copy: the directory and its tensors."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(saved, directory)
    return directory, load_file(directory / "model.safetensors")


def rewrite(directory, tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def same_parameters(a: Qwen3_5, b: Qwen3_5) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_both_prefixes_both_expert_layouts_and_shards_give_the_same_parameters(checkpoint, saved):
    directory, tensors = checkpoint
    assert any(".experts.0." in name for name in tensors), "transformers writes the experts one by one"
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in fused(tensors).items()}
    renamed |= {"model.visual.patch.weight": torch.ones(3), "mtp.fc.weight": torch.ones(2, 2)}
    halves = [dict(list(renamed.items())[i::2]) for i in range(2)]
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i, half in enumerate(halves):
        save_file({k: v.contiguous() for k, v in half.items()}, directory / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(half, f"part-{i}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_parameters(load(directory), load(saved))


def test_files_that_are_opened_anew_give_the_same_parameters(checkpoint, saved, monkeypatch):
    """As those of a checkpoint are once much of them was read."""
    directory, tensors = checkpoint
    opened, real = [], weights._open
    monkeypatch.setattr(weights, "_open", lambda path: (opened.append(path), real(path))[1])
    expected, before = load(saved), len(opened)
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 0)
    assert same_parameters(load(directory), expected)
    assert len(opened) - before >= len(tensors) > before


def test_a_composite_config_loads_like_its_text_config(checkpoint, saved):
    directory, _ = checkpoint
    text = json.loads((directory / "config.json").read_text())
    composite = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 2}}
    (directory / "config.json").write_text(json.dumps(composite))
    assert ModelConfig.from_directory(directory) == ModelConfig.from_directory(saved)


def test_tied_weights_share_memory_and_load_with_or_without_a_stored_head(tmp_path):
    oracle(Shape(tied=True)).save_pretrained(tmp_path)
    tied = load(tmp_path)
    assert tied.program[-1].weight is tied.program[0].weight
    tensors = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert same_parameters(load(tmp_path), tied)


@pytest.mark.parametrize("different", [False, True])
def test_a_stored_head_that_is_not_the_embedding_is_used_as_transformers_uses_it(tmp_path, different, capsys):
    """Whatever config.json says of tying; and somebody says so."""
    oracle(Shape(tied=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[VOCAB - 1] += 1.0 if different else 0.0
    rewrite(tmp_path, tensors | {"lm_head.weight": head})
    llm_config = EngineConfig(device="cpu", kv_pages=4, state_slots=2, max_num_seqs=1)
    runner, _ = load_runner(tmp_path, llm_config, CPU, ONE_RANK, list, progress=False)
    model, ids = runner.model, torch.arange(40) * 7 % VOCAB
    assert torch.equal(model.program[-1].weight, head) and model.config.tied is not different
    assert ("tie_word_embeddings" in capsys.readouterr().err) is different
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = oracle_logits(theirs, ids)
    assert (uncached_logits(model, ids.tolist())[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("moe", [False, True])
def test_dummy_weights_need_no_weight_files_and_give_finite_logits(tmp_path, moe, quantization):
    """The same numbers each time, and on every rank what all of them hold."""
    oracle(Shape(moe=moe)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = EngineConfig(
        device="cpu", kv_pages=4, state_slots=2, max_num_seqs=1, quantization=quantization, load_format="dummy"
    )
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        load_runner(tmp_path, replace(config, load_format="auto"), CPU, ONE_RANK, list, progress=False)
    first, second = (load_runner(tmp_path, config, CPU, ONE_RANK, list, progress=False)[0].model for _ in range(2))
    logits = uncached_logits(first, list(range(100)))[0]
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    assert torch.equal(logits, uncached_logits(second, list(range(100)))[0])
    assert quantization == "none" or any(p.dtype == FP8 for p in first.parameters())
    if quantization == "none":
        ranks = []
        for rank in range(2):
            communicator = Communicator(Mesh(2, 1, rank))
            model = Qwen3_5.empty(read_model_config(tmp_path, config), torch.float32, CPU, communicator)
            fill_with_noise(model)
            ranks.append([p for p in model.parameters() if all(isinstance(dim, int) for dim in p.dims)])
        assert ranks[0] and all(torch.equal(ours, theirs) for ours, theirs in zip(*ranks, strict=True))


def test_the_shipped_model_is_small_and_loads():
    assert resolve(None) == SHIPPED
    assert (SHIPPED / "model.safetensors").stat().st_size <= 8 * 2**20
    model = load(SHIPPED)
    assert all(p.isfinite().all() for p in model.parameters())


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same checkpoint with each layer's experts in two tensors."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for base in {name.split(".experts.")[0] + ".experts." for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{base}{expert}.{part}_proj.weight"] for expert in range(8)])
            for part in ("gate", "up", "down")
        )
        out |= {f"{base}gate_up_proj": torch.cat([gate, up], dim=1), f"{base}down_proj": down}
    return out


def refused(directory, *expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(directory)
    for word in expected:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_missing_tensor_is_named(checkpoint):
    directory, tensors = checkpoint
    del tensors["model.layers.1.linear_attn.A_log"]
    rewrite(directory, tensors)
    refused(directory, "model.layers.1.linear_attn.A_log")


def test_missing_expert_of_the_split_layout_is_named(checkpoint):
    directory, tensors = checkpoint
    del tensors["model.layers.0.mlp.experts.5.down_proj.weight"]
    rewrite(directory, tensors)
    refused(directory, "experts.5.down_proj")


def test_extra_tensor_is_named(checkpoint):
    directory, tensors = checkpoint
    rewrite(directory, tensors | {"model.layers.0.self_attn.lora_A": torch.ones(2)})
    refused(directory, "model.layers.0.self_attn.lora_A")


def test_misshaped_tensor_is_named_with_both_shapes(checkpoint):
    directory, tensors = checkpoint
    tensors["model.norm.weight"] = torch.ones(63)
    rewrite(directory, tensors)
    refused(directory, "model.norm.weight", "[63]", "[64]")


def test_quantized_tensor_is_refused(checkpoint):
    directory, tensors = checkpoint
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    rewrite(directory, tensors)
    refused(directory, "lm_head.weight", "F8_E4M3")


def test_both_expert_layouts_at_once_are_refused(checkpoint):
    directory, tensors = checkpoint
    rewrite(directory, tensors | fused(tensors))
    refused(directory, "both layouts")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_file_is_refused(checkpoint, keep):
    directory, _ = checkpoint
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(directory, "model.safetensors")


def test_corrupt_header_is_refused(checkpoint):
    directory, _ = checkpoint
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    refused(directory, "model.safetensors")


def test_no_weights_and_a_missing_shard_are_refused(checkpoint):
    directory, tensors = checkpoint
    (directory / "model.safetensors").unlink()
    refused(directory, "no .safetensors file")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "gone.safetensors")}))
    refused(directory, "gone.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "../../etc/passwd")}))
    refused(directory, "passwd", "does not exist")
    index.write_text('{"weight_map": 3}')
    refused(directory, "weight_map")


def test_a_tensor_in_two_files_is_refused_with_both_names(checkpoint):
    directory, tensors = checkpoint
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, directory / "model-left-over.safetensors")
    refused(directory, "model-left-over.safetensors", "model.safetensors", "model.norm.weight")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert load(directory) is not None, "a file that the index leaves out is not the model's"


def test_an_index_of_another_download_is_refused_with_the_files(checkpoint):
    directory, tensors = checkpoint
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, directory / "last.safetensors")
    rewrite(directory, tensors)
    index = directory / "model.safetensors.index.json"
    right = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "last.safetensors"}
    index.write_text(json.dumps({"weight_map": right}))
    assert load(directory) is not None
    wrong = right | {"lm_head.weight": "last.safetensors"}
    index.write_text(json.dumps({"weight_map": wrong}))
    refused(directory, "last.safetensors holds 'lm_head.weight'", "model.safetensors does")
    index.write_text(json.dumps({"weight_map": right | {"model.nowhere": "last.safetensors"}}))
    refused(directory, "model.nowhere", "nor does another file")


def test_a_model_that_is_neither_a_directory_nor_a_hub_id_is_refused():
    for name in ("./nowhere", "/nowhere/at/all", "tiny"):
        with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
            resolve(name)


def test_loading_copies_into_the_parameters_it_was_given(saved):
    model = Qwen3_5.empty(ModelConfig.from_directory(saved), torch.bfloat16, CPU)
    before = [p.data_ptr() for p in model.parameters()]
    load_weights(model, saved, progress=False)
    assert before == [p.data_ptr() for p in model.parameters()]
