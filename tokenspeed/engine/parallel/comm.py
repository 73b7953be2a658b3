"""Collectives over the groups of a mesh: torch.distributed between processes, or local stand-ins for one rank alone."""

import contextlib
import copy
import os
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ..errors import ConfigError
from . import costs, peers
from .mesh import GROUPS, Mesh

# torch 2.13 renamed both; the old names warn there, the new ones are not in 2.11.
_all_gather: Callable = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_LEAVING_SECONDS = 5.0
STAGED_ROWS = 8  # of a batch whose residual sum and norm are one launch with the product behind them already
_opened: list[peers.PeerKernel] = []  # of this process


class Communicator:
    """The collectives of one rank, alone in its process: local stand-ins with the shapes of the real ones.

    With a mesh of one rank they are exact. With more, a rank's work and memory are real and its results are not the
    model's: the other terms of a sum count as zero, the other slices of a gather as copies of this one's.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.costs: costs.Costs | None = None  # of the sums of a prefill, where they were measured

    def describe(self) -> str:
        if self.mesh.world == 1:
            return "one rank"
        return (
            f"rank {self.mesh.rank} of {self.mesh.world} ALONE: collectives are local no-ops, "
            "so times and bytes are real and results are not the model's"
        )

    def prepare(
        self,
        width: int,
        device: torch.device,
        tokens: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        progress: bool = False,
    ) -> None:
        """Sums of [N, width] in `dtype` will follow. Every rank calls it alike, before what is free is measured.
        tokens: the largest N of a prefill; 0: which sums are fast for it need not be measured."""

    def check(self) -> None:
        """Raises EngineError where another rank did not bring its part of a sum: results are not to be trusted."""

    def all_reduce(self, x: Tensor, group: str, largest: bool = False) -> Tensor:
        """The sum (or the largest) of every rank's x. Mutates x and returns it."""
        return x

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor] | None:
        """`ops.add_rms_norm` of the sum of every rank's x, in one launch; None where no kernel does both."""
        return None

    def add_rms_norm_in_parts(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor]:
        """The norm of the sum of every rank's x and of the residual stream, each rank making that of its own rows.

        x: [N, H]; residual: this rank's rows of the stream, [ceil(N / ranks), H], or None, where the sum is the stream.
        Returns the norm [N, H] of all rows, and this rank's rows of the stream.
        """
        rows, ranks = len(x), self.mesh.size(group)
        padded = F.pad(x, (0, 0, 0, -rows % ranks)) if rows % ranks else x
        part = self.reduce_scatter(padded, 0, group)
        if residual is None:
            normed, stream = ops.rms_norm(part, weight, eps), part
        else:
            normed, stream = ops.add_rms_norm(part, residual, weight, eps)
        return self.all_gather(normed, 0, group)[:rows], stream

    def draws(self, logits: Tensor) -> peers.PeerDraws | None:
        """What chooses ids, in one launch, from rows whose slices every rank of the tp group holds; None where no
        kernel does. logits: this rank's slice [B, V / tp]."""
        return None

    def all_gather(self, x: Tensor, dim: int, group: str) -> Tensor:
        """Every rank's x, joined along `dim` in order of rank."""
        return torch.cat([x] * self.mesh.size(group), dim)

    def reduce_scatter(self, x: Tensor, dim: int, group: str) -> Tensor:
        """This rank's slice, along `dim`, of the sum of every rank's x."""
        return x.chunk(self.mesh.size(group), dim)[self.mesh.place(group)].contiguous()


ONE_RANK = Communicator(Mesh())


class ProcessCommunicator(Communicator):
    """The same over torch.distributed: NCCL between GPUs, gloo between CPUs. Every rank must construct it alike.

    The default process group must exist with as many ranks as the mesh, numbered as it is; see `join_ranks`. Raises
    ConfigError where it does not.
    """

    def __init__(self, mesh: Mesh):
        super().__init__(mesh)
        if not dist.is_initialized():
            raise ConfigError(f"{mesh.world} ranks are asked for, but this process has not joined any.")
        if (dist.get_world_size(), dist.get_rank()) != (mesh.world, mesh.rank):
            raise ConfigError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()}; "
                f"tp {mesh.tp} and ep {mesh.ep} make it rank {mesh.rank} of {mesh.world}."
            )
        self._groups: dict[str, dist.ProcessGroup] = {}
        for name in GROUPS:
            canonical = mesh.canonical(name)
            if canonical not in self._groups:
                self._groups[canonical] = _own_group(mesh, canonical)
            self._groups[name] = self._groups[canonical]

        self._peers: dict[str, peers.PeerSums] = {}
        self._draws: peers.PeerDraws | None = None
        self._peers_told = ""

    def describe(self) -> str:
        return f"rank {self.mesh.rank} of {self.mesh.world} over {dist.get_backend()}{self._peers_told}"

    def prepare(
        self,
        width: int,
        device: torch.device,
        tokens: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        progress: bool = False,
    ) -> None:
        if device.type != "cuda":
            return
        if not self._peers_told:
            self._connect_peers(width, device)
        if tokens and self.costs is None and self.mesh.tp == self.mesh.world > 1:
            self.costs = costs.measure(self, width, dtype, device, tokens, progress)

    def _connect_peers(self, width: int, device: torch.device) -> None:
        handles = dist.new_group(backend="gloo")

        def exchange(own: object) -> list:
            everybody = [None] * self.mesh.world
            dist.all_gather_object(everybody, own, group=handles)
            return everybody

        names = dict.fromkeys(self.mesh.canonical(name) for name in GROUPS)
        groups = [name for name in names if self.mesh.size(name) > 1]
        try:
            made = peers.connect(self.mesh, groups, width, device, exchange)
        except peers.PeerError as error:
            self._peers_told = f" alone: {error}"
            return
        _opened.extend(made.kernels)
        self._peers = {name: made.sums[self.mesh.canonical(name)] for name in GROUPS if self.mesh.size(name) > 1}
        self._draws = made.draws
        self._peers_told = " and peer memory"

    def check(self) -> None:
        for kernel in (*self._peers.values(), *([self._draws] if self._draws else [])):
            kernel.check()

    def without_peers(self) -> "ProcessCommunicator":
        """The same groups, and everything over them by torch.distributed."""
        plain = copy.copy(self)
        plain._peers, plain._draws, plain._peers_told = {}, None, " alone"
        return plain

    def connect(self, device: torch.device) -> None:
        """Use every group once: NCCL connects and allocates at a group's first use, which must not fall into the
        capture of a CUDA graph, nor behind the measurement of free memory."""
        for canonical in dict.fromkeys(self.mesh.canonical(name) for name in GROUPS):
            self.all_reduce(torch.zeros(1, device=device), canonical)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def close(self) -> None:
        """Leave the groups; CUDA graphs that hold their collectives must be gone. Waits a few seconds at most where
        other ranks are lost."""
        leaving = threading.Thread(target=_quietly, args=(dist.destroy_process_group,), daemon=True)
        leaving.start()
        leaving.join(_LEAVING_SECONDS)

    def all_reduce(self, x: Tensor, group: str, largest: bool = False) -> Tensor:
        sums = self._peers.get(group)
        if sums and not largest and sums.serves(x):
            return sums.all_reduce(x)
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._groups[group])
        return x

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
    ) -> tuple[Tensor, Tensor] | None:
        sums = self._peers.get(group)
        if sums is None or len(x) <= STAGED_ROWS or not sums.serves(x) or not residual.is_contiguous():
            return None
        return sums.add_rms_norm(x, residual, weight, eps)

    def draws(self, logits: Tensor) -> peers.PeerDraws | None:
        return self._draws if self._draws and self._draws.serves(logits) else None

    def all_gather(self, x: Tensor, dim: int, group: str) -> Tensor:
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty(self.mesh.size(group) * x.shape[0], *x.shape[1:])
        _all_gather(out, x, group=self._groups[group])
        return out.movedim(0, dim)

    def reduce_scatter(self, x: Tensor, dim: int, group: str) -> Tensor:
        x = x.movedim(dim, 0).contiguous()
        out = x.new_empty(x.shape[0] // self.mesh.size(group), *x.shape[1:])
        _reduce_scatter(out, x, group=self._groups[group])
        return out.movedim(0, dim)


def join_ranks(mesh: Mesh, device: torch.device, address: str, timeout_s: float = 600) -> ProcessCommunicator:
    """Make this process rank `mesh.rank` of the default process group and return its collectives.

    address: where ranks meet, as torch.distributed takes it: tcp://host:port, file:///path or env://. Raises
    ConfigError where the backend of the device is not in this build of torch, and where the ranks do not meet.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise ConfigError(f"this build of torch has no {backend}, which {device.type} ranks need.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast: it pays for large sums, and decode's are small
    try:
        dist.init_process_group(
            backend,
            init_method=address,
            rank=mesh.rank,
            world_size=mesh.world,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        communicator = ProcessCommunicator(mesh)
        communicator.connect(device)
    except RuntimeError as error:  # of which torch.distributed's are
        reason = str(error).splitlines()[0]
        raise ConfigError(f"rank {mesh.rank} of {mesh.world} did not meet the others at {address}: {reason}") from error
    return communicator


def abort() -> None:
    """Let this process's collectives on a GPU end, with any result, though a rank that they wait for is lost. Returns
    at once."""
    for kernel in _opened:
        kernel.stop()
    if dist.is_initialized() and dist.get_backend() == "nccl":  # gloo notices by itself
        work = dist.distributed_c10d._abort_process_group
        threading.Thread(target=_quietly, args=(work,), name="tokenspeed-abort", daemon=True).start()


def _own_group(mesh: Mesh, name: str) -> dist.ProcessGroup:
    """The group of that name which this rank is in; every rank takes part in making every group."""
    if mesh.size(name) == mesh.world:
        return dist.group.WORLD
    made = [(ranks, dist.new_group(list(ranks))) for ranks in mesh.members(name)]
    return next(group for ranks, group in made if mesh.rank in ranks)


def _quietly(work: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # of groups that are gone or half gone
        work()
