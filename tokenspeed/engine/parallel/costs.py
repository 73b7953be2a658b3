"""What a sum over ranks costs in a prefill, by one all-reduce or in parts: measured at start, and which is taken."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ... import ops
from .mesh import Mesh

ALL_REDUCE, IN_PARTS = "all-reduce", "reduce-scatter + all-gather"
_SHIFTS = (6, 4, 2, 0)  # of the largest number of tokens: the sizes that are measured
_ROUNDS, _WARM_UP, _CALLS = 7, 2, 4
_MARGIN = 0.95  # in parts must be faster by more than what two measurements of one thing differ by
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds of the sum of [tokens, hidden] over `group` with the norm behind it, at ascending numbers of tokens.

    all_reduce: one all-reduce, and the norm of every token on every rank; in_parts: a reduce-scatter, the norm of this
    rank's tokens, and an all-gather of the norms. Alike on every rank, or ranks would run different collectives.
    """

    group: str
    tokens: tuple[int, ...]
    all_reduce: tuple[float, ...]
    in_parts: tuple[float, ...]

    def pick(self, tokens: int) -> str:
        """ALL_REDUCE or IN_PARTS. Below the smallest size that was measured it is the former."""
        if tokens < self.tokens[0]:
            return ALL_REDUCE
        faster = self._at(self.in_parts, tokens) < _MARGIN * self._at(self.all_reduce, tokens)
        return IN_PARTS if faster else ALL_REDUCE

    def _at(self, us: tuple[float, ...], tokens: int) -> float:
        """Between two sizes on the line between them, beyond the last in proportion to it."""
        for (low, first), (high, last) in pairwise(zip(self.tokens, us, strict=True)):
            if tokens <= high:
                return first + (last - first) * (tokens - low) / (high - low)
        return us[-1] * tokens / self.tokens[-1]

    def __str__(self) -> str:
        """The table with its picks, a line."""
        rows = zip(self.tokens, self.all_reduce, self.in_parts, strict=True)
        told = "; ".join(f"{n} tokens {one:.0f} or {parts:.0f} us: {self.pick(n)}" for n, one, parts in rows)
        return f"sums of a prefill over {self.group}, by {ALL_REDUCE} or {IN_PARTS}: {told}"


def always_in_parts(mesh: Mesh) -> Costs:
    """Under which every number of tokens is summed in parts."""
    return Costs(mesh.canonical("world"), (1,), (2.0,), (1.0,))


def never_in_parts(mesh: Mesh) -> Costs:
    return Costs(mesh.canonical("world"), (1,), (1.0,), (2.0,))


class Sums(Protocol):
    """What is measured: the collectives of a `Communicator`."""

    mesh: Mesh

    def all_reduce(self, x: Tensor, group: str, largest: bool = False) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor] | None: ...

    def add_rms_norm_in_parts(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor]: ...


def measure(
    communicator: Sums,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    progress: bool,
) -> Costs:
    """The costs of up to `max_tokens` between these ranks, which all call it alike. A few milliseconds on a GPU."""
    group = communicator.mesh.canonical("world")
    sizes = tuple(dict.fromkeys(max(max_tokens >> shift, communicator.mesh.world) for shift in _SHIFTS))
    weight = torch.zeros(hidden, dtype=dtype, device=device)
    found: dict[str, list[float]] = {ALL_REDUCE: [], IN_PARTS: []}
    for tokens in tqdm(sizes, desc="measuring sums", unit="size", disable=not progress, file=sys.stderr):
        x, residual = (torch.zeros(tokens, hidden, dtype=dtype, device=device) for _ in range(2))
        part = residual[: -(-tokens // communicator.mesh.world)]

        def whole(x: Tensor = x, residual: Tensor = residual) -> None:
            if communicator.add_rms_norm(x, residual, weight, _EPS, group) is None:
                ops.add_rms_norm(communicator.all_reduce(x, group), residual, weight, _EPS)

        def in_parts(x: Tensor = x, part: Tensor = part) -> None:
            communicator.add_rms_norm_in_parts(x, part, weight, _EPS, group)

        found[ALL_REDUCE].append(microseconds(whole, device))
        found[IN_PARTS].append(microseconds(in_parts, device))
        del x, residual, part, whole, in_parts
    if device.type == "cuda":
        torch.cuda.empty_cache()  # before what is free is measured
    table = torch.tensor(list(found.values()), dtype=torch.float32, device=device)
    one, parts = communicator.all_reduce(table, group, largest=True).tolist()  # of the slowest rank
    return Costs(group, sizes, tuple(one), tuple(parts))


def microseconds(
    work: Callable[[], None],
    device: torch.device,
    warm_up: int = _WARM_UP,
    rounds: int = _ROUNDS,
    calls: int = _CALLS,
) -> float:
    """Of one call among several in a row, since a step does not wait for each: the median of some rounds."""
    times = []
    for _ in range(warm_up + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(times[warm_up:])
