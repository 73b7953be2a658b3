"""Fixtures of the operator tests: where an operator runs, and inputs of each test's own."""

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
def fresh_inputs(input_seed):
    torch.manual_seed(input_seed)
