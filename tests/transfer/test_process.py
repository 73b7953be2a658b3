"""How an engine process with transfers waits, and how it ends."""

import time
from types import SimpleNamespace

import pytest
import zmq
from lab import Lab, random_model
from scenarios import arriving
from texts import text
from wire import IDENTITY, arenas

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.server import process
from tokenspeed.engine.server.messages import Stop, encode
from tokenspeed.engine.server.process import EngineProcess, taking_part
from tokenspeed.engine.transfer.endpoint import Endpoint, address_of
from tokenspeed.engine.transfer.params import RemotePrefill, TransferSettings
from tokenspeed.engine.transfer.pull import Source

CONFIG = SimpleNamespace(quantization="none", tensor_parallel_size=1, expert_parallel_size=1)


class Socket:
    """Brings Stop. polls: milliseconds that were waited for more."""

    def __init__(self):
        self.polls, self._messages = [], [encode(Stop())]

    def send(self, data: bytes) -> None:
        pass

    def poll(self, milliseconds: int) -> None:
        self.polls.append(milliseconds)

    def recv(self, flags: int) -> bytes:
        if self._messages:
            return self._messages.pop()
        raise zmq.Again


class Rooms:
    """An exchange of which a room is open for so many steps."""

    def __init__(self, steps: int, lease: float):
        self.steps, self.lease = steps, lease

    @property
    def lends(self) -> bool:
        return self.steps > 0

    def step(self) -> bool:
        self.steps -= 1
        return False


ENGINE = SimpleNamespace(grammars=None, limits=SimpleNamespace(max_tokens=1, max_seqs=1), has_work=False)


@pytest.mark.parametrize("steps, lease, left", [(0, 60.0, False), (9, 60.0, False), (10**9, 0.05, True)])
def test_rooms_are_read_to_their_end_before_the_engine_stops_but_no_longer_than_a_lease(steps, lease, left):
    socket, exchange = Socket(), Rooms(steps, lease)
    start = time.monotonic()
    EngineProcess(ENGINE, socket, exchange=exchange).run()
    assert exchange.lends == left and time.monotonic() - start < 10
    assert max(socket.polls[1:], default=0) <= 2


def test_an_engine_that_stops_leaves_what_it_pulls(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "fingerprint", lambda directory: "")
    monkeypatch.setattr(process, "identity", lambda *_: IDENTITY)
    lab, there = Lab(random_model(tmp_path)), Endpoint("127.0.0.1", 0, 60.0)
    there.register(arenas(16, 4, 1), IDENTITY)
    transfer = TransferSettings("both", lease=60.0)
    settings = SimpleNamespace(transfer=transfer, directory=".", config=CONFIG)
    try:
        with pytest.raises(KeyError), taking_part(lab.engine, settings) as (exchange, address):
            talk, submit = None, lab.engine.submit

            def pulled(request, sink, grammar=None):
                lab.engine.submit = submit
                exchange.submit(request, sink, RemotePrefill("room", there.host, there.port), grammar)

            lab.engine.submit = pulled
            talk = lab.submit(text(1, 100))
            there.pull(Source(address_of(address.host, address.port), "lent", b"prompt"), lambda: None)
            limit = time.monotonic() + 20
            while "room" not in there.rooms._rooms:
                assert time.monotonic() < limit
                exchange.step()
                time.sleep(0.005)
            raise KeyError("whatever ends it")
        while "room" not in there.rooms._over:
            assert time.monotonic() < limit
            time.sleep(0.005)
        assert there.rooms._over["room"] == "the decoder has left"
        lab.run()
        assert talk.finished and exchange.failed == 1, "it was given back to be computed"
    finally:
        there.close()


def test_a_role_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "0")
    assert main(["serve", "--role", "decode", "--tp", "2"]) == 1
    assert "--role decode under torchrun" in capsys.readouterr().err


def test_moves_are_waited_for_by_the_engine_and_not_by_its_socket(tmp_path):
    lab, again = arriving(random_model(tmp_path))
    assert lab.scheduler.awaits_moves and not lab.engine._in_flight and not lab.engine.blocked
    lab.let_moves_finish()
    lab.run()
    assert again.finished and not lab.scheduler.awaits_moves


def test_a_request_that_is_held_blocks_the_engine(tmp_path):
    lab = Lab(random_model(tmp_path))
    talk = lab.submit(text(1, 20))
    talk.sequences[0].held = True
    lab.engine.step()
    assert lab.engine.blocked
