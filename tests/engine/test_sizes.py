"""Every published size, by configuration alone."""

from math import prod

import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from tokenspeed.engine.config import DenseConfig, ModelConfig
from tokenspeed.engine.executor.memory import MemoryLayout
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.sizes import PUBLISHED

# name: GB of bf16 weights read by a decode step; MiB of fp32 state a sequence; KiB of bf16 KV a token (published table)
TABLE = {
    "0.8B": (1.51, 18, 12),
    "2B": (3.76, 18, 12),
    "4B": (8.41, 48, 32),
    "9B": (15.9, 48, 32),
    "27B": (51.2, 144, 64),
    "35B-A3B": (5.89, 60, 20),
    "122B-A10B": (18.0, 144, 24),
    "397B-A17B": (32.7, 180, 30),
}


def transformers_model(config: ModelConfig):
    common = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": len(config.layer_types),
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "linear_num_key_heads": config.key_heads,
        "linear_num_value_heads": config.value_heads,
        "tie_word_embeddings": config.tied,
    }
    ffn = config.ffn
    if isinstance(ffn, DenseConfig):
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**common, intermediate_size=ffn.intermediate))
    moe = {"num_experts": ffn.experts, "num_experts_per_tok": ffn.top_k, "moe_intermediate_size": ffn.intermediate}
    return Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(**common, **moe, shared_expert_intermediate_size=ffn.shared_intermediate)
    )


def parameters(model) -> int:
    """Without the rows that fill a weight up."""
    distinct = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() - getattr(p, "padding", 0) * p.shape[-1] for p in distinct)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size_builds_on_meta_with_the_published_parameter_count(name):
    model = Qwen3_5.empty(PUBLISHED[name], torch.bfloat16, torch.device("meta"))
    with torch.device("meta"):
        assert parameters(model) == parameters(transformers_model(PUBLISHED[name]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_bytes_follow_from_the_layout(name):
    config = PUBLISHED[name]
    decode_gb, state_mib, kv_kib = TABLE[name]
    model = Qwen3_5.empty(config, torch.bfloat16, torch.device("meta"))
    layout = MemoryLayout(model.config, torch.bfloat16)
    assert layout.recurrent_bytes == state_mib * 2**20
    assert layout.kv_token_bytes == kv_kib * 2**10
    read = 0
    for key, shape, _ in model.sources("model."):
        if ".experts." in key and not key.endswith(("gate_up_proj", "down_proj")):
            continue  # the same memory under its other name
        share = config.ffn.top_k / config.ffn.experts if ".experts." in key else 1
        embedding_unread = "embed_tokens" in key and not config.tied
        read += 0 if embedding_unread else prod(shape) * 2 * share
    assert read / 1e9 == pytest.approx(decode_gb, rel=0.01)
