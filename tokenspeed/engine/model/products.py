"""Products behind a norm: of one weight, or of several joined in one."""

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn

from ... import ops
from ...ops.strict import KERNEL_ROWS
from ..config import ModelConfig
from ..parallel.mesh import Mesh
from .parameters import Section, Source, in_fp8, local_size, matrix, source, whole_size


class PendingNorm(NamedTuple):
    """A block's output, the residual stream without it (None: x is the stream), and the norm of their sum."""

    x: Tensor
    residual: Tensor | None
    norm_weight: Tensor
    eps: float

    def normed(self) -> Tensor:
        if self.residual is None:
            return ops.rms_norm(self.x, self.norm_weight, self.eps)
        return ops.add_rms_norm(self.x, self.residual, self.norm_weight, self.eps)[0]

    def linear(
        self, weight: Tensor, scale: Tensor | None = None, tail: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The product of the norm with a weight, the norm, and the residual stream."""
        if self.residual is None:
            normed = self.normed()
            return ops.linear(normed, weight, scale, tail), normed, self.x
        return ops.add_rms_norm_linear(self.x, self.residual, self.norm_weight, self.eps, weight, scale, tail)

    def linear_of(self, rows: Tensor | None, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The product of some rows of the norm with a weight, of all where `rows` is None, and the whole norm."""
        if rows is None:
            return self.linear(weight, scale)[:2]
        normed = self.normed()
        return ops.linear(normed[rows], weight, scale), normed


class DoneNorm(NamedTuple):
    """In the place of a `PendingNorm` whose norm was made with the sum over ranks: the norm, and the residual stream,
    or this rank's part of it."""

    norm: Tensor
    x: Tensor
    residual: None = None

    def normed(self) -> Tensor:
        return self.norm

    def linear(
        self, weight: Tensor, scale: Tensor | None = None, tail: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.linear(self.norm, weight, scale, tail), self.norm, self.x

    def linear_of(self, rows: Tensor | None, weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.linear(self.norm if rows is None else self.norm[rows], weight, scale), self.norm


class Joined(nn.ModuleList):
    """Several products of one x behind its norm: one launch, or, of more rows than a decode step has, two where the
    leading ones are in FP8 and others not.

    outputs: of each product, the checkpoint tensors that stand above one another in it, by their names below `block`,
    with the sections of their rows.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, block: str, outputs: list[dict[str, tuple[Section, ...]]]):
        super().__init__()
        self.mesh, self.hidden = mesh, config.hidden
        leading = list(takewhile(lambda output: all(f"{block}.{name}" in config.fp8 for name in output), outputs))
        rows = {name: whole_size(rows) for output in leading for name, rows in output.items()}
        fp8 = bool(rows) and in_fp8(config, block, rows)
        groups = [leading, outputs[len(leading) :]] if fp8 else [outputs]
        self.groups = [group for group in groups if group]
        # Few heads leave odd widths, and kernels read the rows of the product in vectors of 8 elements.
        self.extend(
            matrix(mesh, sum((sum(output.values(), ()) for output in group), ()), config.hidden, fp8=each, multiple=8)
            for group, each in zip(self.groups, (fp8, False), strict=False)
        )
        self.widths = [
            [sum(local_size(rows, mesh) for rows in output.values()) for output in group] + [each.data.padding]
            for group, each in zip(self.groups, self, strict=True)
        ]

    def sources(self) -> Iterator[Source]:
        for group, each in zip(self.groups, self, strict=True):
            named = [(name, rows) for output in group for name, rows in output.items()]
            widths = [local_size(rows, self.mesh) for _, rows in named] + [each.data.padding]
            for (name, rows), part in zip(named, each.part.split(widths), strict=False):
                yield source(f"{name}.weight", part, self.mesh, rows, self.hidden)

    def forward(self, x: PendingNorm | DoneNorm) -> tuple[list[Tensor], Tensor, Tensor]:
        """The products in order, the norm, and the residual stream."""
        first, *others = self
        joined = bool(others) and len(x.x) <= KERNEL_ROWS
        projected, normed, residual = x.linear(*first, others[0].data) if joined else x.linear(*first)
        if joined:
            results = projected.split([len(each.data) for each in self], dim=1)
        else:
            results = [projected, *(ops.linear(normed, *each) for each in others)]
        pairs = zip(results, self.widths, strict=True)
        return [part for result, widths in pairs for part in result.split(widths, dim=1)[:-1]], normed, residual
