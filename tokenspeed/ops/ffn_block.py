"""The feed-forward of a dense decode layer as one operator."""

import torch
from torch import Tensor

from .library import operator
from .linear import add_rms_norm_linear, silu_mul_linear

FFN_BLOCK_ROWS = 8  # that the kernel of `ffn_block` serves
FFN_BLOCK_FEWEST = 2  # rows from which it pays in a model: one row's two launches hide their boundary better
# Of weights, up to which one launch is faster than two; beyond, what lies between launches is little beside the bytes.
FFN_BLOCK_BYTES = 96 << 20


def ffn_block_scratch(width: int) -> int:
    """How many int32 `ffn_block` wants for scratch, with so many columns of activations: how many calls there were, and
    one token's activations in 4 bytes each."""
    return 96 + width


def _block_fake(x, residual, *others):
    return torch.empty_like(residual), torch.empty_like(residual)


@operator(fake=_block_fake, mutates=("scratch",))
def ffn_block(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, gate_up: Tensor, down: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """The feed-forward of a dense decode layer, from the residual sum to the product of `down`, in one launch.

    x, residual: [N, H]; norm_weight: [H], zero-centred; gate_up: [2 W, H], the gate half first; down: [H, W]. Weights
    may be read before the kernel ahead on the stream is complete. Returns `silu_mul(norm gate_up^T) down^T` and the
    residual sum, both [N, H]; rounded where `add_rms_norm_linear` and `silu_mul_linear` round, of which this is made
    where no kernel serves the call (more than FFN_BLOCK_ROWS rows, for one).
    Mutates scratch, [ffn_block_scratch(W)] int32: zeros at first, then what the last call left, whatever its sizes.
    Calls that may run at the same time need one of their own each. Raises ValueError where it is too short.
    """
    wanted = ffn_block_scratch(down.shape[1])
    if len(scratch) < wanted:
        raise ValueError(f"scratch has {len(scratch)} elements; {down.shape[1]} columns want {wanted}")
    projected, _, total = add_rms_norm_linear(x, residual, norm_weight, eps, gate_up)
    scratch[1:96] = 0  # as the kernel leaves it: the calls counted, and nobody who has read their number yet
    scratch[:1] += 1
    return silu_mul_linear(projected, down), total
