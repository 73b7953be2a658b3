"""FP8 (e4m3) numbers with scales: blocks of weights, groups of activations, and the products of both.

A weight in the format `fp8_block128` is e4m3 [..., N, K] and a fp32 scale [..., ceil(N / 128), ceil(K / 128)]: a block
of 128 x 128 elements, cut short at the ragged edges, is the e4m3 values times its scale. It holds no NaN.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import operator

FP8 = torch.float8_e4m3fn
BLOCK = 128
LARGEST = torch.finfo(FP8).max
_SMALLEST_PEAK = 2.0**-100  # of a group: keeps LARGEST / peak finite
_CHUNK_ELEMENTS = 1 << 18  # weights converted at a time: as fp32 they stay in a core's cache until they are used


def blocks(size: int) -> int:
    """How many blocks of 128, the last perhaps cut short, a dimension of `size` elements has."""
    return -(-size // BLOCK)


def to_fp8(x: Tensor) -> Tensor:
    """x rounded to the nearest e4m3 number, ties to even; what is too large, infinity included, becomes +-448."""
    return x.float().clamp(-LARGEST, LARGEST).to(FP8)


def from_fp8(x: Tensor) -> Tensor:
    """e4m3 numbers as fp32."""
    if x.is_cuda:
        return x.float()
    values = _over_256(x).mul_(256)
    return values.masked_fill_(values.abs() > LARGEST, torch.nan)


def _over_256(x: Tensor) -> Tensor:
    """e4m3 numbers / 256 as fp32, and 480 / 256 for NaN: torch converts them one by one on a CPU, but their bits, moved
    to the place of a half's, are a half of that value."""
    halves = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80
    return halves.view(torch.float16).float()


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight, [..., N, K] of any float type, in the format `fp8_block128`: (e4m3, scale). A block's scale is its
    largest magnitude / 448, and 1 where the block is zero."""
    rows, columns = weight.shape[-2:]
    tiled = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiled = tiled.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = tiled.abs().amax((-3, -1)) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    values = to_fp8(tiled / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)
    return values[..., :rows, :columns].contiguous(), scale


def dequantise(weight: Tensor, scale: Tensor, row: int = 0, column: int = 0) -> Tensor:
    """The fp32 weight, [..., N, K], that a weight in the format `fp8_block128` stands for, its products rounded. row,
    column: where in its block the weight's first element stands, for a part of a weight."""
    rows, columns = weight.shape[-2:]
    by_row = scale.repeat_interleave(BLOCK, -2)[..., row : row + rows, :]
    return from_fp8(weight).mul_(by_row.repeat_interleave(BLOCK, -1)[..., column : column + columns])


def _converted(weight: Tensor, scale: Tensor) -> Tensor:
    """`dequantise` on a CPU, [N, K], several times as fast."""
    rows, columns = weight.shape
    values, whole = _over_256(weight), rows // BLOCK
    by_column = (scale * 256).repeat_interleave(BLOCK, 1)[:, :columns]
    values[: whole * BLOCK].view(whole, BLOCK, columns).mul_(by_column[:whole, None])
    values[whole * BLOCK :].mul_(by_column[whole:])
    return values


def _chunks(weight: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a [N, K] weight in fp32, some rows of blocks at a time."""
    step = max(_CHUNK_ELEMENTS // (weight.shape[1] * BLOCK), 1)
    for first in range(0, blocks(weight.shape[0]), step):
        rows = slice(first * BLOCK, min((first + step) * BLOCK, weight.shape[0]))
        yield rows, _converted(weight[rows], scale[first : first + step])


def product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """`x weight^T`, [N, out]; with a scale in fp32 and rounded once to x's dtype, the weight converted bit by bit."""
    if scale is None:
        return F.linear(x, weight)
    wide = x.float()
    if x.is_cuda:
        return F.linear(wide, dequantise(weight, scale)).to(x.dtype)
    out = wide.new_empty(x.shape[0], weight.shape[0])
    for rows, values in _chunks(weight, scale):
        out[:, rows] = F.linear(wide, values)
    return out.to(x.dtype)


def _groups_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty(rows, columns, dtype=FP8), x.new_empty(blocks(columns), rows, dtype=torch.float32).t()


@operator(fake=_groups_fake)
def quantise_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to e4m3 in groups of 128 columns of a row, each with a scale of its own.

    x: [N, K] bf16 or fp32. Returns e4m3 [N, K] and the scales, [N, ceil(K / 128)] fp32, those of one column of groups
    next to each other, as cuBLAS reads them. With p the largest magnitude of a group, but at least 2^-100, its scale is
    p / 448 and its elements are x * (448 / p), rounded to the nearest, ties to even: both quotients are rounded to
    fp32, and so is the product.
    """
    columns = x.shape[1]
    groups = F.pad(x.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    peak = groups.abs().amax(2).clamp_(min=_SMALLEST_PEAK)
    largest = torch.full_like(peak, LARGEST)  # torch divides by a number, or a number, with a rounded reciprocal
    values = to_fp8(groups * (largest / peak)[..., None]).flatten(1)
    scale = peak.new_empty(peak.shape[1], peak.shape[0])
    return values[:, :columns].contiguous(), scale.copy_((peak / largest).t()).t()


def _cublas_takes(x: Tensor, x_scale: Tensor, weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether cuBLAS has this product with a scale for each block; bindings_fp8.cpp asks the same."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) != (9, 0) or out_dtype != torch.bfloat16:
        return False
    sizes = len(x) > 0 and len(x) % 4 == 0 and weight.shape[0] % 16 == 0 and weight.shape[1] % (4 * BLOCK) == 0
    return sizes and x_scale.t().is_contiguous()


def _product_fake(x, x_scale, weight, scale, out_dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


@operator(fake=_product_fake)
def linear_fp8(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`x weight^T` with both in e4m3: what matrix units multiply 128 columns at a time before the scales.

    x: [N, K] e4m3 and x_scale: [N, ceil(K / 128)] fp32 of any strides, from `quantise_groups`; weight: [out, K] e4m3
    and scale: [ceil(out / 128), ceil(K / 128)] fp32. Returns [N, out] of out_dtype (bf16 or fp32), accumulated in fp32.
    """
    if _cublas_takes(x, x_scale, weight, out_dtype):
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x, weight.t(), x_scale, scale.t(), out_dtype=out_dtype
        )
    by_column = x_scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    return product(from_fp8(x) * by_column, weight, scale).to(out_dtype)
