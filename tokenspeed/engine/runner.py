"""Runs Steps on one device."""

import torch
from torch import Tensor

from .batch import build_batch
from .memory import Memory
from .model.qwen3_5 import Qwen3_5
from .step import Step


class Runner:
    """A model, its memory, and the forward pass over them."""

    def __init__(self, model: Qwen3_5, memory: Memory):
        self.model, self.memory = model, memory
        self._rotary = model.rotary(memory.kv.device)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Logits of the rows' last tokens, decode rows first, [L, vocab]. Mutates the arenas as the Step says."""
        return self.model(build_batch(step, self.memory, *self._rotary))
