"""Measures every kernel beside its peers and the physical floor: `python -m benchmarks`."""
