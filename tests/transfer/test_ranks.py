"""The five calls over the ranks of two engines, each rank with arenas of its own."""

import socket
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
import torch
from wire import IDENTITY, arenas

from tokenspeed.engine.errors import EngineError, HandshakeError, TransferError
from tokenspeed.engine.schedule.step import Step
from tokenspeed.engine.transfer import ranks
from tokenspeed.engine.transfer.endpoint import Endpoint, address_of
from tokenspeed.engine.transfer.pull import Source, Targets
from tokenspeed.engine.transfer.ranks import Share, Shares, ShareSettings

RANKS, LEASE = 3, 2.0
PAGES, SLOT, TARGETS = (4, 5, 2), 1, Targets({0: 5, 1: 6, 2: 1}, 3)
SPLIT = msgspec.structs.replace(IDENTITY, ranks=(RANKS, 1))


class Engine:
    """calls: rank 0's; others: the ranks beside it; arenas: of all of them, in their order. A Step that is announced is
    run by the others when `run` says so."""

    def __init__(self, seed: int, lends: bool, identity=SPLIT, lease: float = LEASE):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            link = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.arenas = [arenas(16, 4, 10 * seed + rank) for rank in range(RANKS)]
        self.runner = SimpleNamespace(announce=lambda message: None, check=lambda: None)
        self.endpoint = Endpoint("127.0.0.1", 0 if lends else None, lease)
        self.calls = Shares(self.endpoint, link, RANKS, self.runner)
        settings = ShareSettings(link, "127.0.0.1", lends, lease, "auto")
        self.others = [Share(self.arenas[rank], identity, settings, rank) for rank in range(1, RANKS)]
        self.calls.register(self.arenas[0], identity)

    def step(self) -> None:
        self.runner.announce(Step())

    def run(self) -> None:
        for other in self.others:
            other.ran()

    def close(self) -> None:
        for other in self.others:
            other.close()
        self.calls.close()


@pytest.fixture
def engines():
    made = []

    def make(*given, **named) -> Engine:
        made.append(Engine(*given, **named))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def source(there: Engine, room: str = "room") -> Source:
    return Source(address_of(there.endpoint.host, there.endpoint.port), room, b"prompt", there.endpoint.engine)


def ended(engine: Engine) -> tuple:
    limit = time.monotonic() + 20
    while not (found := engine.calls.poll()):
        assert time.monotonic() < limit, "it does not end"
        time.sleep(0.005)
    return tuple(found)


def until(*engines: Engine, condition) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "it has not come about"
        assert [engine.calls.poll() for engine in engines] == [[]] * len(engines)
        time.sleep(0.005)


def arrived(there: Engine, here: Engine) -> list[bool]:
    """Rank by rank, whether a unit is where it should be."""
    found = []
    for own, other in zip(here.arenas, there.arenas, strict=True):
        (size, slot), same = own.row_bytes, True
        for page, target in TARGETS.pages.items():
            one, two = own.flat[0][target * size :][:size], other.flat[0][PAGES[page] * size :][:size]
            same &= one.equal(two)
        found.append(same and own.flat[1][3 * slot :].equal(other.flat[1][slot : 2 * slot]))
    return found


def test_each_rank_brings_its_part(engines):
    there, here = engines(1, True), engines(2, False)
    there.calls.offer("room", b"prompt", PAGES[:2], None, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    time.sleep(0.05)
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    assert ended(here) == ended(there) == (("room", None),)
    assert arrived(there, here) == [True] * RANKS


@pytest.mark.parametrize("late", ["there", "here"])
def test_a_call_is_made_by_the_others_when_they_have_run_the_steps_before_it(engines, late):
    """What a Step writes is there, and what it overwrites is not needed."""
    there, here = engines(1, True, lease=20.0), engines(2, False, lease=20.0)
    slow = {"there": there, "here": here}[late]
    slow.step()
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    until(there, here, condition=lambda: arrived(there, here)[0] and all(other._waiting for other in slow.others))
    assert here.calls.poll() == [] and arrived(there, here) == [True, False, False]
    slow.run()
    assert ended(here) == ended(there) == (("room", None),) and arrived(there, here) == [True] * RANKS


@pytest.mark.parametrize("side", ["there", "here"])
def test_what_fails_at_one_rank_fails_and_is_given_up_at_all(engines, side):
    """A pull may be over before the other side has heard of it: then the lease ends the room there."""
    there, here = engines(1, True, lease=5.0), engines(2, False, lease=5.0)
    broken = {"there": there, "here": here}[side].others[1]._endpoint
    if side == "there":
        broken.rooms.offer = lambda *_: (_ for _ in ()).throw(TransferError("planted"))
    else:
        broken.pulls.pull = lambda *_: (_ for _ in ()).throw(TransferError("planted"))
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    ((room, error),) = ended({"there": there, "here": here}[side])
    assert room == "room" and str(error) == "rank 2: planted"
    ((room, error),) = ended({"there": here, "here": there}[side])
    assert room == "room" and error is not None
    everyone = [engine.endpoint for engine in (there, here)]
    everyone += [other._endpoint for engine in (there, here) for other in engine.others]
    assert not any(one.rooms.open or one.pulls.open for one in everyone)


def test_after_a_cancel_nothing_is_written_at_any_rank(engines):
    there, here = engines(1, True), engines(2, False)
    here.calls.pull(source(there), lambda: TARGETS)
    there.calls.offer("room", b"prompt", PAGES[:2], None, 0)
    until(here, condition=lambda: here.others[1]._endpoint.pulls.bytes or here.others[1]._endpoint.pulls.open)
    here.calls.cancel("room")
    assert not any(other._endpoint.pulls.open for other in here.others)
    before = [flat.clone() for own in here.arenas for flat in own.flat]
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    assert [room for room, error in ended(there) if error] == ["room"] and here.calls.poll() == []
    assert all(map(torch.equal, before, [flat for own in here.arenas for flat in own.flat]))


def test_what_was_heard_of_a_cancelled_pull_is_no_news_of_the_next_of_its_name(engines):
    there, other, here = engines(1, True, lease=20.0), engines(3, True, lease=20.0), engines(2, False, lease=20.0)
    last = here.others[1]
    pull, last._endpoint.pulls.pull = last._endpoint.pulls.pull, lambda *_: None
    cancel = last._endpoint.cancel
    last._endpoint.cancel = lambda *given: last._send(ranks._Over("room", "planted")) or cancel(*given)
    there.calls.offer("room", b"prompt", PAGES[:2], None, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    until(here, condition=lambda: here.others[0]._endpoint.pulls.open)
    here.calls.cancel("room")
    last._endpoint.pulls.pull = pull
    other.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    here.calls.pull(source(other), lambda: TARGETS)
    assert ended(here) == (("room", None),) and arrived(other, here) == [True] * RANKS


def test_a_cancel_waits_for_the_others(engines):
    there, here = engines(1, True), engines(2, False)
    there.calls.offer("room", b"prompt", PAGES[:2], None, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    until(here, condition=lambda: all(other._endpoint.pulls.open for other in here.others))
    told, cancel = threading.Event(), here.others[0]._endpoint.cancel
    here.others[0]._endpoint.cancel = lambda *given: told.wait() and cancel(*given)
    thread = threading.Thread(target=here.calls.cancel, args=("room",))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "what that rank writes now may be somebody else's"
    told.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_call_that_was_cancelled_before_its_time_is_not_made(engines):
    there, here = engines(1, True), engines(2, False)
    here.step()
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    here.calls.pull(source(there), lambda: TARGETS)
    until(there, here, condition=lambda: all(other._waiting for other in here.others))
    here.calls.cancel("room")
    assert not any(other._waiting for other in here.others)
    here.run()
    assert not any(other._endpoint.pulls.open for other in here.others)


def test_engines_of_other_ranks_are_refused_with_both_values(engines):
    there, here = engines(1, True), engines(2, False, identity=msgspec.structs.replace(IDENTITY, ranks=(1, RANKS)))
    here.calls.pull(source(there), lambda: TARGETS)
    ((_, error),) = ended(here)
    assert isinstance(error, HandshakeError)
    assert (error.field, error.ours, error.theirs) == ("ranks", f"(1, {RANKS})", f"({RANKS}, 1)")


def test_a_rank_that_does_not_answer_is_named_and_a_lost_one_is_what_it_is(engines, monkeypatch):
    there = engines(1, True)
    there.calls.offer("room", b"prompt", PAGES, SLOT, 0)
    held = threading.Event()
    there.others[0]._endpoint.cancel = lambda *given: held.wait()
    monkeypatch.setattr(ranks, "_CANCEL_SECONDS", 0.1)
    with pytest.raises(EngineError, match="nothing was heard"):
        there.calls.cancel("room")
    there.calls._check = lambda: (_ for _ in ()).throw(EngineError("rank 1 ended"))
    there.calls._open["room"] = {1}
    with pytest.raises(EngineError, match="rank 1 ended"):
        there.calls.cancel("room")
    held.set()
