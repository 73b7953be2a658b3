"""The places where an operator can run, so that one test body serves all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

import tokenspeed.ops

# Property tests: bounded, and without a deadline, since a first call may build caches.
bounded = settings(deadline=None, max_examples=10, phases=[p for p in Phase if p != Phase.explain])


def load_emulated() -> set[str]:
    """Build and load the kernels for the host: the operators of `torch.ops.tokenspeed_emulated` that have one."""
    from tools.cuda_paths import cuda_include_dirs  # C++ is compiled below: none of this at the top

    if not cuda_include_dirs():
        return set()
    from . import emulated

    return set(emulated.load())


def missing_cuda() -> str | None:
    """Why there is nothing to test on the card at hand, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"the kernels are built for capability (9, 0), this card has {torch.cuda.get_device_capability()}"
    return None if tokenspeed.ops.compiled_operators() else "the compiled extension is not built"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that holds for NaN too."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(as_integer), b.contiguous().view(as_integer))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The relative norm error; infinite where anything is not finite.

    A single row may be four times worse than the whole, no more: an error must not hide among many right rows. Rows
    below the mean norm count as if they had it.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    rows = (actual.shape[0], -1) if actual.dim() > 1 else (1, -1)
    difference, norm = (actual - expected).reshape(rows).norm(dim=1), expected.reshape(rows).norm(dim=1)
    whole = (difference.norm() / norm.norm().clamp(min=1e-30)).item()
    worst_row = (difference / norm.clamp(min=norm.mean().item()).clamp(min=1e-30)).max().item()
    error = max(whole, worst_row / 4)
    return error if math.isfinite(error) else math.inf


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators, with the floating type of the model and the device it takes.

    kernels: the implementation is compiled: published head sizes, few tokens. emulated: names of the operators that the
    host build has, for that backend only.
    """

    name: str
    device: str
    dtype: torch.dtype
    kernels: bool
    emulated: frozenset[str] | None = None

    def tensor(self, values, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh normal numbers of the model's type. Drawn on the host: one seed is one input on every device."""
        return torch.randn(shape).to(self.device, dtype or self.dtype)

    def op(self, name: str) -> Callable:
        """The operator, checked at every call for what all of them promise: only arguments that the schema marks are
        written, outputs are fresh memory. Fresh memory starts as NaN, so an element that is not written shows."""
        if self.emulated is not None and name not in self.emulated:
            pytest.skip(f"no emulated kernel for {name}")
        namespace = torch.ops.tokenspeed_emulated if self.emulated is not None else torch.ops.tokenspeed
        overload = getattr(namespace, name).default
        arguments = overload._schema.arguments
        needed = sum(not declared.has_default_value() for declared in arguments)

        def call(*args):
            assert needed <= len(args) <= len(arguments), f"{name} takes {len(arguments)} arguments, got {len(args)}"
            read_only = [
                (declared.name, arg, arg.clone())
                for declared, arg in zip(arguments, args, strict=False)
                if isinstance(arg, Tensor) and not (declared.alias_info and declared.alias_info.is_write)
            ]
            torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
            try:
                result = overload(*args)
            finally:
                torch.use_deterministic_algorithms(False)
            for argument, now, before in read_only:
                assert same_bits(now, before), f"{name} wrote its read-only argument {argument}"
            taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor) and arg.numel()}
            for output in result if isinstance(result, tuple) else (result,):
                if output is not None and output.numel():
                    assert output.untyped_storage().data_ptr() not in taken, f"{name} returned one of its arguments"
            return result

        return call

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        """An output against the reference in double precision on the same (rounded) inputs."""
        assert actual.dtype == self.dtype
        self._assert_within(actual, expected, 1e-4 if self.dtype == torch.float32 else 2e-2)

    def assert_state_close(self, actual: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
        """A recurrent state, fp32 whatever the model's type; `tolerance` holds where the model's type is bf16."""
        assert actual.dtype in (torch.float32, torch.float64)
        self._assert_within(actual, expected, 1e-4 if self.dtype == torch.float32 else tolerance)

    def _assert_within(self, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        error = relative_error(actual, expected)
        assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e} on {self.name}"


ALL = ("torch-fp32", "torch-bf16", "emulated", "cuda")


def make_backend(name: str) -> Backend:
    """The backend of that name; skips the test where this machine does not have it."""
    assert tokenspeed.ops.__all__  # the import declares torch.ops.tokenspeed
    if name == "emulated":
        emulated = load_emulated()
        if not emulated:
            pytest.skip("no kernels for the host: the CUDA headers they are compiled with are missing")
        return Backend(name, "cpu", torch.bfloat16, True, frozenset(emulated))
    if name == "cuda":
        reason = missing_cuda()
        if reason is not None:
            pytest.skip(reason)
        return Backend(name, "cuda", torch.bfloat16, True)
    return Backend(name, "cpu", torch.float32 if name == "torch-fp32" else torch.bfloat16, False)
