"""Small random checkpoints in the published layout, written and judged by `transformers`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from tokenspeed.engine.config import ModelConfig
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.model.weights import load_weights

CPU = torch.device("cpu")
VOCAB = 300


@dataclass(frozen=True)
class Shape:
    """One architecture under test. group: value heads per key head; gqa: query heads per kv head."""

    moe: bool = False
    group: int = 2
    gqa: int = 4
    tied: bool = False
    layers: int = 4

    def __str__(self) -> str:
        return f"{'moe' if self.moe else 'dense'}-nv/nk{self.group}-gqa{self.gqa}-{'tied' if self.tied else 'untied'}"


def oracle(shape: Shape, seed: int = 0, **overrides) -> torch.nn.Module:
    """A `transformers` model with random weights whose every parameter matters."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 2 * shape.gqa,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2 * shape.group,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "pad_token_id": None,
        "eos_token_id": 7,
    }
    if shape.moe:
        settings |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
        settings |= {"shared_expert_intermediate_size": 48}
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings | overrides))
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings | {"intermediate_size": 96} | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(noise.clamp(-2, 1.5))
            elif parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                # A wide router keeps near-ties rare; the rest is small enough that rounding is not amplified.
                gain = 0.5 if "conv1d" in name else (2.0 if "mlp.gate." in name else 0.5) * parameter.shape[-1] ** -0.5
                parameter.copy_(noise * gain)
    return model.eval()


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Qwen3_5:
    model = Qwen3_5.empty(ModelConfig.from_directory(directory), dtype, CPU)
    load_weights(model, directory, progress=False)
    return model


@torch.no_grad()
def oracle_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of every position of one sequence; None where the router came so near to a tie that two correct
    implementations may send a token to different experts."""
    gaps: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):

            def record(router, inputs, output):
                scores = torch.nn.functional.linear(inputs[0].reshape(-1, router.weight.shape[1]), router.weight)
                best = scores.float().softmax(-1).sort(descending=True).values
                gaps.append((best[:, router.top_k - 1] - best[:, router.top_k]).min())

            hooks.append(layer.mlp.gate.register_forward_hook(record))
    logits = model(ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return None if gaps and min(gaps) < 2e-5 else logits


def oracle_without_ties(shape: Shape, tokens: int, **overrides) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The first random model and prompt of a fixed series without a near-tie: model, ids, logits of every position."""
    for seed in range(20):
        model = oracle(shape, seed, **overrides)
        ids = torch.randint(0, VOCAB, (tokens,), generator=torch.Generator().manual_seed(seed))
        logits = oracle_logits(model, ids)
        if logits is not None:
            return model, ids, logits
    raise AssertionError("twenty near-ties in a row: the router of the test models is too narrow")
