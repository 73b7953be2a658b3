"""Claims that hold for every operator: registration, fakes, and the same bits for the same input."""

import sys

import pytest
import torch
from torch import Tensor

import tokenspeed.ops
from tokenspeed.ops.fp8 import FP8

from .backends import same_bits
from .samples import SAMPLES


def overload(name: str):
    return getattr(torch.ops.tokenspeed, name).default


def written(name: str) -> list[int]:
    arguments = overload(name)._schema.arguments
    return [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


def copied(args):
    """The same arguments in fresh memory, with the same strides."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def tensors(result) -> list[Tensor]:
    return [x for x in (result if isinstance(result, tuple) else (result,)) if x is not None]


def test_every_public_operator_has_a_sample():
    assert set(SAMPLES) == set(tokenspeed.ops.__all__)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_registration_passes_opcheck(backend, name):
    if backend.name not in ("torch-fp32", "cuda"):
        pytest.skip("one schema for all backends, checked once on each device")
    args = SAMPLES[name](backend)
    results = tensors(overload(name)(*copied(args)))
    eight_bit = any(isinstance(x, Tensor) and x.dtype == FP8 for x in [*args, *results])
    # Of e4m3 tensors torch cannot tell whether they are close; that none is written, `Backend.op` sees to.
    checks = {"test_utils": ("test_autograd_registration", "test_faketensor")} if eight_bit else {}
    torch.library.opcheck(overload(name), args, **checks)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_fake_gives_shapes_types_strides_and_device(backend, name):
    args = SAMPLES[name](backend)
    real = tensors(backend.op(name)(*copied(args)))
    meta = tensors(overload(name)(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args)))
    assert [(x.shape, x.dtype, x.stride()) for x in meta] == [(x.shape, x.dtype, x.stride()) for x in real]
    assert all(x.device.type == "meta" for x in meta)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_equal_inputs_give_equal_bits(backend, name):
    args = SAMPLES[name](backend)
    first, second = copied(args), copied(args)
    results = [tensors(backend.op(name)(*call)) for call in (first, second)]
    pairs = list(zip(*results, strict=True)) + [(first[i], second[i]) for i in written(name)]
    assert pairs
    assert all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_kernel_serves_the_published_sizes(backend, name):
    """A call that a kernel does not take goes to the torch implementation, and would pass every other test there."""
    if not backend.kernels:
        pytest.skip("no kernel is expected here")
    if backend.name == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"tokenspeed::{name}", "CUDA"):
        pytest.skip(f"no CUDA kernel for {name}")
    call, args, entered = backend.op(name), SAMPLES[name](backend), []
    fallback = getattr(tokenspeed.ops, name).__wrapped__.__code__

    def profile(frame, event, _):
        if event == "call" and frame.f_code is fallback:
            entered.append(name)

    sys.setprofile(profile)
    try:
        call(*args)
    finally:
        sys.setprofile(None)
    assert not entered


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_sample_does_what_its_schema_marks(backend, name):
    """Guards the two claims above: a sample that changes nothing would prove nothing."""
    args = SAMPLES[name](backend)
    before = copied(args)
    backend.op(name)(*args)
    assert all(not same_bits(args[i], before[i]) for i in written(name))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_documented_function_is_the_operator(name):
    function = getattr(tokenspeed.ops, name)
    assert function.__name__ == name
    assert len(function.__doc__) > 80
    named = {overload(name)._schema.arguments[i].name for i in written(name)}
    assert ("Mutates" in function.__doc__) == bool(named)
    assert all(argument in function.__doc__.split("Mutates")[1] for argument in named)


OF_INTEGERS = {"accept_tokens", "copy_states", "decode_rows", "draft_rows", "paged_rows"}


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - OF_INTEGERS))
def test_a_gradient_is_refused_naming_the_argument(backend, name):
    if backend.name not in ("torch-fp32", "cuda"):
        pytest.skip("one refusal for all backends, checked once on each device")
    args = list(SAMPLES[name](backend))
    at = next(i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point())
    args[at] = args[at].detach().requires_grad_()
    argument = overload(name)._schema.arguments[at].name
    with pytest.raises(RuntimeError, match=f"{name}: {argument} requires a gradient"):
        overload(name)(*args)
    with torch.no_grad():
        overload(name)(*args)
