"""What holds for all tests: which cases of a thinned test run, that inputs are those of the last run, and no garbage
collection over what stays."""

import gc
import random
import zlib

import hypothesis
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "run thinned tests with all their cases, and every test with inputs that no run had before (make fuzz)"
    parser.addoption("--every-case", action="store_true", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: its settings are made from this profile."""
    if not config.getoption("--every-case"):
        hypothesis.settings.register_profile("repeated", derandomize=True)
        hypothesis.settings.load_profile("repeated")


@pytest.fixture
def input_seed(request: pytest.FixtureRequest) -> int:
    """Of a test's random inputs: the same at every run, but with --every-case; pytest shows it beside a failure."""
    if not request.config.getoption("--every-case"):
        return zlib.crc32(request.node.nodeid.encode())
    seed = random.SystemRandom().randrange(2**32)
    print(f"torch.manual_seed({seed})")
    return seed


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `thinned(n, *names)` about one case in n runs: where the places of its values of these
    parameters, counted from 0 in the order in which the test lists them, sum up to a multiple of n. Every value still
    runs, and with three parameters or more any value of one still meets any value of another."""
    if config.getoption("--every-case"):
        return
    seen: dict[tuple[str, str], dict[str, int]] = {}  # by test and parameter the place of each value

    def runs(item: pytest.Item) -> bool:
        marker = item.get_closest_marker("thinned")
        if marker is None:
            return True
        one_in, *names = marker.args
        total = 0
        for name in names:
            places = seen.setdefault((item.nodeid.partition("[")[0], name), {})
            total += places.setdefault(repr(item.callspec.params[name]), len(places))
        return total % one_in == 0

    kept, left_out = [], []
    for item in items:
        (kept if runs(item) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collected tests and imported modules stay: no later collection looks through them
