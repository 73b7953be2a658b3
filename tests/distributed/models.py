"""Small random checkpoints whose dimensions split over up to four ranks, and one rank's run over them."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.executor.batch import Rotary, build_batch
from tokenspeed.engine.executor.loading import slot_sizes
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import holds_mtp, load_weights, with_formats
from tokenspeed.engine.parallel import sampling
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.quantization import products_of
from tokenspeed.ops.fp8 import quantise_blocks

from ..driving import Move, place, step_of

CPU = torch.device("cpu")
# Sizes whose quarters are whole blocks of 128, for weights in FP8.
BLOCKS = {
    "hidden_size": 192,
    "head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
VOCAB = 300  # a quarter of it is no multiple of 4: a rank's noise starts inside a group of four words


def config(moe: bool, kv_heads: int, tied: bool = False, **changes) -> dict:
    """config.json of four layers; 8 query heads, so with 2 kv heads four ranks hold each of them twice. changes: other
    values, and `mtp_num_hidden_layers` for an MTP head."""
    ffn = {"intermediate_size": 96}
    if moe:
        ffn = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        ffn["shared_expert_intermediate_size"] = 48
    return {
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "rope_parameters": {"rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        **ffn,
        **changes,
    }


def write_checkpoint(directory: Path, raw: dict, fused_experts: bool = False) -> Path:
    """Random weights, each of a size that keeps activations near one, in one of the two layouts of experts."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    whole = Qwen3_5.empty(ModelConfig.from_dict(raw), torch.float32, torch.device("meta"), mtp=True)
    for key, shape, _ in whole.sources("model."):
        if ".experts." in key and key.endswith("_proj") != fused_experts:
            continue
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[key] = 0.3 * noise
        else:
            # A wide router keeps near-ties rare: a tie may fall either way where sums are rounded differently.
            gain = 0.5 if "conv1d" in key else (4.0 if "mlp.gate." in key else 0.7) * shape[-1] ** -0.5
            tensors[key] = gain * noise
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_fp8_checkpoint(directory: Path, raw: dict) -> Path:
    """The same in the layout of FP8 releases: e4m3 weights and the scales of their blocks, experts one by one."""
    write_checkpoint(directory, raw)
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if products_of(key)]:
        tensors[key], tensors[f"{key}_scale_inv"] = quantise_blocks(tensors[key])
    save_file(tensors, directory / "model.safetensors")
    return directory


def load(directory: Path, communicator: Communicator, quantization: str = "auto") -> Qwen3_5:
    """A rank's part, with the MTP head where there is one."""
    config = with_formats(ModelConfig.from_directory(directory), directory, quantization)
    model = Qwen3_5.empty(config, torch.float32, CPU, communicator, mtp=holds_mtp(config, directory))
    load_weights(model, directory, progress=False)
    return model


def steps(vocab: int) -> list[tuple[tuple[Move, ...], tuple[Move, ...]]]:
    """Ragged prefills with a snapshot, a resume from it beside decoding rows, then decode alone, the
    last of two tokens each: (decode, prefill) of each pass."""
    ids = torch.randint(0, vocab, (2, 90), generator=torch.Generator().manual_seed(5)).tolist()

    def row(sequence: int, start: int, end: int, **rest) -> Move:
        places = {"pages": ((4, 1), (0, 3))[sequence], "read_slot": sequence, "write_slot": sequence}
        return Move(tuple(ids[sequence][start:end]), start, index=sequence, **places | rest)

    resumed = row(0, 20, 30, pages=(4, 2), read_slot=2, write_slot=3, kv_tokens=64, logits=10)._replace(index=2)
    return [
        ((), (row(0, 0, 70, snapshots=((20, 2),), logits=70), row(1, 0, 33))),
        ((row(0, 70, 71),), (row(1, 33, 40, logits=7), resumed)),
        ((row(0, 71, 72), row(1, 40, 41)), ()),
        ((row(1, 41, 43), row(0, 72, 74)), ()),
    ]


@dataclass(frozen=True)
class Outcome:
    """Per step: whole logits, greedy ids, sampled ids. drafts: whole logits and states of the MTP head, in turn."""

    logits: list[Tensor]
    greedy: list[Tensor]
    sampled: list[Tensor]
    drafts: list[Tensor] = field(default_factory=list)


def sampling_values(rows: int) -> tuple[Tensor, ...]:
    """Temperature, top-k, top-p, min-p, seed and output of each row; every fifth row is greedy."""
    row = torch.arange(rows)
    temperature = torch.where(row % 5 == 0, 0.0, 0.6 + 0.1 * (row % 7))
    top_p = torch.where(row % 2 == 0, 0.9, 1.0)
    return temperature, (row % 3 * 20).int(), top_p, 0.02 * (row % 4), row * 7919 + 2**40, row


def new_runner(model: Qwen3_5) -> Runner:
    layout = MemoryLayout(model.share, torch.float32, *slot_sizes(model.config, 1, kernel=False))
    return Runner(model, Memory(layout, pages=5, slots=4, device=CPU))


@torch.inference_mode()
def drafts(model: Qwen3_5) -> list[Tensor]:
    """Two drafts for each step with a prompt, whole logits and states of each: the second from the first's states."""
    runner, found = new_runner(model), []
    for moves in steps(model.config.vocab)[:2]:
        place(runner, moves[0])
        step = step_of(*moves)
        runner.tables.add_pages(step.pages)
        batch = build_batch(step, runner.memory, runner.tables, Rotary(*model.rotary(CPU)))
        hidden = model(batch).hidden
        for draft in (1, 2):
            rows = replace(batch, tokens=(batch.tokens + 7 * draft) % model.config.vocab)
            logits, hidden = model.mtp(rows, hidden)
            found += [model.communicator.all_gather(logits, 1, "tp"), hidden]
    return found


def run(communicator: Communicator, directory: Path) -> Outcome:
    """Feed the steps to one rank's runner."""
    model = load(directory, communicator)
    outcome = Outcome([], [], [], drafts(model) if model.mtp else [])
    runner = new_runner(model)
    for decode, prefill in steps(model.config.vocab):
        place(runner, decode)
        logits = runner.forward(step_of(decode, prefill)).logits
        outcome.greedy.append(sampling.greedy(logits, communicator))
        outcome.sampled.append(sampling.sample(logits, *sampling_values(len(logits)), communicator))
        outcome.logits.append(communicator.all_gather(logits, 1, "tp"))
    return outcome


def check(outcomes: list[Outcome], expected: Outcome, tolerance: float = 1e-4) -> None:
    """Every rank has the logits of one process, and one id for all of them, the one `ops.sample` gives."""
    for outcome in outcomes:
        for i, logits in enumerate(outcome.logits):
            assert (logits - expected.logits[i]).abs().max() <= tolerance
            assert outcome.greedy[i].tolist() == logits.argmax(-1).tolist()
            assert outcome.sampled[i].tolist() == ops.sample(logits, *sampling_values(len(logits))).tolist()
            assert outcome.sampled[i].tolist() == outcomes[0].sampled[i].tolist()
            assert torch.equal(logits, outcomes[0].logits[i]), "ranks must not drift apart by a bit"
        for ours, whole, first in zip(outcome.drafts, expected.drafts, outcomes[0].drafts, strict=True):
            assert (ours - whole).abs().max() <= tolerance
            assert torch.equal(ours, first), "ranks must not drift apart by a bit"
