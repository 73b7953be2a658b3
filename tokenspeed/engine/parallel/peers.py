"""Sums over the ranks of one host by a kernel (csrc/kernels/step/all_reduce.cu) that writes into the other cards.

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
_TAGS = 32  # words of the kernel's `control` before its tags
_WIDTH_UNIT = 256
_PATIENCE_SECONDS = 60.0
# Rows of one sum at most, by the number of ranks: every rank sends its rows to every other one.
MOST_ROWS = {2: 256, 4: 128, 8: 64}


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
        ("most_rows", ctypes.c_int),
        ("most_width", ctypes.c_int),
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


class PeerSums:
    """The sums of one group of ranks. Every rank makes the same calls in the same order."""

    def __init__(self, library: ctypes.CDLL, limits: Limits, memory: Sequence[int], device: torch.device):
        """memory: address of each rank's memory, all zeros, in order of rank; device: of this rank's tensors."""
        self._library, self._limits, self._device = library, limits, device
        pinned = device.type == "cuda"
        # What waits look at: set [0] and they end; [1] is set where one has ended without its words.
        self._status = torch.zeros(2, dtype=torch.int32, pin_memory=pinned)
        self._control = torch.zeros(_TAGS + limits.rows, dtype=torch.int32, device=device)
        self._always = {
            "memory": (ctypes.c_void_p * _RANKS)(*memory),
            "control": self._control.data_ptr(),
            "status": self._status.data_ptr(),
            "patience_ns": int(_PATIENCE_SECONDS * 1e9),
            "rank": limits.rank,
            "ranks": limits.ranks,
            "most_rows": limits.rows,
            "most_width": limits.whole_width,
        }

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

    def stop(self) -> None:
        """Let whoever waits for a rank go on without it, from any thread."""
        self._status[0] = 1

    def check(self) -> None:
        """Raises EngineError where a sum went on without a rank."""
        if self._status[1]:
            raise EngineError("another rank did not bring its part of a sum: it is lost, or stuck.")

    def _call(self, x: Tensor, **arguments) -> None:
        rows, width = x.shape
        filled = _Arguments(x=x.data_ptr(), rows=rows, width=width, **self._always, **arguments)
        failed = self._library.tokenspeed_all_reduce(ctypes.byref(filled), ctypes.sizeof(filled), *self._place())
        if failed:
            raise RuntimeError(f"all_reduce: {failed.decode()}")

    def _place(self) -> tuple[int, int]:
        """The device's number, and its stream."""
        return self._device.index, torch.cuda.current_stream(self._device).cuda_stream


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    library.tokenspeed_all_reduce.restype = ctypes.c_char_p
    library.tokenspeed_all_reduce.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    library.tokenspeed_all_reduce_memory.restype = ctypes.c_int64
    return library


@functools.cache
def compiled_library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not built."""
    built = sorted((Path(__file__).parents[2]).glob("_C*.so"))
    return declare(ctypes.CDLL(str(built[0]))) if built else None


def connect(
    mesh: Mesh, groups: Sequence[str], width: int, device: torch.device, exchange: Callable[[object], list]
) -> dict[str, PeerSums]:
    """The sums of each of these groups. exchange: everybody's object, in order of rank, from each one's own.

    Raises PeerError, on every rank alike, where one of them cannot share memory with the others.
    """
    library = compiled_library()
    sizes = {
        group: Limits(mesh.index(group), mesh.size(group), MOST_ROWS.get(mesh.size(group), 0), width)
        for group in groups
    }
    offers = exchange(_offer(library, sizes, device))
    _agree([offer if isinstance(offer, str) else "" for offer in offers])
    if len({offer[""] for offer in offers}) > 1:
        raise PeerError("the ranks are on several hosts")
    failed, made = "", {}
    try:
        for group, limits in sizes.items():
            members = next(ranks for ranks in mesh.members(group) if mesh.rank in ranks)
            memory = [
                _own[offers[r][group]] if r == mesh.rank else _open(library, offers[r][group], device) for r in members
            ]
            made[group] = PeerSums(library, limits, memory, device)
    except PeerError as error:
        failed = str(error)
    _agree(exchange(failed))
    return made


_own: dict[bytes, int] = {}  # address by handle: this process's memory, which lives as long as it does


def _offer(library: ctypes.CDLL | None, sizes: dict[str, Limits], device: torch.device) -> dict[str, bytes] | str:
    """A handle to memory for each group, and under "" what is the same on one host; or why there is none."""
    if library is None:
        return "the kernels are not built"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernels are for cards of compute capability 9.0"
    offer = {"": Path("/proc/sys/kernel/random/boot_id").read_bytes()}
    for group, limits in sizes.items():
        if not limits.rows:
            return f"sums are over {' or '.join(map(str, MOST_ROWS))} ranks, and group {group!r} has {limits.ranks}"
        size = library.tokenspeed_all_reduce_memory(limits.ranks, limits.rows, limits.whole_width)
        memory, handle = ctypes.c_void_p(), ctypes.create_string_buffer(64)
        allocate = _function(library, "tokenspeed_peer_allocate")
        failed = allocate(device.index, ctypes.c_size_t(size), ctypes.byref(memory), handle)
        if failed:
            return f"memory for sums: {failed.decode()}"
        offer[group] = handle.raw
        _own[handle.raw] = memory.value
    return offer


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
