"""The dense product, alone and with what comes before it in a layer.

On a GPU the weights may be read before the launch ahead on the stream has finished: see "Weights stand still" in
docs/ops.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator
from .norm import add_rms_norm, add_sigmoid_gated, silu_mul


@operator(fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T`. x: [N, in]; weight: [out, in]. Returns [N, out] of x's dtype, accumulated in fp32 on the GPU."""
    return F.linear(x, weight)


# The kernels of the operators below serve decode batches, in which a launch costs as much as its work. What they do not
# serve is the composition of operators, each of which has a kernel for any number of rows.


def _product_norm_sum(x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor):
    return x.new_empty(x.shape[0], weight.shape[0]), torch.empty_like(residual), torch.empty_like(residual)


@operator(fake=_product_norm_sum)
def add_rms_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a block's output to the residual stream, normalise the sum, and multiply: `add_rms_norm` into `linear`.

    x, residual: [N, in]; norm_weight: [in], zero-centred; weight: [out, in]. Returns the product, [N, out], the norm
    that was its operand and the sum, both [N, in]; all of x's dtype, rounded where the two operators round.
    """
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return linear(normed, weight), normed, total


@operator(fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
def silu_mul_linear(x: Tensor, weight: Tensor) -> Tensor:
    """SwiGLU behind its first product: `silu_mul(x) weight^T`.

    x: [N, 2 in], the gate half first; weight: [out, in]. Returns [N, out] of x's dtype; silu_mul is rounded to it.
    """
    return linear(silu_mul(x), weight)


@operator(fake=lambda y, x, weight, gate: None, mutates=("y",))
def add_gated_silu_mul_linear(y: Tensor, x: Tensor, weight: Tensor, gate: Tensor) -> None:
    """Add the shared expert: `y += sigmoid(gate) * silu_mul_linear(x, weight)`.

    y: [N, out]; x: [N, 2 in], the gate half first; weight: [out, in]; gate: [N, 1]. The product is rounded to x's dtype
    before it is added. Mutates y.
    """
    add_sigmoid_gated(y, silu_mul_linear(x, weight), gate)
