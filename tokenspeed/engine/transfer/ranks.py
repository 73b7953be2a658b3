"""The five calls of an engine of several ranks. Each has an `Endpoint` of its own, lends its part of every page and
slot, and brings its part from the peer's rank of the same number. Rank 0 makes the calls, and the others after it.

    python -m tokenspeed.engine.transfer.ranks    a rank beside rank 0, with its settings as JSON on standard input

What ranks hold is numbered alike, and each of them runs the Steps in the same order. A call that rank 0 makes after a
Step is made by another rank when it has run that Step, too: then what it offers is there, and what it overwrites is not
needed. Only a cancel is made at once, and rank 0 waits for it.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch
import zmq

from ..errors import EngineError, TransferError
from ..executor.ranks import RankSettings, run_rank
from ..executor.runner import Runner
from ..schedule.step import Step
from .arenas import Arenas
from .endpoint import Endpoint
from .identity import fingerprint, identity
from .messages import Identity
from .pull import Source, Targets
from .rooms import Ended

_WAIT_SECONDS = 120.0  # for the other ranks to load
_CANCEL_SECONDS = 30.0
_TICK_MS, _BUSY_TICK_MS = 50, 2


class ShareSettings(msgspec.Struct, frozen=True):
    """What a rank beside rank 0 needs for transfers. link: where rank 0 listens for it; host: of this machine, as peers
    reach it; lends: whether peers read from it; lease, transport: as in `TransferSettings`."""

    link: str
    host: str
    lends: bool
    lease: float
    transport: str


class _Here(msgspec.Struct, tag=True, frozen=True):
    """A rank is there; port: its endpoint's, 0 where it lends nothing."""

    port: int


class _Offer(msgspec.Struct, tag=True, frozen=True):
    """As `Endpoint.offer`, when so many Steps were run."""

    room: str
    steps: int
    digest: bytes
    pages: tuple[int, ...]
    slot: int | None
    epoch: int


class _Pull(msgspec.Struct, tag=True, frozen=True):
    """As `Endpoint.pull`, when so many Steps were run."""

    room: str
    steps: int
    address: str
    digest: bytes
    pages: dict[int, int]
    slot: int


class _Cancel(msgspec.Struct, tag=True, frozen=True):
    """As `Endpoint.cancel`, at once."""

    room: str
    reason: str


class _Cancelled(msgspec.Struct, tag=True, frozen=True):
    """It was."""

    room: str


class _Over(msgspec.Struct, tag=True, frozen=True):
    """As `Ended`."""

    room: str
    error: str | None


_encode = msgspec.msgpack.Encoder().encode
_call = msgspec.msgpack.Decoder(_Offer | _Pull | _Cancel).decode
_answer = msgspec.msgpack.Decoder(_Here | _Cancelled | _Over).decode


class Shares:
    """Rank 0's side: the calls of its `Endpoint`, over all ranks. What has ended at every rank has ended; what has
    failed at one has failed, and is cancelled at the others."""

    def __init__(self, endpoint: Endpoint, link: str, ranks: int, runner: Runner):
        """link: where to listen for the others; runner: whose Steps count from now on."""
        self._endpoint, self._others, self._check = endpoint, range(1, ranks), runner.check
        self._open: dict[str, set[int]] = {}  # rooms and pulls, with the ranks at which they have not ended
        self._ended: list[Ended] = []
        self._heard: list[tuple[int, _Over]] = []
        self._steps = 0
        announce = runner.announce

        def counted(message) -> None:
            announce(message)
            self._steps += isinstance(message, Step)

        runner.announce = counted
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(link)

    @property
    def lease(self) -> float:
        return self._endpoint.lease

    def register(self, arenas: Arenas, identity: Identity) -> None:
        """As `Endpoint.register`, when the other ranks have done so. Raises EngineError where they do not."""
        ports: dict[int, int] = {}
        self._listen(_WAIT_SECONDS, lambda rank, message: ports.update({rank: message.port}), lambda: len(ports))
        self._endpoint.register(arenas, identity, tuple(ports[rank] for rank in self._others))

    def offer(self, room: str, digest: bytes, pages: Sequence[int], slot: int | None, epoch: int) -> None:
        """As `Endpoint.offer`."""
        self._endpoint.offer(room, digest, pages, slot, epoch)
        self._open.setdefault(room, {0, *self._others})
        self._tell(_Offer(room, self._steps, digest, tuple(pages), slot, epoch))

    def pull(self, source: Source, reserve: Callable[[], Targets | None]) -> None:
        """As `Endpoint.pull`."""
        self._endpoint.pull(source, lambda: self._reserve(source, reserve))
        self._open[source.room] = {0}

    def poll(self) -> list[Ended]:
        """As `Endpoint.poll`."""
        for room, error in self._endpoint.poll():
            self._end(0, room, error)
        while self._socket.poll(0):
            self._take(lambda rank, message: None)
        heard, self._heard = self._heard, []
        for rank, over in heard:
            self._end(rank, over.room, over.error and TransferError(f"rank {rank}: {over.error}"))
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, room: str, reason: str = "the engine has cancelled it") -> None:
        """As `Endpoint.cancel`. Raises EngineError where another rank does not answer."""
        left = self._open.pop(room, set()) - {0}
        self._endpoint.cancel(room, reason)
        self._tell(_Cancel(room, reason), left)
        done: set[int] = set()

        def take(rank: int, message) -> None:
            if message == _Cancelled(room):
                done.add(rank)

        self._listen(_CANCEL_SECONDS, take, lambda: len(done) + len(self._others) - len(left))
        self._heard = [(rank, over) for rank, over in self._heard if over.room != room]

    def close(self) -> None:
        """As `Endpoint.close`; the other ranks close with their process."""
        self._endpoint.close()
        self._context.destroy(linger=0)

    def _reserve(self, source: Source, reserve: Callable[[], Targets | None]) -> Targets | None:
        targets = reserve()
        if targets is not None:
            addresses = self._endpoint.pulls.others(source.address)
            if len(addresses) != len(self._others):
                self._heard.append((0, _Over(source.room, "the peer is gone, or its other ranks lend nothing")))
                return targets
            self._open[source.room].update(self._others)
            for rank, address in zip(self._others, addresses, strict=True):
                pull = _Pull(source.room, self._steps, address, source.digest, dict(targets.pages), targets.slot)
                self._tell(pull, [rank])
        return targets

    def _end(self, rank: int, room: str, error: TransferError | None) -> None:
        left = self._open.get(room)
        if left is None:
            return
        left.discard(rank)
        if error is not None:
            self.cancel(room, str(error))
        elif left:
            return
        self._open.pop(room, None)
        self._ended.append(Ended(room, error))

    def _tell(self, call: _Offer | _Pull | _Cancel, ranks: Sequence[int] | set[int] | None = None) -> None:
        for rank in self._others if ranks is None else ranks:
            self._socket.send_multipart([str(rank).encode(), _encode(call)])

    def _take(self, take: Callable[[int, object], None]) -> None:
        name, data = self._socket.recv_multipart()
        message = _answer(data)
        if isinstance(message, _Over):
            self._heard.append((int(name), message))
        else:
            take(int(name), message)

    def _listen(self, seconds: float, take: Callable[[int, object], None], answered: Callable[[], int]) -> None:
        """Until all others have answered. What has ended meanwhile is for `poll`."""
        limit = time.monotonic() + seconds
        while answered() < len(self._others):
            self._check()
            if time.monotonic() > limit:
                raise EngineError(f"another rank takes no part in transfers: nothing was heard of it for {seconds:g} s")
            if self._socket.poll(100):
                self._take(take)


class Share:
    """Another rank's side: makes rank 0's calls on an endpoint of its own, in a thread of its own."""

    def __init__(self, arenas: Arenas, identity: Identity, settings: ShareSettings, rank: int):
        self._device = arenas.device
        self._endpoint = Endpoint(settings.host, 0 if settings.lends else None, settings.lease, settings.transport)
        self._endpoint.register(arenas, identity)
        self._ran = 0
        self._waiting: list[_Offer | _Pull] = []
        self._stopped = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.identity = 0, str(rank).encode()
        self._socket.connect(settings.link)
        self._thread = threading.Thread(target=self._run, name="tokenspeed-share", daemon=True)
        self._thread.start()

    def ran(self) -> None:
        """This rank has run one Step more."""
        self._ran += 1

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._endpoint.close()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        self._send(_Here(self._endpoint.port or 0))
        while not self._stopped.is_set():
            busy = self._waiting or self._endpoint.rooms.open or self._endpoint.pulls.open
            if self._socket.poll(_BUSY_TICK_MS if busy else _TICK_MS):
                self._take(_call(self._socket.recv()))
            while self._waiting and self._waiting[0].steps <= self._ran:
                self._make(self._waiting.pop(0))
            for room, error in self._endpoint.poll():
                self._send(_Over(room, error and str(error)))

    def _take(self, call: _Offer | _Pull | _Cancel) -> None:
        if not isinstance(call, _Cancel):
            self._waiting.append(call)
            return
        self._waiting = [other for other in self._waiting if other.room != call.room]
        self._endpoint.cancel(call.room, call.reason)
        self._send(_Cancelled(call.room))

    def _make(self, call: _Offer | _Pull) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a Step is launched before it was run
        try:
            if isinstance(call, _Offer):
                self._endpoint.offer(call.room, call.digest, call.pages, call.slot, call.epoch)
            else:
                targets = Targets(call.pages, call.slot)
                self._endpoint.pull(Source(call.address, call.room, call.digest), lambda: targets)
        except TransferError as error:
            self._send(_Over(call.room, str(error)))

    def _send(self, answer: _Here | _Cancelled | _Over) -> None:
        self._socket.send(_encode(answer))


@contextlib.contextmanager
def _sharing(runner: Runner, settings: RankSettings) -> Iterator[Callable[[], None]]:
    config, share = settings.config, msgspec.json.decode(settings.beside, type=ShareSettings)
    ranks = config.tensor_parallel_size, config.expert_parallel_size
    own = identity(runner.memory.layout, fingerprint(Path(settings.directory)), config.quantization, ranks)
    found = Share(Arenas(runner.memory), own, share, settings.rank)
    try:
        yield found.ran
    finally:
        found.close()


if __name__ == "__main__":
    sys.exit(run_rank(_sharing))
