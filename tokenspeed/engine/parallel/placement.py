"""Placements: how a tensor is laid out over a named group of ranks. Values only; at world size 1 they cost nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of `group` holds an equal slice of dimension `dim`."""

    dim: int
    group: str = "tp"


@dataclass(frozen=True, slots=True)
class Partial:
    """Each rank of `group` holds a term; the tensor is their sum."""

    group: str = "tp"


Placement = Replicate | Shard | Partial
