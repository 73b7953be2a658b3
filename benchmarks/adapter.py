"""`python -m benchmarks.adapter [--size 0.8B ...] [--json FILE]`: transformers with the operators beside transformers.

A model of a published size with random weights, by transformers' own path (which takes flash-linear-attention where it
is installed) and by `tokenspeed.integrations.transformers.use_operators`: milliseconds of a prefill and of one decoded
token, medians, and how far the two paths' logits lie apart. On a card the swapped model first runs under strict, so a
silent fall to a torch implementation fails the run. Then the functions of flash-linear-attention's signature beside
those that transformers calls.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from tokenspeed.engine.config import DenseConfig
from tokenspeed.engine.sizes import published
from tokenspeed.integrations import fla
from tokenspeed.integrations.transformers import restore, use_operators

ROUNDS = 9


def random_model(size: str, layers: int | None, device: str) -> torch.nn.Module:
    """transformers' model of a size, bf16, weights drawn on the device. layers: fewer than the size has."""
    config = published(size)
    count = layers or len(config.layer_types)
    fields: dict[str, Any] = {
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": count,
        "layer_types": list(config.layer_types[:count]),
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "linear_num_key_heads": config.key_heads,
        "linear_num_value_heads": config.value_heads,
        "tie_word_embeddings": config.tied,
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if isinstance(config.ffn, DenseConfig):
                return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**fields, intermediate_size=config.ffn.intermediate)).eval()
            moe = config.ffn
            fields |= {"num_experts": moe.experts, "num_experts_per_tok": moe.top_k}
            fields |= {"moe_intermediate_size": moe.intermediate}
            fields |= {"shared_expert_intermediate_size": moe.shared_intermediate}
            model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**fields))
            for parameter in model.parameters():  # experts are allocated, not drawn
                if parameter.dim() == 3:
                    parameter.data.normal_(std=0.02)
            return model.eval()
    finally:
        torch.set_default_dtype(torch.float32)


def median_ms(run: Callable[[], object], device: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    once()
    return statistics.median(once() for _ in range(ROUNDS))


def measure(model: torch.nn.Module, batch: int, context: int, device: str) -> dict[str, Any]:
    """Milliseconds of a prefill and of a decoded token after it; the last logits of both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (batch, context), generator=generator).to(device)

    def prefill():
        cache = DynamicCache(config=model.config)
        return cache, model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    cache, logits = prefill()
    decoded = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    decode_ms = median_ms(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True), device)
    return {
        "prefill_ms": round(median_ms(prefill, device), 3),
        "decode_ms": round(decode_ms, 3),
        "logits": torch.cat([logits, decoded], 1).float(),
    }


def compare(size: str, layers: int | None, batch: int, context: int, device: str) -> dict[str, Any]:
    with torch.inference_mode(False):  # weights are ordinary tensors, as loaded ones are
        model = random_model(size, layers, device)
    theirs = measure(model, batch, context, device)
    if device == "cuda":
        use_operators(model, strict=True)
        model(torch.zeros(batch, 3, dtype=torch.long, device=device))  # raises where a kernel is missing
    use_operators(model)
    ours = measure(model, batch, context, device)
    restore(model)
    expected = theirs.pop("logits")
    apart = (ours.pop("logits") - expected).norm() / expected.norm()
    return {
        "size": size,
        "layers": layers or "all",
        "batch": batch,
        "context": context,
        "fla": bool(find_spec("fla")),
        "transformers": theirs,
        "operators": ours,
        "prefill_ratio": round(theirs["prefill_ms"] / ours["prefill_ms"], 3),
        "decode_ratio": round(theirs["decode_ms"] / ours["decode_ms"], 3),
        "logits_apart": round(apart.item(), 5),
    }


def compare_functions(tokens: int, device: str) -> dict[str, Any]:
    """`chunk_gated_delta_rule` of ours (both state layouts), of transformers, and of flash-linear-attention."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    q, k, v = draw(1, tokens, 16, 128), draw(1, tokens, 16, 128), draw(1, tokens, 32, 128)
    g, beta = -draw(1, tokens, 32).float().abs() * 0.1, draw(1, tokens, 32).sigmoid()
    repeat = partial(torch.repeat_interleave, repeats=2, dim=2)
    rest = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    contenders = {
        "operators [V, K]": lambda: fla.chunk_gated_delta_rule(q, k, v, g, beta, state_layout="VK", **rest),
        "operators [K, V]": lambda: fla.chunk_gated_delta_rule(q, k, v, g, beta, **rest),
        # It wants a query and a key for every head of the values, as its model repeats them.
        "transformers": lambda: torch_chunk_gated_delta_rule(repeat(q), repeat(k), v, g=g, beta=beta, **rest),
    }
    if find_spec("fla") and device == "cuda":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

        contenders["flash-linear-attention"] = lambda: theirs(q, k, v, g, beta, **rest)
    return {"tokens": tokens, "ms": {name: round(median_ms(run, device), 3) for name, run in contenders.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["0.8B"], help="published sizes (default 0.8B)")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences (default 1 8)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt (default 2048)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, help="append each row to this file (default: none)")
    options = parser.parse_args(arguments)

    def put(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        if options.json:
            with options.json.open("a") as out:
                out.write(json.dumps(row) + "\n")

    with torch.inference_mode():
        for size in options.size:
            for batch in options.batch:
                put(compare(size, options.layers, batch, options.context, options.device))
        put(compare_functions(options.context, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
