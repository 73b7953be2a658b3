"""Parameters that hold a rank's part of a weight, and which regions of checkpoint tensors fill them."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..parallel.mesh import Mesh
from ..parallel.sharding import Split

# A dimension of a weight: whole on every rank, split over ranks, or several such sections one after the other.
Section = int | Split
Dim = Section | tuple[Section, ...]


class Region(NamedTuple):
    """A part of a checkpoint tensor, and the part of a parameter, of the same shape, that it fills."""

    slices: tuple[slice, ...]
    part: Tensor


class Source(NamedTuple):
    """A checkpoint tensor. shape: of the whole; regions: what this rank takes, nothing where only others need it."""

    key: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


def weight(mesh: Mesh, *dims: Dim, dtype: torch.dtype | None = None, multiple: int = 1) -> nn.Parameter:
    """An unfilled parameter of the rank's part of a [dims...] weight; `.dims` keeps what it is a part of.

    Rows come in multiples of `multiple`: `.padding` of them, the last, are zeros that stand for nothing.
    """
    rows, *rest = (sum(size for _, size in _sections(dim, mesh)) for dim in dims)
    padding = -rows % multiple
    parameter = nn.Parameter(torch.empty(rows + padding, *rest, dtype=dtype), requires_grad=False)
    parameter[rows:].zero_()
    parameter.dims, parameter.padding = dims, padding
    return parameter


def source(key: str, part: Tensor, mesh: Mesh, *dims: Dim) -> Source:
    """Fill `part` with the rank's part of the checkpoint tensor `key` of [dims...], section by section."""
    regions = []
    for sections in product(*(list(_placed_sections(dim, mesh)) for dim in dims)):
        whole, local = zip(*sections, strict=True)
        regions.append(Region(whole, part[local]))
    return Source(key, whole_shape(dims), tuple(regions))


def elsewhere(key: str, *dims: Dim) -> Source:
    """A checkpoint tensor that belongs to the model and of which this rank holds nothing."""
    return Source(key, whole_shape(dims), ())


def whole_shape(dims: tuple[Dim, ...]) -> tuple[int, ...]:
    return tuple(sum(_size(section) for section in sections(dim)) for dim in dims)


def sections(dim: Dim) -> tuple[Section, ...]:
    return dim if isinstance(dim, tuple) else (dim,)


def _size(section: Section) -> int:
    return section if isinstance(section, int) else section.size


def _sections(dim: Dim, mesh: Mesh) -> list[tuple[slice, int]]:
    """What a rank holds of each section: the slice within the section, and its size."""
    return [
        (slice(0, section), section) if isinstance(section, int) else (section.slice(mesh), section.local(mesh))
        for section in sections(dim)
    ]


def _placed_sections(dim: Dim, mesh: Mesh) -> Iterator[tuple[slice, slice]]:
    """The same as slices of the whole dimension and of the rank's."""
    whole = local = 0
    for (taken, size), section in zip(_sections(dim, mesh), sections(dim), strict=True):
        yield slice(whole + taken.start, whole + taken.stop), slice(local, local + size)
        whole, local = whole + _size(section), local + size
