"""Prompts."""

from random import Random


def text(seed: int, count: int) -> list[int]:
    """So many ids at random."""
    random = Random(seed)
    return [random.randrange(300) for _ in range(count)]
