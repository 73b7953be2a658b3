"""Fixtures of the kernel self-tests, which run on the emulated device or, with --device cuda, on a card."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from .devices import CudaDevice, Device, EmulatedDevice, Golden

SEEDS = range(4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["emulated", "cuda"], default="emulated", help="where the self-tests run")
    parser.addoption("--self-test-library", default=None, help="use this library instead of building one")
    parser.addoption("--record-golden", action="store_true", help="keep what the card computes in golden.npz")


def _option(config: pytest.Config, name: str):
    return config.getoption(name, default=None)  # None when pytest started above this folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the operands are small, and idle threads of torch's pool spin
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_inputs(input_seed):
    torch.manual_seed(input_seed)


@pytest.fixture(scope="session")
def golden(request):
    store = Golden(Path(__file__).parent / "golden.npz", bool(_option(request.config, "--record-golden")))
    yield store
    store.save()


@pytest.fixture(scope="session")
def any_device(request, golden) -> Device:
    library = _option(request.config, "--self-test-library")
    made = CudaDevice(library) if _option(request.config, "--device") == "cuda" else EmulatedDevice(library)
    made.golden = golden
    return made


@pytest.fixture
def device(any_device, request) -> Device:
    """The device of this run, its thread order first in, first out."""
    return _prepare(any_device, request, 0)


@pytest.fixture(params=SEEDS)
def shuffled(any_device, request) -> Device:
    """The device of this run under several schedules; a card has its own."""
    if isinstance(any_device, CudaDevice) and request.param > 0:
        pytest.skip("a card takes no seed")
    return _prepare(any_device, request, request.param)


@pytest.fixture
def emulated(any_device, request) -> EmulatedDevice:
    """The emulated device, for what only it can show: reports of faults and adversarial schedules."""
    if not isinstance(any_device, EmulatedDevice):
        pytest.skip("needs the emulated device")
    return _prepare(any_device, request, 0)


def _prepare(device: Device, request, seed: int) -> Device:
    # The schedule's seed is no part of the name: every schedule must give what the card gave.
    parameters = getattr(request.node, "callspec", None)
    values = [] if parameters is None else sorted(parameters.params.items())
    device.test = "-".join([request.node.originalname, *(str(value) for name, value in values if name != "shuffled")])
    device.calls = 0
    if isinstance(device, EmulatedDevice):
        device.seed(seed)
        device.defer(False)
        device.multiprocessors(4)
    return device


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random inputs fixed by the test's name, so that a golden file can know them."""
    return np.random.default_rng(zlib.crc32(request.node.originalname.encode()))
