"""Parameters that hold a rank's part of a weight, and which regions of checkpoint tensors fill them."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...ops.fp8 import BLOCK, FP8, blocks
from ..config import ModelConfig
from ..errors import ConfigError
from ..parallel.mesh import Mesh
from ..parallel.sharding import Split

# A dimension of a weight: whole on every rank, split over ranks, or several such sections one after the other.
Section = int | Split
Dim = Section | tuple[Section, ...]


class Part(NamedTuple):
    """Rows of a weight with those of its scale, None where it has none."""

    data: Tensor
    scale: Tensor | None

    def split(self, widths: list[int]) -> list["Part"]:
        """Rows of these numbers, one after the other, of which each begins with a block."""
        if self.scale is None:
            return [Part(data, None) for data in self.data.split(widths, -2)]
        pairs = zip(self.data.split(widths, -2), self.scale.split([blocks(w) for w in widths], -2), strict=True)
        return [Part(data, scale) for data, scale in pairs]

    def expert(self, number: int) -> "Part":
        return Part(self.data[number], None if self.scale is None else self.scale[number])


class Weight(nn.Module):
    """What operators multiply by: `data`, [out, in] or [experts, out, in], with `scale`, None or that of e4m3 data.

    Unpacked it is the two arguments that operators take, data and scale.
    """

    def __init__(self, data: nn.Parameter, scale: nn.Parameter | None):
        super().__init__()
        self.data, self.scale = data, scale

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.data, self.scale))

    @property
    def format(self) -> str:
        """`bf16` or `fp32`, or `fp8_block128`: e4m3 with a fp32 scale for each block of 128 x 128."""
        return {torch.bfloat16: "bf16", torch.float32: "fp32", FP8: "fp8_block128"}[self.data.dtype]

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.data.dims

    @property
    def part(self) -> Part:
        return Part(self.data, self.scale)


class Region(NamedTuple):
    """A part of a checkpoint tensor, and the part of a parameter, of the same shape, that it fills. scale: of the same
    part, one element a block, where the parameter is e4m3."""

    slices: tuple[slice, ...]
    part: Tensor
    scale: Tensor | None = None


class Source(NamedTuple):
    """A checkpoint tensor. shape: of the whole; regions: what this rank takes, nothing where only others need it."""

    key: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


def weight(mesh: Mesh, *dims: Dim, dtype: torch.dtype | None = None, multiple: int = 1) -> nn.Parameter:
    """An unfilled parameter of the rank's part of a [dims...] weight; `.dims` keeps what it is a part of.

    Rows come in multiples of `multiple`: `.padding` of them, the last, are zeros that stand for nothing.
    """
    rows, *rest = (local_size(dim, mesh) for dim in dims)
    padding = -rows % multiple
    parameter = nn.Parameter(torch.empty(rows + padding, *rest, dtype=dtype), requires_grad=False)
    parameter[rows:].zero_()
    parameter.dims, parameter.padding = dims, padding
    return parameter


_COLUMN_BYTES = 16 << 20  # of a weight, beyond which rows are faster: a column's elements are too far apart


def by_columns(parameter: nn.Parameter, first: int = 0) -> None:
    """Let the outputs of one input be neighbours in memory, [in, ..., out] for a [..., out, in] weight of fp32 on a CPU
    alone. first: leading dimensions that stay outside of `in`.

    A CPU then multiplies 4 to 24 rows faster, and one row with a small weight; bf16 it multiplies slower. By how much:
    docs/performance.md, "On a CPU".
    Mutates where the parameter's elements lie, not what they are.
    """
    if parameter.is_cpu and parameter.dtype == torch.float32 and parameter.nbytes <= _COLUMN_BYTES:
        parameter.data = parameter.data.movedim(-1, first).contiguous().movedim(first, -1)


def in_fp8(config: ModelConfig, block: str, rows: dict[str, int]) -> bool:
    """Whether one weight holds these products of a block, `self_attn` say, in FP8: all of them are, and each has rows
    enough that the next begins with a block of 128."""
    *leading, _ = rows.values()
    return all(f"{block}.{name}" in config.fp8 for name in rows) and not any(count % BLOCK for count in leading)


def matrix(mesh: Mesh, *dims: Dim, fp8: bool, multiple: int = 1, halves: bool = False) -> Weight:
    """An unfilled weight of a product: as `weight`, or e4m3 with scales. halves: the second half of e4m3 rows begins
    with a block of its own, whatever the first holds. Raises ConfigError where a rank's part would cut a block."""
    if not fp8:
        return Weight(weight(mesh, *dims, multiple=multiple), None)
    for dim in dims[-2:]:
        for section in sections(dim):
            _check_uncut(section, mesh)
    data = weight(mesh, *dims, dtype=FP8)
    *experts, rows, columns = data.shape
    row_blocks = 2 * blocks(rows // 2) if halves else blocks(rows)
    scale = nn.Parameter(torch.empty(*experts, row_blocks, blocks(columns), dtype=torch.float32), requires_grad=False)
    scale.dims, scale.padding = (), 0
    return Weight(data, scale)


def _check_uncut(section: Section, mesh: Mesh) -> None:
    if isinstance(section, int) or mesh.size(section.group) == 1 or section.local(mesh) % BLOCK == 0:
        return
    raise ConfigError(
        f"{section.name} {section.count} over the {mesh.size(section.group)} ranks of group {section.group!r} leaves "
        f"{section.local(mesh)} of {section.size} rows or columns of an FP8 weight to each, which cuts its blocks of "
        f"{BLOCK}: use fewer ranks, or --quantization none."
    )


def source(key: str, part: Tensor | Part | Weight, mesh: Mesh, *dims: Dim) -> Source:
    """Fill `part` with the rank's part of the checkpoint tensor `key` of [dims...], section by section."""
    data, scale = (part, None) if isinstance(part, Tensor) else part
    regions = []
    for sections in product(*(_placed_sections(dim, mesh) for dim in dims)):
        whole, local = zip(*sections, strict=True)
        regions.append(Region(whole, data[local], None if scale is None else scale[_block_slices(local)]))
    return Source(key, whole_shape(dims), tuple(regions))


def _block_slices(local: tuple[slice, ...]) -> tuple[slice, ...]:
    *experts, rows, columns = local
    return (*experts, *(slice(each.start // BLOCK, blocks(each.stop)) for each in (rows, columns)))


def not_held(key: str, *dims: Dim) -> Source:
    """A checkpoint tensor that belongs to the model and of which this rank holds nothing."""
    return Source(key, whole_shape(dims), ())


def stacked(key: str, parts: list[Part], mesh: Mesh, *dims: Dim) -> Source:
    """As `source`, of a checkpoint tensor in which one of [dims...] for each part stands above the next."""
    regions = []
    for i, part in enumerate(parts):
        for region in source(key, part, mesh, *dims).regions:
            *leading, rows, columns = region.slices
            above = i * whole_size(dims[-2])
            regions.append(region._replace(slices=(*leading, slice(above + rows.start, above + rows.stop), columns)))
    *leading, rows, columns = whole_shape(dims)
    return Source(key, (*leading, len(parts) * rows, columns), tuple(regions))


def whole_shape(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(whole_size(dim) for dim in dims)


def whole_size(dim: Dim) -> int:
    """Elements of a dimension."""
    return sum(section if isinstance(section, int) else section.size for section in sections(dim))


def local_size(dim: Dim, mesh: Mesh) -> int:
    """Elements of a dimension that a rank holds."""
    return sum(size for _, size in _sections(dim, mesh))


def sections(dim: Dim) -> tuple[Section, ...]:
    return dim if isinstance(dim, tuple) else (dim,)


def _sections(dim: Dim, mesh: Mesh) -> list[tuple[slice, int]]:
    """What a rank holds of each section: the slice within the section, and its size."""
    return [
        (slice(0, section), section) if isinstance(section, int) else (section.slice(mesh), section.local(mesh))
        for section in sections(dim)
    ]


def _placed_sections(dim: Dim, mesh: Mesh) -> list[tuple[slice, slice]]:
    """The same as slices of the whole dimension and of the rank's; sections that are neighbours in both are one."""
    placed: list[tuple[slice, slice]] = []
    whole = local = 0
    for (taken, size), section in zip(_sections(dim, mesh), sections(dim), strict=True):
        there, here = slice(whole + taken.start, whole + taken.stop), slice(local, local + size)
        if placed and placed[-1][0].stop == there.start:
            before = placed.pop()
            there, here = slice(before[0].start, there.stop), slice(before[1].start, here.stop)
        placed.append((there, here))
        whole, local = whole + whole_size(section), local + size
    return placed
