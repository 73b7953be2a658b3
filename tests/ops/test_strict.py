"""Who serves a call, said before it (`why_not`) and by an error (`strict`)."""

import inspect

import pytest
import torch

import tokenspeed.ops as ops
from tests.kernels.launches import torch_served
from tokenspeed.ops.strict import PRECONDITIONS, precondition, refusing

from .samples import SAMPLES

OTHER = {
    torch.bfloat16: torch.float32,
    torch.float32: torch.bfloat16,
    torch.int32: torch.int64,
    torch.uint8: torch.int32,
}


def another_dtype(tensor):
    return tensor.to(OTHER[tensor.dtype])


def past_the_border(tensor):
    """The same values, starting one element past a 16-byte border."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def spread(tensor):
    """The same values with a stride of two in the last dimension."""
    return torch.empty(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)[..., 0].copy_(tensor)


def cases():
    for name in PRECONDITIONS:
        parameters = inspect.signature(getattr(ops, name).__wrapped__).parameters
        for i, parameter in enumerate(parameters.values()):
            if parameter.annotation in (torch.Tensor, "Tensor"):
                for change in (another_dtype, past_the_border, spread):
                    yield pytest.param(name, i, change, id=f"{name}-{parameter.name}-{change.__name__}")


@pytest.mark.parametrize("name", PRECONDITIONS)
def test_a_call_that_a_kernel_serves_meets_its_preconditions(backend, name):
    if not backend.kernels:
        pytest.skip("no kernels")
    assert precondition(name, bound(name, SAMPLES[name](backend))) is None


@pytest.mark.parametrize(("name", "argument", "change"), list(cases()))
def test_the_precondition_is_the_kernel_s(backend, name, argument, change):
    """Whatever one changes about an argument: the words say so exactly where the kernel hands the call on."""
    if not backend.kernels:
        pytest.skip("no kernels")
    arguments = list(SAMPLES[name](backend))
    arguments[argument] = change(arguments[argument])
    reason = precondition(name, bound(name, arguments))

    def call():
        try:
            overload(backend, name)(*arguments)
        except RuntimeError:
            assert reason, "the torch implementation does not take it either"

    assert (torch_served(call) != []) == (reason is not None), reason


def bound(name, arguments):
    return inspect.signature(getattr(ops, name).__wrapped__).bind(*arguments).arguments


def overload(backend, name):
    namespace = torch.ops.tokenspeed_emulated if backend.emulated is not None else torch.ops.tokenspeed
    return getattr(namespace, name).default


def test_gates_in_fp32_give_the_bits_of_gates_in_bf16(backend):
    assert torch.equal(run(backend, floats=True), run(backend, floats=False))


def run(backend, floats):
    torch.manual_seed(7)
    arguments = list(SAMPLES["gated_delta_rule_prefill"](backend))
    if floats:
        arguments[1], arguments[2] = arguments[1].float(), arguments[2].float()
    return overload(backend, "gated_delta_rule_prefill")(*arguments)


def test_why_not_says_what_is_missing_here():
    x, weight = torch.ones(2, 8), torch.ones(8)
    reason = ops.why_not(ops.rms_norm, x, weight, 1e-6)
    built = bool(ops.compiled_operators())
    assert ("on cpu" if built else "is not built") in reason and reason == ops.why_not("rms_norm", x, weight, eps=1e-6)
    with pytest.raises(ValueError, match="'softmax' is no operator"):
        ops.why_not("softmax", x)
    with pytest.raises(TypeError):
        ops.why_not("rms_norm", x)


def test_strict_raises_on_a_cpu_and_only_inside():
    x = torch.ones(2, 16)
    with torch.inference_mode(), pytest.raises(ops.NoKernel, match="silu_mul: the"), ops.strict():
        ops.silu_mul(x)
    assert ops.silu_mul(x).shape == (2, 8)


def test_a_call_that_is_handed_on_is_refused_and_named(backend):
    if not backend.kernels:
        pytest.skip("no kernels")
    x, weight = backend.randn(2, 64, dtype=torch.float32), backend.randn(64, dtype=torch.float32)
    with refusing() as refused, pytest.raises(RuntimeError):
        overload(backend, "rms_norm")(x, weight, 1e-6)
    assert refused == ["rms_norm"]
    with refusing() as refused:
        overload(backend, "rms_norm")(*SAMPLES["rms_norm"](backend))
        overload(backend, "linear")(backend.randn(20, 64), backend.randn(8, 64))
    assert not refused, "a kernel served the first, and the second is a job for cuBLAS"


def test_strict_lets_pass_what_a_kernel_serves(backend):
    if backend.device != "cuda":
        pytest.skip("the compiled kernels serve a card's tensors")
    with torch.inference_mode(), ops.strict():
        for name in PRECONDITIONS:
            getattr(ops, name)(*SAMPLES[name](backend))
        ops.linear(backend.randn(64, 128), backend.randn(32, 128))  # many rows: cuBLAS
        with pytest.raises(ops.NoKernel, match="float32"):
            ops.silu_mul(backend.randn(2, 16, dtype=torch.float32))
