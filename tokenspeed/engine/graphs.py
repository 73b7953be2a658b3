"""Decode steps on a GPU as CUDA graphs: one launch in place of hundreds, with the batch padded to a few sizes."""

import torch
from torch import Tensor
from tqdm import tqdm

from .batch import DecodeColumns, Tables, decode_batch, pack_rows, to_device
from .memory import Memory
from .model.qwen3_5 import Qwen3_5
from .step import NextStep, Step

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class DecodeGraphs:
    """The forward pass of up to `most` decode rows, captured once per batch size."""

    def __init__(
        self, model: Qwen3_5, memory: Memory, tables: Tables, rotary: tuple[Tensor, float], most: int, progress: bool
    ):
        """Captures every size, the largest first, so that all share its memory. Padding rows alone run meanwhile: no
        page and no slot changes. Raises RuntimeError where an operator cannot be captured."""
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._device = memory.kv.device
        pool = None
        sizes = [size for size in _SIZES if size < most] + [most]
        for size in tqdm(
            reversed(sizes), total=len(sizes), desc="capturing decode", unit="graph", disable=not progress
        ):
            packed = to_device(pack_rows((), size), self._device)

            def run(packed: Tensor = packed) -> Tensor:
                return model(decode_batch(packed, memory, tables, *rotary)).logits

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # loads modules and fills caches of the libraries outside the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = run()
            pool = pool or graph.pool()
            self._graphs[size] = graph, packed, logits
        self._sizes = sizes

    def forward(self, step: Step | NextStep, columns: DecodeColumns) -> Tensor:
        """Logits of the step's B decode rows, [B, vocab]; the next call overwrites them."""
        size = next(size for size in self._sizes if size >= step.tokens)
        graph, packed, logits = self._graphs[size]
        packed.copy_(to_device(columns.of(step, size), self._device), non_blocking=True)
        graph.replay()
        return logits[: step.tokens]
