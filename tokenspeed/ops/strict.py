"""Who serves a call: `why_not` names the precondition of a kernel that a call does not meet, and under `strict` a call
raises instead of going to the torch implementation.

The preconditions below are those of csrc/kernels/bindings/*.cpp as sentences; tests hold the two together. A call that
meets them and is still not served (an extreme stride or size) raises under `strict` all the same.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CAPABILITY = (9, 0)  # of the cards that the kernels are compiled for
KERNEL_ROWS = 16  # of a product; more rows are a job for cuBLAS, which torch calls
LINEAR_STAGED_ROWS = 8  # of a product in one launch with what comes before it
HEAD_DIM = 128  # of keys and values of the delta rule
# Their torch implementation is a composition of operators, each of which is asked by itself.
COMPOSED = (
    *("add_rms_norm_linear", "silu_mul_linear", "add_gated_silu_mul_linear", "gated_rms_norm_linear"),
    *("ffn_block", "moe_block"),
)

# Under strict, the operators that were handed on to their torch implementations.
_refused: ContextVar[list[str] | None] = ContextVar("tokenspeed_refused", default=None)


class NoKernel(RuntimeError):
    """A call under `strict` that no compiled kernel serves."""


def _dtype(name: str, tensor: Tensor, *wanted: torch.dtype) -> str | None:
    if tensor.dtype in wanted:
        return None
    return f"{name} is {str(tensor.dtype)[6:]}; it must be {' or '.join(str(dtype)[6:] for dtype in wanted)}."


def _bf16(**tensors: Tensor) -> str | None:
    return next(filter(None, (_dtype(name, tensor, torch.bfloat16) for name, tensor in tensors.items())), None)


def _float(**tensors: Tensor) -> str | None:
    return next(filter(None, (_dtype(name, tensor, torch.float32) for name, tensor in tensors.items())), None)


def _int32(**tensors: Tensor) -> str | None:
    """Index arrays: 32 bits, contiguous."""
    for name, tensor in tensors.items():
        if problem := _dtype(name, tensor, torch.int32) or _contiguous(**{name: tensor}):
            return problem
    return None


def _vectors(name: str, tensor: Tensor) -> str | None:
    """Rows that are read 16 bytes at a time."""
    elements = 16 // tensor.element_size()
    inner = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if tensor.numel() and (
        tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(stride % elements for stride in inner)
    ):
        return (
            f"{name} has strides {tensor.stride()} and starts {tensor.data_ptr() % 16} bytes past a 16-byte border; "
            f"its last dimension must be dense, and every row start on a border (strides a multiple of {elements})."
        )
    return None


def _contiguous(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}; it must be contiguous."
    return None


def _aligned(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() % 16:
            return f"{name} starts {tensor.data_ptr() % 16} bytes past a 16-byte border; it must start on one."
    return None


def _dense_rows(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if len(tensor) and tensor.stride(1) != 1:
            return f"{name} has strides {tensor.stride()}; its last dimension must be dense."
    return None


def _rms_norm(x: Tensor, weight: Tensor, **_: Any) -> str | None:
    if (
        problem := _bf16(x=x, weight=weight)
        or _contiguous(weight=weight)
        or _aligned(weight=weight)
        or _vectors("x", x)
    ):
        return problem
    if weight.numel() % 8 or weight.numel() > 8192:
        return f"weight has {weight.numel()} elements; kernels take a multiple of 8, 8192 at most."
    return None if x.dim() == 2 or x.is_contiguous() else "x has more than two dimensions and is not contiguous."


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, **_: Any) -> str | None:
    return _rms_norm(x, weight) or _bf16(residual=residual) or _vectors("residual", residual)


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, **_: Any) -> str | None:
    problem = _bf16(x=x, gate=gate, weight=weight) or _contiguous(weight=weight) or _aligned(weight=weight)
    if problem := problem or _vectors("x", x) or _vectors("gate", gate):
        return problem
    return None if weight.numel() == HEAD_DIM else f"weight has {weight.numel()} elements; kernels take {HEAD_DIM}."


def _silu_mul(x: Tensor) -> str | None:
    if problem := _bf16(x=x) or _vectors("x", x):
        return problem
    return None if x.shape[-1] % 16 == 0 else f"x has {x.shape[-1]} columns; kernels take a multiple of 16."


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, tail: Tensor | None = None) -> str | None:
    if problem := _bf16(x=x) or (_bf16(weight=weight) if scale is None else None):
        return problem
    if tail is not None:
        if scale is None:
            return "weight is bfloat16 and has a tail; only one in e4m3 may."
        if problem := _bf16(tail=tail) or _contiguous(tail=tail) or _aligned(tail=tail):
            return problem
    if len(x) > KERNEL_ROWS:
        return None  # by cuBLAS
    if weight.shape[1] % 32:
        return f"weight has {weight.shape[1]} inputs; kernels take a multiple of 32."
    return _vectors("x", x) or _vectors("weight", weight)


def _causal_conv1d(x: Tensor, weight: Tensor, window: Tensor, **indices: Tensor) -> str | None:
    problem = _bf16(x=x, weight=weight, window=window) or _int32(**indices)
    problem = problem or _contiguous(weight=weight) or _aligned(weight=weight)
    if problem := problem or _vectors("x", x) or _vectors("window", window):
        return problem
    if weight.shape[1] != 4 or weight.shape[0] % 8:
        return f"weight is {list(weight.shape)}; kernels take 4 taps, and a multiple of 8 channels."
    return None


def _delta_rule_heads(channels: int, state: Tensor) -> str | None:
    nv, dv, dk = state.shape[1:]
    if (dv, dk) != (HEAD_DIM, HEAD_DIM):
        return f"state has heads of {dv} x {dk}; kernels take {HEAD_DIM} x {HEAD_DIM}."
    nk = (channels // HEAD_DIM - nv) // 2
    if nk <= 0 or nv % nk or nv // nk > 8:
        return f"{nv} value heads share {nk} key heads; kernels take 1 to 8 for each."
    return None


def _dense_records(**records: Tensor) -> str | None:
    for name, tensor in records.items():
        if tensor.numel() and not tensor[0].is_contiguous():
            return f"{name} has strides {tensor.stride()}; below the slots it must be contiguous."
    return None


def _gated_delta_rule_prefill(
    qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, ring: Tensor, cursor: Tensor,
    max_seqlen: int, **indices: Tensor
) -> str | None:  # fmt: skip
    gates = torch.float32 if a.dtype == torch.float32 else torch.bfloat16
    return (
        _bf16(qkv=qkv)
        or _dtype("a", a, torch.bfloat16, torch.float32)
        or _dtype("b", b, gates)
        or _float(a_log=a_log, dt_bias=dt_bias, state=state, ring=ring)
        or _int32(**indices)
        or _dtype("cursor", cursor, torch.int32)
        or _delta_rule_heads(qkv.shape[1], state)
        or _dense_records(state=state, ring=ring, cursor=cursor)
        or _contiguous(a_log=a_log, dt_bias=dt_bias)
        or _dense_rows(a=a, b=b)
        or _aligned(state=state)
        or _vectors("qkv", qkv)
    )


def _gated_delta_rule_decode(
    qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, conv_weight: Tensor, a_log: Tensor, dt_bias: Tensor,
    norm_weight: Tensor, eps: float, state: Tensor, ring: Tensor, cursor: Tensor, window: Tensor,
    settled: bool = False, **indices: Tensor
) -> str | None:  # fmt: skip
    problem = (
        _bf16(qkv=qkv, z=z, a=a, b=b, conv_weight=conv_weight, window=window)
        or _dtype("norm_weight", norm_weight, torch.bfloat16, torch.float32)
        or _float(a_log=a_log, dt_bias=dt_bias, state=state, ring=ring)
        or _int32(**indices)
        or _dtype("cursor", cursor, torch.int32)
        or _delta_rule_heads(qkv.shape[1], state)
        or _dense_records(state=state, ring=ring, cursor=cursor, window=window)
        or _contiguous(conv_weight=conv_weight, a_log=a_log, dt_bias=dt_bias, norm_weight=norm_weight)
        or _dense_rows(a=a, b=b)
        or _aligned(conv_weight=conv_weight, state=state, window=window)
        or _vectors("qkv", qkv)
        or _vectors("z", z)
    )
    if problem:
        return problem
    tokens, rows, entries = len(qkv) // max(len(indices["context_lens"]), 1), ring.shape[1], window.shape[1]
    if not 1 <= tokens <= 8:
        return f"{tokens} tokens a sequence; kernels take 1 to 8."
    if conv_weight.shape[1] != 4:
        return f"conv_weight has {conv_weight.shape[1]} taps; kernels take 4."
    if not tokens - 1 <= rows <= 16 or entries < max(3, tokens + 2):
        return (
            f"{rows} ring rows and {entries} window entries; {tokens} tokens take {tokens - 1} to 16, and {tokens + 2}."
        )
    return None


PRECONDITIONS: dict[str, Callable[..., str | None]] = {
    "add_rms_norm": _add_rms_norm,
    "causal_conv1d": _causal_conv1d,
    "gated_delta_rule_decode": _gated_delta_rule_decode,
    "gated_delta_rule_prefill": _gated_delta_rule_prefill,
    "gated_rms_norm": _gated_rms_norm,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "silu_mul": _silu_mul,
}


def why_not(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Why no compiled kernel serves this call of an operator: a sentence, or None where one does, as far as dtypes,
    sizes and layouts say.

    operator: a function of `tokenspeed.ops`, or its name; args, kwargs: its arguments, which are looked at and not
    changed. Raises ValueError for a name that is no operator, TypeError for arguments that it does not take.
    """
    from tokenspeed import ops  # not at the top: tokenspeed.ops imports this module

    name = operator if isinstance(operator, str) else operator.__name__
    if name not in ops.__all__:
        raise ValueError(f"{name!r} is no operator; they are {', '.join(ops.__all__)}.")
    arguments = inspect.signature(getattr(ops, name).__wrapped__).bind(*args, **kwargs).arguments
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if name not in ops.compiled_operators():
        built = "has no kernel for it" if ops.compiled_operators() else "is not built (docs/install.md)"
        return f"{name}: the compiled extension {built}."
    if device.type != "cuda":
        return f"{name}: the tensors are on {device}; kernels serve CUDA tensors."
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return f"{name}: {device} has capability {torch.cuda.get_device_capability(device)}; kernels need {CAPABILITY}."
    return precondition(name, arguments)


def precondition(name: str, arguments: dict[str, Any]) -> str | None:
    """The precondition of the operator's kernel that these arguments do not meet, on a card that has kernels."""
    check = PRECONDITIONS.get(name)
    problem = check(**arguments) if check else None
    return problem and f"{name}: {problem}"


def served_by_design(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the torch implementation is the one that is meant to serve a call that a kernel handed on."""
    return name in COMPOSED or (name == "linear" and len(args[0]) > KERNEL_ROWS // 2 and _linear(*args) is None)


def refuse_if_strict(name: str, args: tuple[Any, ...]) -> None:
    """Called where a kernel hands a call on. The error crosses C++, which keeps no more than that there was one."""
    refused = _refused.get()
    if refused is not None and not served_by_design(name, args):
        refused.append(name)
        raise NoKernel(f"{name}: handed on to torch under strict")


@contextlib.contextmanager
def refusing() -> Iterator[list[str]]:
    """Inside, no call may be handed on; the list names those that were."""
    refused: list[str] = []
    token = _refused.set(refused)
    try:
        yield refused
    finally:
        _refused.reset(token)


class strict(TorchDispatchMode):
    """`with ops.strict():` every call of an operator that no compiled kernel serves raises NoKernel, with the reason.

    Products of many rows are served by cuBLAS and do not raise. It costs host time in every torch call below: for
    tests and for a first run, not for serving.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "tokenspeed":
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("tokenspeed::")
        if name not in COMPOSED and (problem := why_not(name, *args, **kwargs)):
            raise NoKernel(problem)
        with refusing() as refused:
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if refused:
                    raise NoKernel(f"{refused[0]}: the kernel did not take these strides, sizes or layouts.") from error
                raise
