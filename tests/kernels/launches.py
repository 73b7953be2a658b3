"""What the tests of single kernels ask: the emulator's controls, and who served a call."""

import ctypes
from collections.abc import Callable

import torch


def emulator() -> ctypes.CDLL:
    """The emulated device's controls, in the library that the operators run in."""
    from tests.ops import emulated

    library = ctypes.CDLL(str(emulated.build_library()))
    library.emulator_seed.argtypes = [ctypes.c_uint64]
    return library


def torch_served(call: Callable[[], object]) -> list[str]:
    """The operators that a call handed on to their torch implementation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = {event.key for event in profile.events()}
    return sorted(name for name in names if name.startswith("tokenspeed_torch::"))
