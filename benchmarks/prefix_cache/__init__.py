"""Replays request traces and agent sessions through the prefix cache: `python -m benchmarks.prefix_cache --help`."""
