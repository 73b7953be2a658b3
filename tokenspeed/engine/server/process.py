"""The engine process: takes messages from one socket between steps, and answers on it.

python -m tokenspeed.engine.server.process ENDPOINT PARENT    with the settings as JSON on standard input
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import zmq

from ..core import Engine
from ..errors import TokenSpeedError
from ..executor.ranks import ALONE, Beside, free_port
from ..llm import load_engine
from ..request import Failure, Request, Update
from ..text.frontend import Frontend
from ..text.grammar import Matcher
from ..transfer.arenas import Arenas
from ..transfer.endpoint import Endpoint
from ..transfer.exchange import Exchange
from ..transfer.identity import fingerprint, identity
from ..transfer.params import Address, Transfer, TransferSettings
from ..transfer.ranks import Shares, ShareSettings
from .kv_events import KvEventPublisher
from .lifeline import end_with_parent, give_way
from .messages import (
    Abort,
    Clear,
    Failed,
    News,
    Ping,
    Pong,
    Ready,
    Refused,
    Settings,
    Stop,
    Submit,
    decode_to_engine,
    encode,
)

_ORPHAN_CHECK_MS, _CHECK_MS = 1000, 2
_MAX_COMPILING = 32


class EngineProcess:
    """The loop around an engine: messages, a step, its news."""

    def __init__(
        self,
        engine: Engine,
        socket: zmq.Socket,
        publisher: KvEventPublisher | None = None,
        exchange: Exchange | None = None,
        address: Address | None = None,
    ):
        """exchange, address: with other engines, where it takes part in transfers."""
        self._engine, self._socket, self._publisher = engine, socket, publisher
        self._exchange, self._address = exchange, address
        self._news: list[Update] = []
        self._parent = os.getppid()
        # As many side by side as can come: they were compiled before, within limits, each key's few at a time.
        self._workers = ThreadPoolExecutor(_MAX_COMPILING, initializer=give_way)
        self._compiling: dict[str, tuple[Future[Matcher], Submit]] = {}
        self._stopped: float | None = None  # when it was told to
        self._blocked = False  # what there is to do waits for something from elsewhere

    def run(self) -> None:
        """Until it is told to stop, or its parent is gone. What decoders are reading then may be read to its end, for a
        lease at most. Raises EngineError where the engine failed."""
        engine = self._engine
        engine.grammars  # noqa: B018 made here, where nobody waits yet
        self._send(Ready(engine.limits.max_tokens, engine.limits.max_seqs, self._address))
        while not self._ended and os.getppid() == self._parent:
            self._submit_compiled()
            self._tell()
            message, self._blocked = self._receive(), False
            if self._exchange:  # behind the wait: who asks for its numbers gets those of now
                self._exchange.step()
            if message:
                self._take(message)
                continue
            if engine.has_work:
                try:
                    engine.step()
                    self._tell()
                    engine.finish()
                finally:
                    self._tell()
                self._publish()
                self._blocked = engine.blocked

    @property
    def _ended(self) -> bool:
        if self._stopped is None:
            return False
        exchange = self._exchange
        return exchange is None or not exchange.lends or time.monotonic() > self._stopped + exchange.lease

    def _receive(self):
        """The next message; waits for one while there is nothing else to do."""
        if self._blocked or not self._engine.has_work:
            soon = self._compiling or self._blocked or self._stopped is not None
            self._socket.poll(_CHECK_MS if soon else _ORPHAN_CHECK_MS)
        try:
            return decode_to_engine(self._socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            return None

    def _take(self, message) -> None:
        match message:
            case Submit(request, grammar, size) as submit:
                if grammar is None:
                    self._submit(request, None, submit.transfer)
                else:  # which takes a while, and others should not wait for it
                    compiling = self._workers.submit(self._engine.grammars.compile, grammar, request.name_space, size)
                    self._compiling[request.id] = compiling, submit
            case Abort(request_id):
                if waiting := self._compiling.pop(request_id, None):
                    continuations = range(waiting[1].request.params.n)
                    self._news += [Update(request_id, i, finish_reason="abort") for i in continuations]
                self._engine.abort(request_id)
                self._tell()
            case Clear():
                self._engine.clear_cache()
                self._publish()
            case Ping(number):
                stats = self._engine.stats() | (self._exchange.stats() if self._exchange else {})
                self._send(Pong(number, stats))
            case Stop():
                self._stopped = time.monotonic()

    def _submit(self, request: Request, grammar: Future[Matcher] | None, transfer: Transfer | None) -> None:
        try:
            compiled = None if grammar is None else grammar.result()
            if transfer is not None and self._exchange is not None:
                self._exchange.submit(request, self._news.append, transfer, compiled)
            else:
                self._engine.submit(request, self._news.append, compiled)
        except TokenSpeedError as error:
            self._send(Refused(request.id, Failure.of(error)))

    def _submit_compiled(self) -> None:
        for id, (future, submit) in list(self._compiling.items()):
            if future.done():
                del self._compiling[id]
                self._submit(submit.request, future, submit.transfer)

    def _tell(self) -> None:
        if self._news:
            self._send(News(self._news))
            self._news.clear()

    def _publish(self) -> None:
        if self._publisher is not None:
            self._publisher.publish()

    def _send(self, message) -> None:
        self._socket.send(encode(message))


def _sharing(settings: Settings) -> tuple[Beside, str]:
    """What the other ranks of an engine do, and where rank 0 listens for them, "" where it need not."""
    config, transfer = settings.config, settings.transfer
    if transfer is None or config.tensor_parallel_size == config.expert_parallel_size == 1:
        return ALONE, ""
    link = f"tcp://127.0.0.1:{free_port()}"
    lends = transfer.role != "decode"
    share = ShareSettings(link, transfer.host, lends, transfer.lease, transfer.transport)
    return Beside(Shares.__module__, msgspec.json.encode(share).decode()), link


@contextlib.contextmanager
def taking_part(engine: Engine, settings: Settings, link: str = "") -> Iterator[tuple[Exchange | None, Address | None]]:
    """Among other engines, where it should; they are told of the end. link: where to listen for the engine's other
    ranks. Raises ConfigError where the address cannot be had."""
    transfer: TransferSettings | None = settings.transfer
    if transfer is None:
        yield None, None
        return
    port = None if transfer.role == "decode" else transfer.port
    endpoint = Endpoint(transfer.host, port, transfer.lease, transfer.transport)
    config, layout, model = settings.config, engine.runner.memory.layout, fingerprint(Path(settings.directory))
    mesh = config.tensor_parallel_size, config.expert_parallel_size
    calls = Shares(endpoint, link, max(mesh), engine.runner) if link else endpoint
    calls.register(Arenas(engine.runner.memory), identity(layout, model, config.quantization, mesh))
    exchange = Exchange(engine, calls)
    try:
        yield exchange, Address(transfer.role, endpoint.engine, endpoint.host, endpoint.port, mesh[0])
    finally:
        try:
            exchange.close()
        finally:
            calls.close()


def main() -> int:
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the HTTP process says what follows
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.linger = 1000
    socket.connect(sys.argv[1])
    try:
        frontend = Frontend.from_directory(Path(settings.directory))
        beside, link = _sharing(settings)
        engine = load_engine(frontend, settings.config, beside=beside)
        publisher = KvEventPublisher(engine.cache, settings.kv_events) if settings.kv_events else None
        with taking_part(engine, settings, link) as (exchange, address):
            EngineProcess(engine, socket, publisher, exchange, address).run()
        return 0
    except TokenSpeedError as error:
        socket.send(encode(Failed(str(error))))
        return 1
    finally:
        socket.close()


if __name__ == "__main__":
    sys.exit(main())
