"""A million random operations under AddressSanitizer and UBSan, against a simulated device."""

import re

from tests.cache import fuzz


def test_a_million_random_operations_break_nothing_and_do_everything():
    result = fuzz.run(1_000_000, seed=1, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {name: int(count) for count, name in re.findall(r"(\d+) ([a-z][a-z ]+)", result.stdout.splitlines()[-1])}
    for event in ("operations", "hits", "page copies", "pages appended in place", "snapshots evicted"):
        assert counts[event] > 500, result.stdout
    for event in ("consumed in place", "forks", "refusals"):
        assert counts[event] > 100, result.stdout
