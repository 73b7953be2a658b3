"""The dense product, alone and with what comes before it in a layer.

A weight is [out, in] of x's dtype, or e4m3 with a scale in the format `fp8_block128` (fp8.py). With a scale the product
is that of the weight it stands for: accumulated in fp32 and rounded once to x's dtype. Behind an e4m3 weight may come a
tail, rows of x's dtype that stand below it: what a checkpoint keeps in two formats is one product.

On a GPU the weights may be read before the launch ahead on the stream has finished: see "Weights stand still" in
docs/ops.md.
"""

import torch
from torch import Tensor

from .fp8 import product
from .library import operator
from .norm import add_rms_norm, add_sigmoid_gated, gated_rms_norm, silu_mul


def _outputs(weight: Tensor, tail: Tensor | None) -> int:
    return weight.shape[0] + (0 if tail is None else tail.shape[0])


@operator(fake=lambda x, weight, scale=None, tail=None: x.new_empty(x.shape[0], _outputs(weight, tail)))
def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, tail: Tensor | None = None) -> Tensor:
    """`x weight^T`. x: [N, in]; weight: [out, in] of x's dtype, or e4m3 with a scale.

    scale: [ceil(out / 128), ceil(in / 128)] fp32, one for each block of an e4m3 weight. tail: [more, in] of x's dtype,
    rows that stand below an e4m3 weight; out grows by them. Returns [N, out] of x's dtype, accumulated in fp32 on the
    GPU. Where a card's kernel serves many rows of x with an e4m3 weight, it may multiply `quantise_groups(x)` instead
    of x, as `linear_fp8` does. Many rows with a tail are two products and a copy of both: there, call it twice.
    """
    if tail is None:
        return product(x, weight, scale)
    return torch.cat([linear(x, weight, scale), linear(x, tail)], dim=1)


# The kernels of the operators below serve decode batches, in which a launch costs as much as its work, and, where many
# rows meet an e4m3 weight, prefills: there the operator before the product writes its operand in groups. What they do
# not serve is the composition of operators, each of which has a kernel for any number of rows. Without kernels the way
# through the dispatcher leads to the same place, and takes as long as a small operator.


def _product_norm_sum(x, residual, norm_weight, eps, weight, scale=None, tail=None):
    return x.new_empty(x.shape[0], _outputs(weight, tail)), torch.empty_like(residual), torch.empty_like(residual)


@operator(fake=_product_norm_sum)
def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a block's output to the residual stream, normalise the sum, and multiply: `add_rms_norm` into `linear`.

    x, residual: [N, in]; norm_weight: [in], zero-centred; weight, scale, tail: as in `linear`. Returns the product,
    [N, out], the norm that was its operand and the sum, both [N, in]; all of x's dtype, rounded where the two operators
    round.
    """
    norm, times = (add_rms_norm, linear) if x.is_cuda else (add_rms_norm.__wrapped__, linear.__wrapped__)
    normed, total = norm(x, residual, norm_weight, eps)
    return times(normed, weight, scale, tail), normed, total


@operator(fake=lambda x, weight, scale=None: x.new_empty(x.shape[0], weight.shape[0]))
def silu_mul_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """SwiGLU behind its first product: `silu_mul(x) weight^T`.

    x: [N, 2 in], the gate half first; weight, scale: as in `linear`. Returns [N, out] of x's dtype; silu_mul is rounded
    to it.
    """
    gated, times = (silu_mul, linear) if x.is_cuda else (silu_mul.__wrapped__, linear.__wrapped__)
    return times(gated(x), weight, scale)


@operator(fake=lambda y, x, weight, gate, scale=None: None, mutates=("y",))
def add_gated_silu_mul_linear(y: Tensor, x: Tensor, weight: Tensor, gate: Tensor, scale: Tensor | None = None) -> None:
    """Add the shared expert: `y += sigmoid(gate) * silu_mul_linear(x, weight, scale)`.

    y: [N, out]; x: [N, 2 in], the gate half first; weight, scale: as in `linear`; gate: [N, 1]. The product is rounded
    to x's dtype before it is added. Mutates y.
    """
    add_sigmoid_gated(y, silu_mul_linear(x, weight, scale), gate)


def _product_of_heads(x, gate, norm_weight, eps, weight, scale=None, above=None):
    return x.new_empty(x.shape[0] + (0 if above is None else above.shape[0]), weight.shape[0])


@operator(fake=_product_of_heads)
def gated_rms_norm_linear(
    x: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None = None,
    above: Tensor | None = None,
) -> Tensor:
    """Normalise and gate the heads of Gated DeltaNet, and multiply: `gated_rms_norm` into `linear`.

    x, gate, norm_weight: as in `gated_rms_norm`; weight, scale: as in `linear`, of heads D inputs. above: [M, heads D]
    of x's dtype, rows that are done (those of a decode step) and stand above x's. Returns [M + N, out] of x's dtype;
    the norm is rounded to it.
    """
    normed = gated_rms_norm(x, gate, norm_weight, eps).flatten(1)
    return linear(normed if above is None else torch.cat([above, normed]), weight, scale)
