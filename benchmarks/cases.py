"""What is measured: one case is a kernel at one shape, with the bytes and flops it must move and its peers."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tokenspeed.ops

from . import kernels


@dataclass(frozen=True, slots=True)
class Sizes:
    """Token counts to measure at: those of a GPU, or small ones for a CPU, where only the code path is of interest."""

    decode: tuple[int, ...]
    prefill: int
    copies: tuple[int, ...]


GPU_SIZES = Sizes(decode=(1, 8, 64), prefill=8192, copies=(1, 4, 16))
CPU_SIZES = Sizes(decode=(1,), prefill=256, copies=(1,))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Draws inputs on a device. Values are always random: zeros would run faster than real data."""

    device: str

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=self.device, dtype=torch.uint8)

    def integers(self, values, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one shape.

    kernel: the operator's name; shape: for the reader; bytes: read and written, each input and output once;
    inputs: draws one set of arguments; run: the operator; flops; peers: by name, functions of the same arguments, None
    for a peer that is not installed; ceiling: what bounds it, "copy", "read" or "matmul"; compiled: also measure
    torch.compile of the torch implementation.
    """

    kernel: str
    shape: str
    bytes: int
    inputs: Callable[[Inputs], tuple]
    run: Callable
    flops: int = 0
    peers: Mapping[str, Callable | None] = field(default_factory=dict)
    ceiling: str = "copy"
    compiled: bool = False


def operator_case(kernel: str, shape: str, size: int, inputs: Callable[[Inputs], tuple], **options) -> Case:
    """A case of `torch.ops.tokenspeed.<kernel>`, with its torch implementation as the first peer."""
    peers = {"torch": torch_implementation(kernel), **options.pop("peers", {})}
    return Case(kernel, shape, size, inputs, getattr(torch.ops.tokenspeed, kernel).default, peers=peers, **options)


def torch_implementation(kernel: str) -> Callable:
    return getattr(tokenspeed.ops, kernel).__wrapped__


def without_last(function: Callable) -> Callable:
    """`function` without the last argument, which only peers take."""
    return lambda *arguments: function(*arguments[:-1])


def optional_peer(module: str, name: str) -> Callable | None:
    """`module.name`, or None where the package is not installed or does not work on this machine."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # a peer's import may fail in any way; the row then says that it is missing
        return None


def all_cases(sizes: Sizes) -> Iterator[Case]:
    """Every case of every file in benchmarks/kernels, in the order of the files' names."""
    for module in pkgutil.iter_modules(kernels.__path__):
        yield from importlib.import_module(f"{kernels.__name__}.{module.name}").cases(sizes)
