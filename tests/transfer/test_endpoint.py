"""The five calls over real sockets and threads."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from lab import TOLERANCE, Lab, random_model
from texts import text
from wire import IDENTITY, arenas

from tokenspeed.engine.errors import ConfigError, HandshakeError, TransferError
from tokenspeed.engine.transfer import endpoint
from tokenspeed.engine.transfer.arenas import Arenas
from tokenspeed.engine.transfer.endpoint import Endpoint, address_of
from tokenspeed.engine.transfer.exchange import Exchange
from tokenspeed.engine.transfer.messages import MAX_MESSAGE_BYTES, VERSION, Ask, encode
from tokenspeed.engine.transfer.params import RemoteDecode, RemotePrefill
from tokenspeed.engine.transfer.pull import Source, Targets

LEASE = 1.0


@pytest.fixture
def ends():
    """Two of them, with arenas of bytes."""
    made = []

    def make(seed: int, identity=IDENTITY, lease: float = LEASE) -> Endpoint:
        end = Endpoint("127.0.0.1", 0, lease, "sockets")
        made.append(end)
        end.bytes = arenas(16, 4, seed)
        end.register(end.bytes, identity)
        return end

    yield make
    for end in made:
        end.close()


def source(there: Endpoint, room: str = "room") -> Source:
    return Source(address_of(there.host, there.port), room, b"prompt", there.engine)


def ended(end: Endpoint, seconds: float = 20.0) -> tuple:
    limit = time.monotonic() + seconds
    while not (found := end.poll()):
        assert time.monotonic() < limit, "it does not end"
        time.sleep(0.005)
    return tuple(found)


def die(end: Endpoint) -> None:
    """Without a word."""
    end._part = lambda: None
    end.close()


def test_a_unit_goes_over_sockets(ends):
    there, here = ends(1), ends(2)
    here.pull(source(there), lambda: Targets({0: 5, 1: 6, 2: 1}, 3))
    there.offer("room", b"prompt", (4, 5), None, 0)
    time.sleep(0.05)
    there.offer("room", b"prompt", (4, 5, 2), 1, 0)
    assert ended(here) == (("room", None),) and ended(there) == (("room", None),)
    size, slot = here.bytes.row_bytes
    page = here.bytes.flat[0][5 * size : 7 * size]
    assert page.equal(there.bytes.flat[0][4 * size : 6 * size])
    assert here.bytes.flat[1][3 * slot : 4 * slot].equal(there.bytes.flat[1][slot : 2 * slot])


def test_a_peer_that_dies_is_noticed_on_both_sides_within_the_lease(ends):
    there, here = ends(1), ends(2)
    there.offer("room", b"prompt", (4, 5), None, 0)
    here.pull(source(there), lambda: Targets({0: 5, 1: 6}, 3))
    time.sleep(0.2)
    start = time.monotonic()
    die(there)
    ((room, error),) = ended(here)
    assert room == "room" and "nothing was heard" in str(error) and time.monotonic() - start < 3 * LEASE
    with pytest.raises(TransferError, match="have ended"):
        there.offer("other", b"prompt", (), None, 0)
    third, fourth = ends(3), ends(4)
    third.offer("room", b"prompt", (4, 5), 1, 0)
    fourth.pull(source(third), lambda: None)
    time.sleep(0.2)
    start = time.monotonic()
    die(fourth)
    ((room, error),) = ended(third)
    assert "lease" in str(error) and time.monotonic() - start < 3 * LEASE


@pytest.mark.parametrize("slot", [None, 1])
def test_an_engine_that_ends_tells_its_peers_at_once(ends, slot):
    there, here, third = (ends(seed, lease=60.0) for seed in (1, 2, 3))
    there.offer("room", b"prompt", (4, 5), slot, 0)
    here.pull(source(there), lambda: None)
    third.offer("other", b"prompt", (4, 5), slot, 0)
    here.pull(source(third, "other"), lambda: None)
    limit = time.monotonic() + 20
    while not (there.rooms._rooms["room"].asker and third.rooms._rooms["other"].asker):
        assert time.monotonic() < limit
        time.sleep(0.005)
    there.close()
    ((room, error),) = ended(here)
    assert room == "room" and "transfers have ended" in str(error)
    here.close()
    ((room, error),) = ended(third)
    assert room == "other" and str(error) == "the decoder has left"


def test_a_wire_thread_that_fails_ends_transfers_and_nothing_else(ends, tmp_path, monkeypatch):
    there, lab = ends(1), Lab(random_model(tmp_path))
    here = Endpoint("127.0.0.1", 0, 60.0)
    here.register(Arenas(lab.memory), IDENTITY)
    exchange, submit = Exchange(lab.engine, here), lab.engine.submit

    def pulled(request, sink, grammar=None):
        monkeypatch.setattr(lab.engine, "submit", submit)
        exchange.submit(request, sink, RemotePrefill(request.id, there.host, there.port), grammar)

    def fails():
        raise OSError("planted")

    monkeypatch.setattr(lab.engine, "submit", pulled)
    before = lab.submit(text(1, 100))
    lent = replace(before.request, id="lent", prompt=tuple(text(3, 200)), boundaries=())
    exchange.submit(lent, lambda update: None, RemoteDecode("room"))
    monkeypatch.setattr(here.rooms, "tick", fails)
    here._thread.join(20)
    assert not here._thread.is_alive()
    lab.engine.step()
    lab.engine.step()
    exchange.step()
    assert not exchange.lends
    with pytest.raises(TransferError, match="have ended"):
        here.offer("another", b"prompt", (), None, 0)
    with pytest.raises(TransferError, match="have ended"):
        exchange.submit(before.request, print, RemoteDecode("third"))
    monkeypatch.setattr(lab.engine, "submit", pulled)
    after = lab.submit(text(2, 100))
    lab.run()
    assert before.finished and after.finished and exchange.failed == 2 and lab.difference() <= TOLERANCE
    exchange.close()
    here.close()


def test_a_message_that_cannot_be_followed_costs_its_sender_alone(ends, monkeypatch):
    there, here = ends(1, lease=0.5), ends(2, lease=0.5)
    monkeypatch.setattr(there.rooms, "_handles", lambda card: 1 // 0)
    here.pull(source(there, "lost"), lambda: Targets({}, 0))
    ((_, error),) = ended(here)
    assert "nothing was heard" in str(error)
    monkeypatch.undo()
    monkeypatch.setattr(here.pulls, "_welcomed", lambda peer, welcome: 1 // 0)
    here.pull(source(there, "lost too"), lambda: Targets({}, 0))
    ((_, error),) = ended(here)
    assert "ZeroDivisionError" in str(error)
    monkeypatch.undo()
    there.offer("room", b"prompt", (4,), 1, 0)
    here.pull(source(there), lambda: Targets({0: 5}, 3))
    assert ended(here) == (("room", None),)


def test_an_address_where_nobody_is_ends_with_the_lease(ends):
    here = ends(2, lease=0.3)
    for address in ("tcp://127.0.0.1:1", "tcp://no.such.host.invalid:5", "nonsense"):
        here.pull(Source(address, address, b"prompt"), lambda: Targets({}, 0))
    found = []
    while len(found) < 3:
        found += ended(here)
    assert all("nothing was heard" in str(error) for _, error in found)


def test_connections_to_who_does_not_answer_are_few(ends, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_IDLE_PEERS", 2)
    monkeypatch.setattr(endpoint, "_MAX_PEERS", 4)
    there, here = ends(1), ends(2, lease=0.2)
    for turn in range(2):
        for port in range(1, 7):
            nobody = Source(address_of("127.0.0.1", 10 * turn + port), f"room {turn} {port}", b"prompt")
            here.pull(nobody, lambda: None)
        left = 6
        while left:
            left -= len(ended(here))
        assert len(here._dealers) <= 4
    there.offer("room", b"prompt", (4,), 1, 0)
    here.pull(source(there), lambda: Targets({0: 5}, 3))
    assert ended(here) == (("room", None),)


def test_who_sends_without_end_has_its_turn_and_no_more(ends):
    end, came = ends(1), []

    def message(flags):
        came.append(1)
        assert len(came) < 10_000, "nobody else has a turn"
        return [b"peer", encode(Ask("room", b"prompt"))]

    def answer(flags):
        return message(flags)[1:]

    die(end)
    end._router, end._reply = SimpleNamespace(recv_multipart=message), lambda reply: None
    end._take_asked()
    end._take_answered("tcp://127.0.0.1:1", SimpleNamespace(recv_multipart=answer))
    assert came


def test_another_layout_is_refused_with_both_values(ends):
    there, here = ends(1), ends(2, msgspec.structs.replace(IDENTITY, page_dtype="float8_e4m3fn"))
    here.pull(source(there), lambda: Targets({}, 0))
    ((_, error),) = ended(here)
    assert isinstance(error, HandshakeError)
    assert (error.field, error.ours, error.theirs) == ("page_dtype", "float8_e4m3fn", "float32")


def test_strange_messages_harm_nobody(ends):
    there, here = ends(1), ends(2)
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger, socket.rcvtimeo = 0, 5000
    socket.connect(address_of(there.host, there.port))
    try:
        frame = encode(Ask("room", b"prompt"))
        for message in (b"", b"\0", b"\xff" * 50, frame[:-1], bytes([VERSION]) + b"\x93" * 2000):
            socket.send(message)
        socket.send_multipart([frame, frame, frame])
        answers = [socket.recv() for _ in range(4)]  # to those of another version
        assert all(msgspec.msgpack.decode(answer[1:])["type"] == "Refused" for answer in answers)
        socket.send(bytes(MAX_MESSAGE_BYTES + 1))  # its connection is cut
        there.offer("room", b"prompt", (4,), 1, 0)
        here.pull(source(there), lambda: Targets({0: 5}, 3))
        assert ended(here) == (("room", None),)
    finally:
        socket.close()


def test_a_port_that_is_taken_is_named(ends):
    there = ends(1)
    with pytest.raises(ConfigError, match=f"port {there.port}"):
        Endpoint("127.0.0.1", there.port, LEASE).register(there.bytes, IDENTITY)


def test_engines_in_threads_of_their_own_answer_as_one_would(tmp_path):
    model = random_model(tmp_path)
    labs = [Lab(model, max_num_batched_tokens=64), Lab(model)]
    ends = [Endpoint("127.0.0.1", 0, 5.0), Endpoint("127.0.0.1", None, 5.0)]
    for lab, end in zip(labs, ends, strict=True):
        end.register(Arenas(lab.memory), IDENTITY)
    lender, taker = (Exchange(lab.engine, end) for lab, end in zip(labs, ends, strict=True))
    finished = threading.Event()

    def loop(lab: Lab, exchange: Exchange) -> None:
        while not finished.is_set():
            if lab.engine.has_work:
                lab.engine.step()
            exchange.step()
            time.sleep(0.001)

    talks = []
    real = labs[1].engine.submit
    for i in range(4):
        room = f"room {i}"
        where = RemotePrefill(room, ends[0].host, ends[0].port, ends[0].engine)

        def pulled(request, sink, grammar=None, where=where):
            labs[1].engine.submit = real
            taker.submit(request, sink, where, grammar)

        labs[1].engine.submit = pulled
        talks.append(labs[1].submit(text(i, 200 + 70 * i), n=1 + i % 2))
        lender.submit(talks[-1].request, lambda update: None, RemoteDecode(room))
    threads = [threading.Thread(target=loop, args=pair) for pair in zip(labs, (lender, taker), strict=True)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 60
    while not all(talk.finished for talk in talks) or lender.stats()["transfer_rooms"]:
        assert time.monotonic() < limit
        time.sleep(0.01)
    finished.set()
    for thread in threads:
        thread.join()
    for end in ends:
        end.close()
    labs[1].run()
    assert labs[1].difference() <= TOLERANCE and taker.pulled == lender.offered == 4 and taker.failed == 0
    assert [labs[1].tokens_computed(talk) for talk in talks] == [1] * 4
