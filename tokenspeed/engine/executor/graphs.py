"""Decode steps on a GPU as CUDA graphs: two launches in place of hundreds, with the batch padded to a few sizes.

Ranks capture the same sizes in the same order, and their collectives with them: the run before each capture uses every
collective at its size once, so that nothing is connected or allocated inside.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ... import ops
from ..schedule.step import DecodeRow, Step
from .batch import Forwarded, pack_rows, to_device

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Decoding(Protocol):
    """What is captured, of a `Runner`."""

    def decode_forward(self, packed: Tensor, width: int) -> Forwarded: ...

    def choose_plainly(self, forwarded: Forwarded, drafts: int, greedy: bool = False) -> Tensor: ...


class _Captured(NamedTuple):
    """forward: up to the logits; choose: the rest of the step, by the number of drafts it makes and by whether it is
    greedy; packed: the input."""

    packed: Tensor
    forward: torch.cuda.CUDAGraph
    forwarded: Forwarded
    choose: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]]


class DecodeGraphs:
    """Decode rows of one token, and of as many as there are drafts at that size, captured once per batch size."""

    def __init__(
        self,
        runner: Decoding,
        device: torch.device,
        nobody: int,
        greedy: Sequence[bool],
        depths: Callable[[int], int],
        progress: bool,
    ):
        """Captures every size, the largest first, so that all share its memory. Padding rows alone run meanwhile: no
        page and no slot changes. nobody: the index of padding rows, behind those of all sequences; greedy: for which
        values of `choose_plainly`'s a graph is needed; depths: drafts by the number of sequences. Raises `ops.NoKernel`
        where no kernel serves an operator, before anything is captured (torch's allocator does not recover from a
        capture that fails), RuntimeError where a capture fails."""
        self._device, self._nobody = device, nobody
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._packed: dict[tuple[int, int], tuple[DecodeRow, ...]] = {}  # what stands in each input
        self._pool = None
        self._sizes = [size for size in _SIZES if size < self._nobody] + [self._nobody]
        shapes = [(size, width) for size in reversed(self._sizes) for width in sorted({1, 1 + depths(size)})]
        with ops.strict():
            runner.decode_forward(to_device(pack_rows((), 1, self._nobody), self._device), 1)
        for size, width in tqdm(shapes, desc="capturing decode", unit="graph", disable=not progress):
            packed = to_device(pack_rows((), size, self._nobody), self._device)
            forward, forwarded = self._capture(lambda packed=packed, width=width: runner.decode_forward(packed, width))
            drafts = depths(size)
            choose = {
                (drafts, kind): self._capture(
                    lambda f=forwarded, drafts=drafts, kind=kind: runner.choose_plainly(f, drafts, kind)
                )
                for kind in greedy
            }
            self._captured[size, width] = _Captured(packed, forward, forwarded, choose)

    def forward(self, step: Step) -> Forwarded | None:
        """Of the decode rows, and padding behind them, until the next call; None for a step that was not captured."""
        key, captured = self._find(step)
        if captured is None:
            return None
        if self._packed.get(key) != step.decode:
            rows = to_device(pack_rows(step.decode, key[0], self._nobody), self._device)
            captured.packed.copy_(rows, non_blocking=True)
            self._packed[key] = step.decode
        captured.forward.replay()
        return captured.forwarded._replace(logits=captured.forwarded.logits[: step.tokens])

    def choose(self, step: Step, greedy: bool) -> Tensor | None:
        """What `Runner.choose_plainly` gives behind the last `forward`; None for drafts that were not captured."""
        _, captured = self._find(step)
        found = captured and captured.choose.get((step.drafts, greedy))
        if not found:
            return None
        graph, news = found
        graph.replay()
        return news[: len(step.decode)]

    def _find(self, step: Step) -> tuple[tuple[int, int], _Captured | None]:
        key = next(size for size in self._sizes if size >= len(step.decode)), step.width
        return key, self._captured.get(key)

    def _capture(self, run: Callable) -> tuple:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # loads modules and fills caches of the libraries outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: NCCL's looks whether earlier collectives are complete.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        graph.replay()  # capturing computes nothing, and whoever is captured next reads this result
        self._pool = self._pool or graph.pool()
        return graph, result
