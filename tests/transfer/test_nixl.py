"""Units that are read through NIXL: with agents of the test's own, and, where the package is, two processes of it."""

import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from fake_nixl import FakeAgent, Network
from lab import TOLERANCE, random_model
from lives import live
from pair import LEASE as PAIR_LEASE
from pair import Pair
from texts import text
from wire import ADDRESS, IDENTITY, LEASE, SLOT_BYTES, Wire, arenas

from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.transfer import nixl, pulls
from tokenspeed.engine.transfer.endpoint import Endpoint, address_of
from tokenspeed.engine.transfer.messages import Agent, Closed, Data, Read, Welcome
from tokenspeed.engine.transfer.nixl import STAGE_BYTES, Nixl
from tokenspeed.engine.transfer.pull import Targets

PAGES, SLOT = (3, 4, 5, 9, 1), 2
TARGETS = Targets({1: 7, 2: 2, 3: 3, 4: 11}, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A slot takes several reads."""
    monkeypatch.setattr(pulls, "STAGE_BYTES", 1 << 20)


def started(network: Network, room: str = "room", wire: Wire | None = None) -> Wire:
    wire = wire or Wire(network=network)
    wire.rooms.offer(room, b"prompt", PAGES, SLOT, 0)
    wire.pulls.pull(wire.source(room), lambda: TARGETS)
    return wire


def kinds(wire: Wire) -> set[type]:
    return {type(message) for message in wire.sent}


def test_a_unit_is_read_without_a_message_for_its_bytes():
    network = Network()
    wire = started(network)
    wire.run()
    assert wire.pulls.take_ended() == wire.rooms.take_ended() == [("room", None)]
    assert wire.arrived(TARGETS, PAGES, SLOT) and wire.pulls.bytes == 4 * 700 + SLOT_BYTES
    assert network.reads > 2 and not kinds(wire) & {Read, Data} and not wire.pulls.reading


def test_neighbours_are_one_descriptor_and_a_read_has_both_arenas(monkeypatch):
    monkeypatch.setattr(pulls, "STAGE_BYTES", STAGE_BYTES)
    network, lists = Network(), []
    wire = Wire(network=network)
    real = wire.taking._agent.initialize_xfer
    wire.taking._agent.initialize_xfer = lambda *given: lists.append(given[1:3]) or real(*given)
    started(network, wire=wire).run()
    ((here, there),) = lists
    assert [length for _, length, _ in there] == [2 * 700, 700, 700, SLOT_BYTES]  # pages 4 and 5, 9, 1, the slot
    assert len(here) == 4 and wire.arrived(TARGETS, PAGES, SLOT)


def test_pages_that_were_taken_back_are_read_again():
    wire = Wire(network=Network())
    wire.pulls.pull(wire.source("room"), lambda: TARGETS)
    wire.rooms.offer("room", b"prompt", (3, 4), None, 0)
    wire.run()
    wire.there.flat[0].random_(0, 256, generator=torch.Generator().manual_seed(5))
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 1)
    wire.run()
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)


@pytest.mark.parametrize("which", [0, 1, 3])
@pytest.mark.parametrize("outcome", ["ERR", RuntimeError("disconnected"), "at once", "PROC"])
def test_a_read_that_fails_or_never_ends_goes_over_the_socket(which, outcome):
    network = Network(fault=lambda number: "DONE")
    network.at_once = outcome == "at once"
    failing = RuntimeError("disconnected") if outcome == "at once" else outcome
    network.fault = lambda number: failing if number == which else "DONE"
    wire = started(network)
    wire.run(2 * LEASE)
    assert wire.pulls.take_ended() == wire.rooms.take_ended() == [("room", None)]
    assert wire.arrived(TARGETS, PAGES, SLOT) and kinds(wire) >= {Read, Data} and wire.pulls.bytes >= SLOT_BYTES
    lost = sum(not any(stage is other for other in wire.taking._free) for stage in wire.taking._stages)
    assert lost == (outcome == "PROC"), "a stage that may still be written is used again, or one that may not is not"
    assert wire.taking._agent.known == ({"prefill-engine"} if lost else set())


def test_what_takes_longer_than_a_lease_in_all_is_not_given_up(monkeypatch):
    """Neither by the decoder, who hears nothing, nor by the prefiller, who sees nothing."""
    monkeypatch.setattr(pulls, "_READS", 1)
    network, handles = Network(polls=10**9), []
    wire = Wire(network=network)
    real = wire.taking._agent.initialize_xfer
    wire.taking._agent.initialize_xfer = lambda *given: handles.append(real(*given)) or handles[-1]
    started(network, wire=wire)
    for number in range(4):
        wire.run(0.6 * LEASE)
        assert network.reads == number + 1
        handles[number].polls = 0
    wire.run()
    assert wire.now > 2 * LEASE and wire.pulls.take_ended() == [("room", None)]
    assert wire.arrived(TARGETS, PAGES, SLOT) and not kinds(wire) & {Read, Data}


def test_a_cancelled_pull_is_not_written_for():
    network = Network(polls=5)
    wire = started(network)
    before = [flat.clone() for flat in wire.here.flat]
    while not network.reads:
        wire._poll()
        wire.deliver()
    wire.pulls.cancel("room")
    wire.run(1)
    assert all(torch.equal(*pair) for pair in zip(wire.here.flat, before, strict=True)) and not wire.pulls.reading
    assert len(wire.taking._free) == len(wire.taking._stages), "its stages are of use again"


def test_stages_that_never_come_back_are_no_reason_to_wait():
    network = Network(fault=lambda number: "PROC")
    wire = started(network, "0")
    for room in "1234":
        started(network, room, wire)
    wire.run(2 * LEASE)
    assert [error for _, error in wire.pulls.take_ended()] == [None] * 5
    assert network.reads == len(wire.taking._stages) and not wire.taking.free
    wire.pulls.lose(ADDRESS, ConfigError("a new greeting"))
    started(network, "later", wire).run(1)
    assert wire.pulls.take_ended() == [("later", None)], "with no stage left, it waits for one"


def test_more_pulls_than_stages_wait_for_each_other():
    network = Network()
    wire = Wire(network=network)
    for room in "012345":
        started(network, room, wire)
    wire.run()
    assert [error for _, error in wire.pulls.take_ended()] == [None] * 6 and Read not in kinds(wire)


def messages_of_a_transfer() -> list:
    wire = Wire(network=Network())
    wire.rooms.offer("room", b"prompt", PAGES[:3], None, 0)
    wire.pulls.pull(wire.source("room"), lambda: TARGETS)
    wire.run()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run()
    assert wire.pulls.take_ended()[0].error is None
    return wire.sent


MESSAGES = messages_of_a_transfer()


@pytest.mark.parametrize("number", range(len(MESSAGES)))
@pytest.mark.parametrize("who", ["prefiller", "decoder", "message", "twice"])
def test_whatever_is_lost_at_any_message_both_sides_end_within_their_leases(number, who):
    network = Network()
    wire = Wire(network=network)
    network.fault = lambda _: "DONE" if wire.prefiller_lives else RuntimeError("disconnected")

    def fault(at: int, message) -> int:
        if at == number and who in ("prefiller", "decoder"):
            setattr(wire, f"{who}_lives", False)
        return 1 if at != number else 2 if who == "twice" else 0

    wire.fault = fault
    wire.rooms.offer("room", b"prompt", PAGES[:3], None, 0)
    wire.pulls.pull(wire.source("room"), lambda: TARGETS)
    wire.run()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run(2 * LEASE + 1)
    pulled, ended = wire.pulls.take_ended(), wire.rooms.take_ended()
    if wire.decoder_lives:
        assert len(pulled) == 1 and not wire.pulls.open
        assert pulled[0].error is not None or wire.arrived(TARGETS, PAGES, SLOT)
    if wire.prefiller_lives:
        assert len(ended) == 1 and not wire.rooms.open
    if who == "twice" or (who == "message" and not isinstance(MESSAGES[number], Closed)):
        assert pulled[0].error is None


@pytest.mark.parametrize(
    "agent",
    [
        Agent(b"garbage", "DRAM", 0, (1, 2)),
        Agent(b"agent other", "DRAM", 0, (1, 2)),
        Agent(b"agent prefill-engine", "DRAM", 0, (1,)),
        Agent(b"agent prefill-engine", "DISK", 0, (1, 2)),
        Agent(b"agent prefill-engine", "DRAM", 0, (1, 2)),  # nothing is registered there
    ],
)
def test_a_peer_whose_agent_is_of_no_use_is_read_over_its_socket(agent):
    wire = Wire(network=Network())
    wire.rooms._agent = agent
    started(wire, wire=wire).run(1)
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)
    assert kinds(wire) >= {Read, Data} and not wire.taking._agent.known


def test_only_who_can_read_so_is_told_of_the_agent():
    network = Network()
    for there, here in [(network, None), (None, network)]:
        wire = Wire(network=there)
        wire.pulls = pulls.Pulls(
            wire.here, IDENTITY, "decode-engine", LEASE, lambda wire=wire: wire.now, wire._send,
            nixl=here and Nixl(wire.here, "decode-engine", here.agent),
        )  # fmt: skip
        started(network, wire=wire).run()
        (welcome,) = [message for message in wire.sent if isinstance(message, Welcome)]
        assert welcome.agent is None and wire.pulls.take_ended() == [("room", None)]


def test_a_peer_that_is_not_needed_is_forgotten_by_the_agent():
    wire = started(Network())
    wire.run()
    assert wire.taking._agent.known == {"prefill-engine"}
    wire.pulls.drop_idle()
    assert not wire.taking._agent.known and len(wire.taking._agent.regions) == 3
    wire.taking.close()
    wire.lending.close()


def test_without_the_package_transfers_go_over_sockets_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    bytes = arenas(16, 4, 1)
    assert nixl.start(bytes, "engine", required=False) is None
    with pytest.raises(ConfigError, match="cannot go through NIXL: ModuleNotFoundError"):
        nixl.start(bytes, "engine", required=True)


# ---- whole engines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random"))


TINY = {"pages": 14, "slots": 4, "max_seqs": 3}


@pytest.mark.parametrize("prefill, decode", [({}, {}), (TINY, TINY)])
def test_random_lives_through_two_engines_with_reads_that_fail(model, prefill, decode):
    random = Random(7)
    network = Network(polls=3)
    network.fault = lambda number: random.choices(["DONE", "ERR", "PROC"], [100, 2, 1])[0]
    options = {"prefill": {"max_num_batched_tokens": 96} | prefill, "decode": decode}
    pair = Pair(model, **options, seed=2, network=network)
    pair.decode.engine.limits = pair.prefill.engine.limits = min(
        pair.decode.engine.limits, pair.prefill.engine.limits, key=lambda limits: limits.max_tokens
    )
    live(pair.decode, 2, turns=10)
    pair.settle()
    assert pair.decode.difference() <= TOLERANCE and pair.taker.pulled > 2 and network.reads > 2


def test_a_prefiller_that_is_killed_at_any_read_costs_a_computation(model):
    for killed in range(0, 12, 3):
        network = Network()
        pair = Pair(model, prefill={"max_num_batched_tokens": 64}, seed=3, network=network)

        def fault(number: int, wire=pair.wire, killed=killed) -> str | Exception:
            if number >= killed:
                wire.prefiller_lives = False
            return "DONE" if wire.prefiller_lives else RuntimeError("disconnected")

        network.fault = fault
        talks = [pair.decode.submit(text(i, 500 + 100 * i), max_tokens=3) for i in range(2)]
        start = pair.wire.now
        pair.settle()
        assert network.reads > killed and pair.wire.now - start < 3 * PAIR_LEASE
        assert all(talk.finished for talk in talks) and pair.decode.difference() <= TOLERANCE


# ---- the package

DECODER = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from wire import IDENTITY, arenas
from tokenspeed.engine.transfer.endpoint import Endpoint
from tokenspeed.engine.transfer.pull import Source, Targets

here = arenas(16, 4, 2)
end = Endpoint("127.0.0.1", None, 20.0, "nixl")
end.register(here, IDENTITY)
for room in sys.argv[4:]:
    end.pull(Source(sys.argv[3], room, b"prompt"), lambda: Targets({i: 15 - i for i in range(9)}, 3))
    while not (ended := end.poll()):
        time.sleep(0.001)
    remote = any(peer.remote is not None for peer in end.pulls._peers.values())
    page, slot = here.row_bytes
    pages = here.flat[0].view(16, page).flip(0)[:9].sum(1).tolist()
    print(ended[0].error, remote, pages, here.flat[1][3 * slot :].sum().item(), sep="|", flush=True)
    here.flat[0].zero_()
    here.flat[1].zero_()
end.close()
"""


@pytest.fixture
def lender():
    pytest.importorskip("nixl")
    end = Endpoint("127.0.0.1", 0, 20.0)
    end.bytes = arenas(16, 4, 1)
    end.register(end.bytes, IDENTITY)
    yield end
    end.close()


def test_a_unit_goes_from_one_process_to_another(lender):
    rooms = ("a", "b", "c")
    for room in rooms:
        lender.offer(room, b"prompt", range(9), 2, 0)
    paths = str(Path(__file__).parent), str(Path(__file__).parents[2])
    command = [sys.executable, "-c", DECODER, *paths, address_of(lender.host, lender.port), *rooms]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout
    page, slot = lender.bytes.row_bytes
    pages = lender.bytes.flat[0].view(16, page)[:9].sum(1).tolist()
    state = lender.bytes.flat[1][2 * slot : 3 * slot].sum().item()
    lines = [line for line in out.splitlines() if line.count("|") == 3]
    assert lines == [f"None|True|{pages}|{state}"] * 3, "wrong, or over the socket"
    limit, ended = time.monotonic() + 20, []
    while len(ended) < 3:
        assert time.monotonic() < limit
        ended += lender.poll()
    assert sorted(ended) == [(room, None) for room in rooms]


def test_the_package_has_what_the_agents_of_these_tests_have():
    package = pytest.importorskip("nixl")
    used = {name for name in vars(FakeAgent) if not name.startswith("_")}
    assert used <= set(dir(package.nixl_agent))
