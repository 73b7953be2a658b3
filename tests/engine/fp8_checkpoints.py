"""Checkpoints in the layout of the official FP8 releases, made of small random ones, and what they stand for."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import CPU, VOCAB, Shape, oracle, oracle_logits
from mtp_oracle import random_head, split_experts
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.driving import Move, logits_of
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights, with_formats

PREFIX = "model.language_model."
# By the ends of their names, as the releases have them.
CONVERTED = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")),
    *(f"{name}_proj" for name in ("gate", "up", "down")),
)
# Every product that is joined with another begins with a block; 192 columns and experts of 72 rows cut theirs short.
WIDE = {
    "hidden_size": 192,
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 72,
    "shared_expert_intermediate_size": 128,
}


def wide(moe: bool, **changes) -> dict:
    """Sizes for `oracle`: of a dense model, or of a mixture."""
    unused = ("intermediate_size",) if moe else ("moe_intermediate_size", "shared_expert_intermediate_size")
    return {key: value for key, value in WIDE.items() if key not in unused} | changes


def blockwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and scales of a matrix, block by block."""
    rows, columns = weight.shape
    values, scale = torch.empty_like(weight), torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = (weight[at].abs().max() / 448).bfloat16()  # a scale that bf16 holds
            values[at] = weight[at] / scale[i, j]
    return values.clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantised(values: Tensor, scale: Tensor) -> Tensor:
    """The matrix of both, block by block."""
    out = values.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scale[i, j]
    return out


@dataclass
class Official:
    """A checkpoint under way: its tensors, and what its config.json says; `write` makes the files."""

    raw: dict
    tensors: dict[str, Tensor]
    not_converted: list[str]
    quantization: dict = field(default_factory=dict)

    def write(self, directory: Path, shards: int = 3) -> Path:
        """Neighbours go to different files: a scale is never with its values."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        said = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": self.not_converted,
        }
        moe = "moe" in self.raw["model_type"]
        composite = {"model_type": "qwen3_5_moe" if moe else "qwen3_5", "text_config": self.raw}
        (directory / "config.json").write_text(
            json.dumps(composite | {"quantization_config": said | self.quantization})
        )
        where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(self.tensors)}
        for file in set(where.values()):
            save_file(
                {name: self.tensors[name].contiguous() for name in where if where[name] == file}, directory / file
            )
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return directory


def quantised(saved: Path, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Official, dict[str, Tensor]]:
    """The official form of a checkpoint that `transformers` wrote, and the plain tensors that it stands for."""
    tensors, plain, listed = {}, {}, ["visual", "model.visual", "mtp.fc"]
    for key, tensor in load_file(saved / "model.safetensors").items():
        name = key.replace("model.", PREFIX, 1)
        module = name.removesuffix(".weight")
        if module.endswith(CONVERTED):
            values, scale = blockwise(tensor.float())
            tensors |= {name: values, f"{name}_scale_inv": scale.to(scale_dtype)}
            plain[key] = dequantised(values, scale)
        else:
            tensors[name] = plain[key] = tensor
            listed += [module] if tensor.dim() > 1 else []
    tensors["model.visual.patch_embed.weight"] = torch.ones(3)
    return Official(json.loads((saved / "config.json").read_text()), tensors, listed), plain


def add_head(directory: Path) -> None:
    """A random MTP head for the checkpoint, which `transformers` does not read."""
    config = json.loads((directory / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors") | split_experts(random_head(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", {"format": "pt"})


@dataclass
class Release:
    """directory: in the official layout; plain: the same dequantised by hand, as `transformers` reads it; logits: of
    every position of `ids`, by `transformers` on the latter."""

    official: Official
    directory: Path
    plain: Path
    ids: Tensor
    logits: Tensor

    def run(self, model: Qwen3_5, dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None) -> Tensor:
        """Logits of every position: half prefilled, the rest token by token."""
        memory = Memory(MemoryLayout(model.config, dtype, kv_dtype=kv_dtype), 3, 2, CPU)
        runner, half, ids = Runner(model, memory), len(self.ids) // 2, self.ids.tolist()

        def move(start: int, end: int) -> Move:
            return Move(tuple(ids[start:end]), start, (2, 0), 1, 1, logits=end - start)

        first = logits_of(runner, prefill=(move(0, half),))
        return torch.cat([first, *(logits_of(runner, (move(i, i + 1),)) for i in range(half, len(ids)))])


def release(root: Path, moe: bool, tokens: int = 80, scale_dtype: torch.dtype = torch.bfloat16, **sizes) -> Release:
    """The first random release of a fixed series in which no token's experts are nearly tied, with an MTP head."""
    for seed in range(20):
        made = oracle(Shape(moe=moe), seed, **sizes)
        made.save_pretrained(root / "saved")
        add_head(root / "saved")
        official, plain = quantised(root / "saved", scale_dtype)
        shutil.copytree(root / "saved", root / "plain", dirs_exist_ok=True)
        save_file(plain, root / "plain" / "model.safetensors", metadata={"format": "pt"})
        ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))
        logits = oracle_logits(type(made).from_pretrained(root / "plain", dtype=torch.float32).eval(), ids)
        if logits is not None:
            return Release(official, official.write(root / "official"), root / "plain", ids, logits)
    raise AssertionError("twenty near-ties in a row: the router of the test models is too narrow")


def load(directory: Path, quantization: str = "auto", dtype: torch.dtype = torch.float32, mtp: bool = False) -> Qwen3_5:
    config = with_formats(ModelConfig.from_directory(directory), directory, quantization)
    model = Qwen3_5.empty(config, dtype, CPU, mtp=mtp)
    load_weights(model, directory, progress=False)
    return model
