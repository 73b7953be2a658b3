"""The two arenas: KV pages and state slots, both addressed by plain integers, with one strided view per layer."""

import ctypes
import os
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..config import FULL, PAGE_TOKENS, EngineConfig, ModelConfig
from ..errors import CapacityError, ConfigError
from ..model.inputs import StateViews

_ALIGNMENT = 256  # bytes: every part of a slot starts on one, so that any part can be copied in 16-byte vectors
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES, _MAPPED_BYTES = 64 << 20, 32 << 20  # of freed memory; of an allocation that is given back at once
SNAPSHOT_TOKENS = 8192  # of KV beside each slot that is not a running sequence's


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """Bytes of one KV page and one state slot of a model.

    config: of what is held, as `Qwen3_5.share` says it, for the MTP head's layer has keys and values too; dtype: of the
    model; kv_dtype: of the pages, None for the model's, or e4m3, whose scale is 1; ring_rows: updates a slot keeps
    beside its recurrent state (0: every token is folded at once); window_entries: inputs of the short convolution it
    keeps.
    """

    config: ModelConfig
    dtype: torch.dtype
    ring_rows: int = 0
    window_entries: int = 4
    kv_dtype: torch.dtype | None = None

    @property
    def page_shape(self) -> tuple[int, ...]:
        return (self.config.kv_layers, 2, self.config.kv_heads, PAGE_TOKENS, self.config.head_dim)

    @property
    def page_bytes(self) -> int:
        return prod(self.page_shape) * self.page_dtype.itemsize

    @property
    def page_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype

    @property
    def kv_token_bytes(self) -> int:
        return self.page_bytes // PAGE_TOKENS

    def slot_parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a slot holds for one layer, in order."""
        c = self.config
        update = c.key_heads * c.key_dim + c.value_heads * (c.value_dim + 1)
        return {
            "state": (torch.float32, (c.value_heads, c.value_dim, c.key_dim)),
            "ring": (torch.float32, (self.ring_rows, update)),
            "cursor": (torch.int32, (c.value_heads,)),
            "window": (self.dtype, (self.window_entries, c.conv_channels)),
        }

    @property
    def slot_layer_bytes(self) -> int:
        return sum(_aligned(prod(shape) * dtype.itemsize) for dtype, shape in self.slot_parts().values())

    @property
    def hidden_bytes(self) -> int:
        """Of a slot, for the MTP head: the trunk's state after the last token, from which the next entry is made."""
        return _aligned(self.config.hidden * self.dtype.itemsize) if self.config.mtp_layers else 0

    @property
    def slot_bytes(self) -> int:
        return self.slot_layer_bytes * self.config.linear_layers + self.hidden_bytes

    @property
    def recurrent_bytes(self) -> int:
        """The fp32 recurrent state alone, all layers: the part of a slot whose size is published."""
        dtype, shape = self.slot_parts()["state"]
        return prod(shape) * dtype.itemsize * self.config.linear_layers


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """How many pages and slots an engine gets, on the device and in host memory."""

    layout: MemoryLayout
    pages: int
    slots: int
    host_pages: int = 0
    host_slots: int = 0

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS

    @property
    def bytes(self) -> int:
        return self.pages * self.layout.page_bytes + self.slots * self.layout.slot_bytes

    def __str__(self) -> str:
        pages, slots = self.pages * self.layout.page_bytes / 2**30, self.slots * self.layout.slot_bytes / 2**30
        text = f"KV for {self.tokens} tokens ({pages:.2f} GiB), {self.slots} state slots ({slots:.2f} GiB)"
        if self.host_slots:
            text += f"; in host memory KV for {self.host_pages * PAGE_TOKENS} tokens and {self.host_slots} state slots"
        return text


def divide_memory(layout: MemoryLayout, config: EngineConfig, free: int, max_tokens: int | None) -> MemorySizes:
    """Divide `free` bytes between pages and slots: a slot for each running sequence first, and of the rest as many
    slots as leave SNAPSHOT_TOKENS of KV to each, for prompts to come back to.

    max_tokens: more KV than this is of no use, None without such a bound. Raises CapacityError where not one sequence
    of one page fits.
    """
    pages, slots = config.kv_pages, config.state_slots
    if slots is None:
        shared = SNAPSHOT_TOKENS * layout.kv_token_bytes + layout.slot_bytes
        known = 0 if pages is None else pages * layout.page_bytes
        slots = min(config.max_num_seqs, (free - known) // (layout.slot_bytes + layout.page_bytes))
        if config.enable_prefix_caching:
            slots += max(free - known - slots * (layout.slot_bytes + layout.page_bytes), 0) // shared
        if max_tokens is not None:
            slots = min(slots, config.max_num_seqs * 3)
    if pages is None:
        pages = (free - slots * layout.slot_bytes) // layout.page_bytes
        if max_tokens is not None:
            pages = min(pages, -(-max_tokens // PAGE_TOKENS))
    sizes = MemorySizes(layout, max(pages, 1), max(slots, 1))
    if sizes.bytes > free:
        raise CapacityError(
            f"{max(free, 0) / 2**30:.2f} GiB are there for KV pages and state slots, and {sizes.pages} pages and "
            f"{sizes.slots} slots need {sizes.bytes / 2**30:.2f} GiB: raise gpu_memory_utilization, lower "
            "max_num_seqs, or use a smaller model."
        )
    return sizes


class Memory:
    """Allocates both arenas and holds a view of them for each layer of the model, by its number; that of the MTP head
    comes after the last. hidden: [slots + 1, hidden], each slot's last state of the trunk, and a row for whatever
    belongs to nobody; None without a head. pages [pages, page bytes] and slots [slots, slot bytes] uint8: the arenas as
    they are moved."""

    def __init__(self, layout: MemoryLayout, pages: int, slots: int, device: torch.device):
        """Raises CapacityError where the device has less free memory than the arenas need."""
        needed = pages * layout.page_bytes + slots * layout.slot_bytes
        free = free_memory(device)
        if needed > free:
            raise CapacityError(
                f"{pages} KV pages and {slots} state slots need {needed / 2**30:.2f} GiB, but {device} has "
                f"{free / 2**30:.2f} GiB free: ask for shorter or fewer sequences."
            )
        self.layout = layout
        self.pages = _zeros(pages * layout.page_bytes, device).view(pages, layout.page_bytes)
        self.kv = self.pages.view(layout.page_dtype).view(pages, *layout.page_shape)
        arena = _zeros(slots * layout.slot_bytes + layout.hidden_bytes, device)
        self.slots = arena[: slots * layout.slot_bytes].view(slots, layout.slot_bytes)
        self.hidden = None
        if layout.hidden_bytes:
            shape, stride = (slots + 1, layout.config.hidden), layout.slot_bytes // layout.dtype.itemsize
            self.hidden = arena.view(layout.dtype).as_strided(shape, (stride, 1))
        self.layers: list[Tensor | StateViews] = []
        full = linear = 0
        for kind in layout.config.layer_types:
            if kind == FULL:
                self.layers.append(self.kv[:, full])
                full += 1
            else:
                self.layers.append(self._state_views(layout.hidden_bytes + linear * layout.slot_layer_bytes))
                linear += 1
        self.layers += [self.kv[:, i] for i in range(full, layout.config.kv_layers)]

    def _state_views(self, offset: int) -> StateViews:
        views = {}
        for name, (dtype, shape) in self.layout.slot_parts().items():
            size = prod(shape) * dtype.itemsize
            part = self.slots[:, offset : offset + size].view(dtype)
            views[name] = part.view(len(part), *shape)
            offset += _aligned(size)
        return StateViews(**views)


def divide_host_memory(layout: MemoryLayout, config: EngineConfig, ranks: int = 1) -> tuple[int, int]:
    """Pages and slots of one rank's part of the host tier, SNAPSHOT_TOKENS of KV to each slot. Raises ConfigError where
    not one fits."""
    if not config.host_memory:
        return 0, 0
    share = SNAPSHOT_TOKENS // PAGE_TOKENS * layout.page_bytes + layout.slot_bytes
    room = int(config.host_memory * 2**30) // ranks
    slots = max(room // share, 1)
    pages = (room - slots * layout.slot_bytes) // layout.page_bytes
    if pages < 1:
        needed = ranks * (layout.slot_bytes + layout.page_bytes) / 2**30
        raise ConfigError(f"host_memory is {config.host_memory}; it must be 0, or at least {needed:.3g} GiB.")
    return pages, slots


class HostMemory:
    """The host tier's arenas, laid out like the device's. pages: [pages, page bytes]; slots: [slots, slot bytes]; both
    uint8, and pinned where the device is a GPU."""

    def __init__(self, layout: MemoryLayout, pages: int, slots: int, device: torch.device):
        """Raises CapacityError where this machine has less memory free."""
        needed, free = pages * layout.page_bytes + slots * layout.slot_bytes, free_memory(torch.device("cpu"))
        if needed > free:
            raise CapacityError(
                f"the host tier needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free: lower host_memory."
            )
        arena = _zeros(needed, torch.device("cpu"))
        if device.type == "cuda":  # torch's own pinned memory comes in powers of two
            with torch.cuda.device(device):
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), needed, 0))
        self.pages = arena[: pages * layout.page_bytes].view(pages, layout.page_bytes)
        self.slots = arena[pages * layout.page_bytes :].view(slots, layout.slot_bytes)


def _zeros(size: int, device: torch.device) -> Tensor:
    """Bytes of zero. On a CPU numpy makes them, so that the system supplies a page when it is first used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(size, dtype=np.uint8))
    return torch.zeros(size, dtype=torch.uint8, device=device)


def keep_freed_memory() -> bool:
    """Let this process's C library keep what is freed, 64 MiB of it, for what is allocated next: activations come and
    go in every layer, and a page that went back to the system costs a fault when it comes again. False where the
    library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Both at once: setting one of them ends glibc's own adjustment of the other.
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_memory(device: torch.device) -> int:
    """Bytes of the whole device, in use or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
