"""RMS normalisation in its three forms, and the two gated sums of the feed-forward block."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator


def _rows_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@cache
def constant(value: float) -> Tensor:
    """A number as fp32 on the host, which operators on any device take: torch makes a tensor of a plain float, and
    converts it, at every call."""
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float32, device="cpu")


def normalised(x: Tensor, eps: float) -> Tensor:
    """x over the root of eps and the mean square of its last dimension. x: fp32."""
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(constant(x.shape[-1] ** -0.5))
    return x / torch.hypot(root, constant(eps**0.5))


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x over the root of eps and the sum of squares of its last dimension. x: fp32."""
    return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), constant(eps**0.5))


@operator(fake=lambda x, weight, eps: _rows_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension with a zero-centred weight: `x rsqrt(mean(x^2) + eps) (1 + weight)`.

    x: [..., H]; weight: [H]. Computed in fp32 and rounded once to x's dtype. Returns a contiguous [..., H].
    Formula: Zhang and Sennrich 2019, with the zero-centred weight of Qwen3.5.
    """
    normed = normalised(x.float(), eps)
    return torch.addcmul(normed, normed, weight.float()).to(x.dtype)


@operator(fake=lambda x, residual, weight, eps: (_rows_like(x), _rows_like(x)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum in one pass.

    x, residual: [N, H]; weight: [H], zero-centred. Returns `rms_norm(sum, weight, eps)` and the sum, `x + residual`
    rounded to x's dtype, both [N, H].
    """
    total = residual + x
    return rms_norm.__wrapped__(total, weight, eps), total


@operator(fake=lambda x, gate, weight, eps: _rows_like(x))
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise each head and gate it afterwards: `x rsqrt(mean(x^2) + eps) weight silu(gate)`.

    x: [N, heads, D]; gate: the same shape, any strides; weight: [D], plain. Computed in fp32, rounded once.
    Returns a contiguous [N, heads, D] of x's dtype. Formula: the output norm of Gated DeltaNet (Yang et al. 2024).
    """
    return (normalised(x.float(), eps).mul_(weight.float()) * F.silu(gate.float())).to(x.dtype)


def _half_last(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator(fake=_half_last)
def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's elementwise half: `silu(x[..., :I]) * x[..., I:]`.

    x: [N, 2 I], the gate half first. Returns [N, I] of x's dtype. Formula: Shazeer 2020.
    """
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@operator(fake=lambda y, x, gate: None, mutates=("y",))
def add_sigmoid_gated(y: Tensor, x: Tensor, gate: Tensor) -> None:
    """Add the shared expert: `y += sigmoid(gate) * x`.

    y, x: [N, H]; gate: [N, 1]. Mutates y.
    """
    y.addcmul_(x, torch.sigmoid(gate))
