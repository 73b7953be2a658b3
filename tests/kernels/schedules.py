"""Fixtures for the tests of single kernels: where they run, and under which schedules. A plugin that they name."""

from collections.abc import Iterator

import pytest

from tests.kernels.launches import emulator
from tests.ops.backends import Backend, make_backend

SEEDS = (0, 1, 2, 3)  # 0 is first in, first out; each other one another order of the threads


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def backend(request) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=SEEDS)
def scheduled(request, backend) -> Iterator[Backend]:
    """The backend under several schedules; a card has its own."""
    if backend.emulated is None:
        if request.param > 0:
            pytest.skip("a card takes no seed")
        yield backend
        return
    library = emulator()
    library.emulator_seed(request.param)
    yield backend
    library.emulator_seed(0)
