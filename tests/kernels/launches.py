"""What the tests of single kernels ask: the emulator's controls, and who served a call."""

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def emulator() -> ctypes.CDLL:
    """The emulated device's controls, in the library that the operators run in."""
    from tests.ops import emulated

    library = ctypes.CDLL(str(emulated.build_library()))
    library.emulator_seed.argtypes = [ctypes.c_uint64]
    return library


def queued(device: ctypes.CDLL, seed: int, run: Callable[[], T]) -> T:
    """What `run` gives when its launches queue up: each may run up to its wait before the one ahead has begun."""
    device.emulator_seed(seed)
    device.emulator_defer(1)
    try:
        results = run()
        assert device.emulator_synchronize() == 0
    finally:
        device.emulator_defer(0)
        device.emulator_seed(0)
    return results


def torch_served(call: Callable[[], object]) -> list[str]:
    """The operators that a call handed on to their torch implementation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = {event.key for event in profile.events()}
    return sorted(name for name in names if name.startswith("tokenspeed_torch::"))


def behind_a_copy(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor in memory that holds poison until a copy of slot 0 to slot 1 fills it, and that arena of two slots."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    extent = reach + 1 if tensor.numel() else 0
    size = -(-extent * tensor.element_size() // 16) * 16
    arena = torch.full((2, max(size, 16)), 0xFF, dtype=torch.uint8)
    rows = arena.view(tensor.dtype)
    real, poisoned = (torch.as_strided(rows, tensor.shape, tensor.stride(), i * rows.shape[1]) for i in (0, 1))
    real.copy_(tensor)
    return poisoned, arena
