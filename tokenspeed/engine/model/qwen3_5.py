"""Qwen3.5, dense or mixture of experts, as a flat program of stages."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config import FULL, ModelConfig
from .layers import Embedding, FinalNorm, GatedAttention, GatedDeltaNet, LMHead, Norm, Stage, feed_forward
from .rope import rotary_frequencies


class Qwen3_5(nn.Module):
    """The network of one checkpoint. Built under `torch.device(...)` and a default dtype: `Qwen3_5.empty` does both."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        embedding = Embedding(config)
        program: list[tuple[str, Stage]] = [("embed_tokens", embedding)]
        for i, kind in enumerate(config.layer_types):
            mixer = ("self_attn", GatedAttention) if kind == FULL else ("linear_attn", GatedDeltaNet)
            program += [
                (f"layers.{i}.input_layernorm", Norm(config)),
                (f"layers.{i}.{mixer[0]}", mixer[1](config, i)),
                (f"layers.{i}.post_attention_layernorm", Norm(config)),
                (f"layers.{i}.mlp", feed_forward(config)),
            ]
        program += [("norm", FinalNorm(config)), ("lm_head", LMHead(config, embedding if config.tied else None))]
        self.names = [name for name, _ in program]
        self.program = nn.ModuleList(stage for _, stage in program)

    @classmethod
    def empty(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> "Qwen3_5":
        """Parameters allocated, not filled; dtype is bf16 or fp32, decays are fp32 in any case."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return cls(config)
        finally:
            torch.set_default_dtype(before)

    def sources(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Every checkpoint key below `prefix` (`model.`, say) with the part of a parameter it fills."""
        for name, stage in zip(self.names, self.program, strict=True):
            below = name if name == "lm_head" else prefix + name
            for key, part in stage.sources():
                yield f"{below}.{key}", part

    def rotary(self, device: torch.device) -> tuple[Tensor, float]:
        return rotary_frequencies(self.config.rope, device)

    def forward(self, batch: Batch) -> Tensor:
        """Logits, [L, vocab], of the tokens in batch.logit_rows. Mutates the batch's pages and slots."""
        x = residual = None
        for stage in self.program:
            x, residual = stage.forward(x, residual, batch)
        return x
