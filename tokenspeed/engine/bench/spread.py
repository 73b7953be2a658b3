"""Percentiles of a measurement."""

from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The 50th, the 90th and the 99th percentile."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """By the nearest rank; 0 where there are none."""
        ordered = sorted(values) or [0.0]
        return cls(*(ordered[max(-(-len(ordered) * percent // 100) - 1, 0)] for percent in (50, 90, 99)))
