"""Sums and draws over the ranks of one host by kernels (csrc/kernels/step/all_reduce.cu and sample_ranks.cu) that write
into the other cards.

NVLink multicast has no part in it: memory is shared by CUDA's handles between processes, a store goes to one peer.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import EngineError
from .mesh import Mesh

_RANKS = 8
_TAGS = 32  # numbers of a kernel's `control` before its tags
_CLUSTER_BLOCKS = (8, 4, 2)  # of a row's draw
_WIDTH_UNIT = 256
_PATIENCE_SECONDS = 60.0
# Rows of one sum at most, by the number of ranks: every rank sends its rows to every other one.
MAX_ROWS = {2: 256, 4: 128, 8: 64}
MAX_VOCABULARY = 400_000


class _Arguments(ctypes.Structure):
    """`AllReduce` of csrc/kernels/kernels.h."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("memory", ctypes.c_void_p * _RANKS),
        ("control", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("patience_ns", ctypes.c_uint64),
        ("eps", ctypes.c_float),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("width", ctypes.c_int),
        ("max_rows", ctypes.c_int),
        ("max_width", ctypes.c_int),
    ]


class _DrawArguments(ctypes.Structure):
    """`SampleRanks` of csrc/kernels/kernels.h."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("temperature", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("memory", ctypes.c_void_p * _RANKS),
        ("control", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("patience_ns", ctypes.c_uint64),
        ("logits_stride", ctypes.c_int64),
        ("logits_are_float", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("width", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
        ("clusters", ctypes.c_int * len(_CLUSTER_BLOCKS)),
        ("max_clusters", ctypes.c_int),
        ("chunk", ctypes.c_int),
        ("vectors", ctypes.c_int),
    ]


class PeerError(Exception):
    """Cards cannot share memory; the message says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """ranks: of the group, this being the `rank`-th; rows, width: of a sum at most."""

    rank: int
    ranks: int
    rows: int
    width: int

    @property
    def whole_width(self) -> int:
        return -(-self.width // _WIDTH_UNIT) * _WIDTH_UNIT


class PeerKernel:
    """A kernel over the ranks of one group. Every rank makes the same calls in the same order."""

    def __init__(
        self, library: ctypes.CDLL, rank: int, ranks: int, memory: Sequence[int], tags: int, device: torch.device
    ):
        """memory: address of each rank's memory, all zeros, in order of rank; tags: how many the kernel counts;
        device: of this rank's tensors."""
        self._library, self._rank, self._device = library, rank, device
        # What waits look at: set [0] and they end; [1] is set where one has ended without what it waited for.
        self._status = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._control = torch.zeros(_TAGS + tags, dtype=torch.int32, device=device)
        self._always: dict = {
            "memory": (ctypes.c_void_p * _RANKS)(*memory),
            "control": self._control.data_ptr(),
            "status": self._status.data_ptr(),
            "patience_ns": int(_PATIENCE_SECONDS * 1e9),
            "rank": rank,
            "ranks": ranks,
        }

    def stop(self) -> None:
        """Let whoever waits for a rank go on without it, from any thread."""
        self._status[0] = 1

    def check(self) -> None:
        """Raises EngineError where a kernel went on without a rank."""
        if self._status[1]:
            raise EngineError("another rank did not bring its part of a step: it is lost, or stuck.")

    def _start(self, name: str, arguments: ctypes.Structure) -> None:
        launch = getattr(self._library, f"tokenspeed_{name}")
        if failed := launch(ctypes.byref(arguments), ctypes.sizeof(arguments), *self._place()):
            raise RuntimeError(f"{name}: {failed.decode()}")

    def _place(self) -> tuple[int, int]:
        """The device's number, and its stream."""
        return self._device.index, torch.cuda.current_stream(self._device).cuda_stream


class PeerSums(PeerKernel):
    """The sums of one group of ranks."""

    def __init__(self, library: ctypes.CDLL, limits: Limits, memory: Sequence[int], device: torch.device):
        """memory, device: as of `PeerKernel`."""
        super().__init__(library, limits.rank, limits.ranks, memory, limits.rows, device)
        self._limits = limits
        self._always |= {"max_rows": limits.rows, "max_width": limits.whole_width}

    def serves(self, x: Tensor) -> bool:
        """Whether the kernel sums this: a few contiguous rows [N, H] in bf16."""
        return (
            x.dtype == torch.bfloat16
            and x.dim() == 2
            and 0 < x.shape[0] <= self._limits.rows
            and x.shape[1] <= self._limits.width
            and x.shape[1] % 8 == 0
            and x.is_contiguous()
            and x.data_ptr() % 16 == 0
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, [N, H]. Mutates x and returns it."""
        self._call(x, out=x.data_ptr())
        return x

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`ops.add_rms_norm` of the sum of every rank's x; all contiguous."""
        out, total = torch.empty_like(x), torch.empty_like(x)
        pointers = {"residual": residual, "norm_weight": weight, "out": out, "total": total}
        self._call(x, eps=eps, **{name: tensor.data_ptr() for name, tensor in pointers.items()})
        return out, total

    def _call(self, x: Tensor, **arguments) -> None:
        rows, width = x.shape
        self._start("all_reduce", _Arguments(x=x.data_ptr(), rows=rows, width=width, **self._always, **arguments))


class PeerDraws(PeerKernel):
    """The ids of rows whose vocabulary is split over one group of ranks."""

    def __init__(
        self,
        library: ctypes.CDLL,
        rank: int,
        ranks: int,
        clusters: Sequence[int],
        memory: Sequence[int],
        device: torch.device,
    ):
        """clusters: of 8, 4 and 2 blocks, how many every rank can hold at once; memory, device: as of `PeerKernel`."""
        super().__init__(library, rank, ranks, memory, max(clusters), device)
        self._ranks = ranks
        self._always |= {"clusters": (ctypes.c_int * len(clusters))(*clusters), "max_clusters": max(clusters)}

    def serves(self, logits: Tensor) -> bool:
        """Whether the kernel draws from these: this rank's slice of at least one row [B, V / ranks], bf16 or fp32."""
        return (
            logits.dtype in (torch.bfloat16, torch.float32)
            and logits.dim() == 2
            and logits.shape[0] > 0
            and logits.shape[1] % 4 == 0
            and 0 < logits.shape[1] * self._ranks <= MAX_VOCABULARY
            and logits.stride(1) == 1
        )

    def greedy(self, logits: Tensor) -> Tensor:
        """The largest logit of each row, the lowest id of equals, as `ops.sample` gives it: [B] int64."""
        return self._call(logits)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seed: Tensor,
        output: Tensor,
    ) -> Tensor:
        """`ops.sample` of the whole rows, [B] int64; the tensors as there, alike on every rank."""
        named = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        named |= {"seed": seed, "output": output}
        held = {name: tensor.contiguous() for name, tensor in named.items()}
        return self._call(logits, **{name: tensor.data_ptr() for name, tensor in held.items()})

    def _call(self, logits: Tensor, **arguments) -> Tensor:
        rows, width = logits.shape
        ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
        filled = _DrawArguments(
            logits=logits.data_ptr(),
            ids=ids.data_ptr(),
            logits_stride=logits.stride(0),
            logits_are_float=logits.dtype == torch.float32,
            rows=rows,
            width=width,
            **self._always,
            **arguments,
        )
        self._start("sample_ranks", filled)
        return ids


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    for name in ("all_reduce", "sample_ranks"):
        launch, memory = (getattr(library, f"tokenspeed_{name}{suffix}") for suffix in ("", "_memory"))
        launch.restype = ctypes.c_char_p
        launch.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        memory.restype = ctypes.c_int64
    return library


@functools.cache
def compiled_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not built."""
    built = sorted((Path(__file__).parents[2]).glob("_C*.so"))
    return declare(ctypes.CDLL(str(built[0]))) if built else None


@dataclass(frozen=True, slots=True)
class Peers:
    """What was connected: the sums of each group, by its name, and the draws from a vocabulary that is split over the
    tp group, where that is more than one rank."""

    sums: dict[str, PeerSums]
    draws: PeerDraws | None

    @property
    def kernels(self) -> list[PeerKernel]:
        return [*self.sums.values(), *([self.draws] if self.draws else [])]


def connect(
    mesh: Mesh, groups: Sequence[str], width: int, device: torch.device, exchange: Callable[[object], list]
) -> Peers:
    """The sums of each of these groups, and the draws of the tp group. exchange: everybody's object, in order of rank,
    from each one's own.

    Raises PeerError, on every rank alike, where one of them cannot share memory with the others.
    """
    library = compiled_library()
    sizes = {
        group: Limits(mesh.place(group), mesh.size(group), MAX_ROWS.get(mesh.size(group), 0), width) for group in groups
    }
    offers = exchange(_offer(library, sizes, mesh.size("tp"), device))
    _agree([offer if isinstance(offer, str) else "" for offer in offers])
    if len({offer.host for offer in offers}) > 1:
        raise PeerError("the ranks are on several hosts")

    def addresses(group: str, name: str) -> list[int]:
        members = next(ranks for ranks in mesh.members(group) if mesh.rank in ranks)
        handles = [offers[rank].handles[name] for rank in members]
        return [
            _own[handle] if rank == mesh.rank else _open(library, handle, device)
            for rank, handle in zip(members, handles, strict=True)
        ]

    failed, made, draws = "", {}, None
    try:
        for group, limits in sizes.items():
            made[group] = PeerSums(library, limits, addresses(group, group), device)
        if mesh.tp > 1:
            clusters = [min(counts) for counts in zip(*(offer.clusters for offer in offers), strict=True)]
            memory = addresses("tp", _DRAWS)
            draws = PeerDraws(library, mesh.place("tp"), mesh.tp, clusters, memory, device)
    except PeerError as error:
        failed = str(error)
    _agree(exchange(failed))
    return Peers(made, draws)


_DRAWS = "draws"  # their memory, beside that of each group's sums
_own: dict[bytes, int] = {}  # address by handle: this process's memory, which lives as long as it does


@dataclass(frozen=True, slots=True)
class _Offer:
    """host: what is the same on one host; handles: to memory by its name; clusters: as of `PeerDraws`."""

    host: bytes
    handles: dict[str, bytes]
    clusters: tuple[int, ...]


def _offer(library: ctypes.CDLL | None, sizes: dict[str, Limits], tp: int, device: torch.device) -> _Offer | str:
    """What this rank brings, or why it brings nothing."""
    if library is None:
        return "the kernels are not built"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernels are for cards of compute capability 9.0"
    wanted = {}
    for group, limits in sizes.items():
        if not limits.rows:
            return f"sums are over {' or '.join(map(str, MAX_ROWS))} ranks, and group {group!r} has {limits.ranks}"
        wanted[group] = library.tokenspeed_all_reduce_memory(limits.ranks, limits.rows, limits.whole_width)
    count = library.tokenspeed_sample_ranks_clusters
    clusters = tuple(count(device.index, blocks) for blocks in _CLUSTER_BLOCKS)
    if tp > 1:
        # Ranks agree on the smallest counts: their memory then holds more places than are used.
        wanted[_DRAWS] = library.tokenspeed_sample_ranks_memory(tp, max(clusters))
    handles = {}
    for name, size in wanted.items():
        memory, handle = ctypes.c_void_p(), ctypes.create_string_buffer(64)
        allocate = _function(library, "tokenspeed_peer_allocate")
        failed = allocate(device.index, ctypes.c_size_t(size), ctypes.byref(memory), handle)
        if failed:
            return f"memory for sums and draws: {failed.decode()}"
        handles[name] = handle.raw
        _own[handle.raw] = memory.value
    return _Offer(Path("/proc/sys/kernel/random/boot_id").read_bytes(), handles, clusters)


def _open(library: ctypes.CDLL, handle: bytes, device: torch.device) -> int:
    memory, own = ctypes.c_void_p(), ctypes.create_string_buffer(handle, len(handle))
    failed = _function(library, "tokenspeed_peer_open")(device.index, own, ctypes.byref(memory))
    if failed:
        raise PeerError(f"another card's memory: {failed.decode()}")
    return memory.value


def _function(library: ctypes.CDLL, name: str) -> Callable:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return function


def _agree(failures: Sequence[str]) -> None:
    for failed in failures:
        if failed:
            raise PeerError(failed)
