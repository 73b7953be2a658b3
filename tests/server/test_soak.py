"""The short form of the soak: the same clients, until each kind of answer has come often enough."""

import sys

import pytest

from tests.server import soak
from tests.server.launch import Server


@pytest.fixture(scope="module")
def report():
    server = Server(*soak.OPTIONS)
    found = soak.soak(server, seconds=0, streams=500, progress=sys.stderr.isatty(), each=4)
    yield found
    assert server.stop() == 0, "".join(server.log[-20:])


def test_nothing_is_left_of_500_clients_that_come_and_go(report):
    assert report.left == []
    assert all(report.outcomes[kind] >= 4 * soak.LEAST_ROUNDS for kind in soak.KINDS), report.outcomes


@pytest.mark.parametrize("process", ["server", "engine"])
def test_memory_stays_flat(report, process):
    assert report.growth(process) < soak.SHORT_GROWTH_KIB_PER_MINUTE, report.memory[process]
