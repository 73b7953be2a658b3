"""Decode steps on a GPU as CUDA graphs: three launches in place of hundreds, with the batch padded to a few sizes.

Each of the three stands alone: a Step whose ids the host has a say in chooses them without a graph, between two that
replay.

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

    def choose_plainly(self, forwarded: Forwarded, greedy: bool = False, out: Tensor | None = None) -> Tensor: ...

    def follow(self, forwarded: Forwarded, news: Tensor | None, drafts: int, greedy: bool = False) -> None: ...


class _Captured(NamedTuple):
    """forward: up to the logits; choose: of the ids, by whether it is greedy; follow: on them, by the number of drafts
    that are made and by whether these are greedy; packed: the input; news: what was chosen."""

    packed: Tensor
    forward: torch.cuda.CUDAGraph
    forwarded: Forwarded
    news: Tensor
    choose: dict[bool, torch.cuda.CUDAGraph]
    follow: dict[tuple[int, bool], torch.cuda.CUDAGraph]


class DecodeGraphs:
    """Decode rows of one token, and of as many as drafts may be made at that size, captured once per batch size."""

    def __init__(
        self,
        runner: Decoding,
        device: torch.device,
        nobody: int,
        greedy: Sequence[bool],
        drafts: Callable[[int], Sequence[int]],
        progress: bool,
    ):
        """Captures every size, the largest first, so that all share its memory. Padding rows alone run meanwhile: no
        page and no slot changes. nobody: the index of padding rows, behind those of all sequences; greedy: for which
        values of `choose_plainly`'s a graph is needed; drafts: the numbers that may be made, by that of sequences, none
        where nothing follows. Raises `ops.NoKernel` where no kernel serves an operator, before anything is captured
        (torch's allocator does not recover from a capture that fails), RuntimeError where a capture fails."""
        self._device, self._nobody = device, nobody
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._packed: dict[tuple[int, int], tuple[DecodeRow, ...]] = {}  # what stands in each input
        self._pool = None
        self.sizes = [size for size in _SIZES if size < self._nobody] + [self._nobody]
        shapes = [(size, 1 + depth) for size in reversed(self.sizes) for depth in sorted({0, *drafts(size)})]
        with ops.strict():
            runner.decode_forward(to_device(pack_rows((), 1, self._nobody), self._device), 1)
        for size, width in tqdm(shapes, desc="capturing decode", unit="graph", disable=not progress):
            packed = to_device(pack_rows((), size, self._nobody), self._device)
            forward, forwarded = self._capture(lambda packed=packed, width=width: runner.decode_forward(packed, width))
            news = torch.zeros(size, 1 + width, dtype=torch.int64, device=self._device)
            choose, follow = {}, {}
            for kind in greedy:
                choose[kind], _ = self._capture(lambda f=forwarded, k=kind, n=news: runner.choose_plainly(f, k, n))
                for depth in drafts(size):
                    follow[depth, kind], _ = self._capture(
                        lambda f=forwarded, k=kind, n=news, d=depth: runner.follow(f, n, d, k)
                    )
            self._captured[size, width] = _Captured(packed, forward, forwarded, news, choose, follow)

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
        """What `Runner.choose_plainly` gives behind the last `forward`, until the next call; None for a step that was
        not captured."""
        _, captured = self._find(step)
        if captured is None:
            return None
        captured.choose[greedy].replay()
        return captured.news[: len(step.decode)]

    def follow(self, step: Step, news: Tensor, greedy: bool) -> bool:
        """What `Runner.follow` does behind the last `forward` and a choice, by `choose` or otherwise. False, and
        nothing is done, for a step or a number of drafts that was not captured."""
        _, captured = self._find(step)
        graph = captured and captured.follow.get((step.drafts, greedy))
        if graph is None:
            return False
        if news.data_ptr() != captured.news.data_ptr():  # what padding says does not matter: it has no pages
            captured.news[: len(news)].copy_(news)
        graph.replay()
        return True

    def replay(self, step: Step) -> None:
        """All of a step that was captured."""
        self.forward(step)
        self.follow(step, self.choose(step, False), False)

    def _find(self, step: Step) -> tuple[tuple[int, int], _Captured | None]:
        key = next(size for size in self.sizes if size >= len(step.decode)), step.width
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
