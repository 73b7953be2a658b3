"""Ranks as threads of this process: the collectives of a mesh for tests that need many of them, quickly."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import GROUPS, Mesh

Result = TypeVar("Result")
_SECONDS = 60  # a rank that waits longer for another one has found a bug


class Meeting:
    """Where the ranks of one group exchange tensors."""

    def __init__(self, ranks: int):
        self.barrier, self.values = Barrier(ranks), [None] * ranks

    def exchange(self, place: int, value: Tensor) -> list[Tensor]:
        self.values[place] = value.clone()
        self.barrier.wait(_SECONDS)
        values = list(self.values)
        self.barrier.wait(_SECONDS)
        return values


class ThreadCommunicator(Communicator):
    """payload: bytes this rank has put into sums and gathers."""

    def __init__(self, mesh: Mesh, meetings: dict[tuple[str, tuple[int, ...]], Meeting]):
        super().__init__(mesh)
        self.payload = 0
        self._meetings = {name: m for (name, ranks), m in meetings.items() if mesh.rank in ranks}

    def _exchange(self, x: Tensor, group: str) -> list[Tensor]:
        self.payload += x.nbytes
        return self._meetings[group].exchange(self.mesh.place(group), x)

    def all_reduce(self, x: Tensor, group: str, largest: bool = False) -> Tensor:
        terms = torch.stack(self._exchange(x, group))
        return x.copy_(terms.amax(0) if largest else terms.sum(0))

    def add_rms_norm(self, x, residual, weight, eps, group):
        if len(x) <= 2:  # so that both ways are gone
            return None
        return ops.add_rms_norm(self.all_reduce(x, group), residual, weight, eps)

    def all_gather(self, x: Tensor, dim: int, group: str) -> Tensor:
        return torch.cat(self._exchange(x, group), dim)

    def reduce_scatter(self, x: Tensor, dim: int, group: str) -> Tensor:
        total = torch.stack(self._exchange(x, group)).sum(0)
        return total.chunk(self.mesh.size(group), dim)[self.mesh.place(group)]


def run_ranks(mesh: Mesh, work: Callable[[ThreadCommunicator], Result]) -> list[Result]:
    """Do the work on every rank of the mesh side by side; results in order of rank."""
    meetings = {(name, ranks): Meeting(len(ranks)) for name in GROUPS for ranks in mesh.members(name)}

    def one(rank: int) -> Result:
        try:
            return work(ThreadCommunicator(replace(mesh, rank=rank), meetings))
        except BaseException:
            for meeting in meetings.values():
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(mesh.world) as pool:
        futures = [pool.submit(one, rank) for rank in range(mesh.world)]
    errors = [future.exception() for future in futures if future.exception()]
    for error in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error  # the first cause, not those who waited for it
    return [future.result() for future in futures]
