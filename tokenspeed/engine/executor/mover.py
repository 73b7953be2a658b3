"""Copies between the device's arenas and host memory, beside the Steps: started in order, never waited for by a Step.

A move is whole pages and one slot, each a contiguous piece of both arenas; neighbouring pages go as one. On a GPU each
direction has a stream of its own, and host memory is pinned. On a CPU host memory is a second arena, and a move is
copied when somebody asks what is finished: later than it was started, as on a GPU.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..schedule.step import Move
from .memory import HostMemory, Memory

_SMOOTHING = 0.2  # weight of the latest move in the measured rate


class _Started(NamedTuple):
    move: Move
    begin: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None


class Mover:
    """One rank's. `rate`: bytes per second of the moves so far, None before the first."""

    def __init__(self, memory: Memory, host: HostMemory, leads: bool = True):
        """leads: rank 0, whose cache decides moves from what its own device has done. Another rank may be behind it,
        and starts a move behind the Steps that were launched before."""
        self._memory, self._host, self._leads = memory, host, leads
        self._started: deque[_Started] = deque()
        self.rate: float | None = None
        device = memory.kv.device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None

    def launch(self, moves: Sequence[Move]) -> None:
        """Start moves, in order."""
        for move in moves:
            self._started.append(self._start(move) if self._streams else _Started(move))

    def finished(self) -> list[int]:
        """Numbers of the moves that are done and were not named before. Waits for nothing."""
        done = [started for started in self._started if started.end is None or started.end.query()]
        for started in done:
            self._started.remove(started)
        return [self._finish(started) for started in done]

    def wait(self) -> None:
        """Until one more is done: the first from host memory, which somebody waits for, else the first."""
        if self._started and self._streams:
            next((started for started in self._started if not started.move.out), self._started[0]).end.synchronize()

    def settle(self, numbers: Iterable[int]) -> None:
        """What is launched from now on comes behind these moves, which rank 0 knows to be done."""
        for number in numbers:
            found = next((started for started in self._started if started.move.number == number), None)
            if found is None:  # rank 0 saw it done
                continue
            self._started.remove(found)
            if found.end is None:
                self._copy(found.move)
            else:
                torch.cuda.current_stream(self._memory.kv.device).wait_event(found.end)

    def _start(self, move: Move) -> _Started:
        stream = self._streams[move.out]
        if not self._leads:
            stream.wait_stream(torch.cuda.current_stream(self._memory.kv.device))
            stream.wait_stream(self._streams[not move.out])
        started = _Started(move, *(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        with torch.cuda.stream(stream):
            started.begin.record()
            self._copy(move)
            started.end.record()
        return started

    def _finish(self, started: _Started) -> int:
        if started.end is None:
            begin = time.perf_counter()
            self._copy(started.move)
            seconds = time.perf_counter() - begin
        else:
            seconds = started.begin.elapsed_time(started.end) / 1e3
        rate = self.bytes(started.move) / max(seconds, 1e-9)
        self.rate = rate if self.rate is None else self.rate + _SMOOTHING * (rate - self.rate)
        return started.move.number

    def bytes(self, move: Move) -> int:
        layout = self._memory.layout
        return len(move.sources) * layout.page_bytes + layout.slot_bytes

    def _copy(self, move: Move) -> None:
        device, host = self._memory, self._host
        source, target = (device, host) if move.out else (host, device)
        for first, second, count in page_runs(move.sources, move.targets):
            copy(source.pages[first : first + count], target.pages[second : second + count])
        copy(source.slots[move.source], target.slots[move.target])


def copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def page_runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, pages) of stretches that are contiguous on both sides."""
    start = 0
    for i in range(1, len(sources) + 1):
        if i < len(sources) and sources[i] - sources[i - 1] == targets[i] - targets[i - 1] == 1:
            continue
        yield sources[start], targets[start], i - start
        start = i
