"""Fixtures of the operator tests: where an operator runs, and fresh inputs at every run."""

import random

import pytest
import torch

from .backends import ALL, Backend, make_backend


@pytest.fixture(scope="session", params=ALL)
def backend(request) -> Backend:
    return make_backend(request.param)


@pytest.fixture(scope="session", params=ALL[:1])
def fp32(request) -> Backend:
    """The torch implementation in fp32 only: claims about rounding, or about sizes that no kernel has."""
    return make_backend(request.param)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operands are small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_inputs():
    seed = random.SystemRandom().randrange(2**32)
    print(f"torch.manual_seed({seed})")  # pytest shows it beside a failure
    torch.manual_seed(seed)
