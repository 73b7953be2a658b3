"""Placements: how a tensor is laid out over a named group of ranks. Values only; at world size 1 they cost nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of `group` holds an equal slice of dimension `dim`."""

    dim: int
    group: str = "tp"

    def __str__(self) -> str:
        return f"Shard({self.dim}, {self.group})"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank of `group` holds a term; the tensor is their sum."""

    group: str = "tp"

    def __str__(self) -> str:
        return f"Partial({self.group})"


@dataclass(frozen=True, slots=True)
class Keep:
    """Input of a stage that takes any placement and passes it on: one that picks rows, say."""

    def __str__(self) -> str:
        return "Keep"


Placement = Replicate | Shard | Partial | Keep
