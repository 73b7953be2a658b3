"""The decoder's side: pulls, each bringing one room's unit into pages and a slot that the engine sets aside for it.

The engine's thread starts and cancels; the wire's thread speaks with the peers and writes what they send. A pull that
was cancelled is never written for again, so what was set aside can be given away at once.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import HandshakeError, TransferError
from .arenas import Arenas, Move
from .messages import (
    MAX_LEASE_SECONDS,
    MAX_READ_BYTES,
    Ask,
    Closed,
    Data,
    Done,
    FromDecoder,
    FromPrefiller,
    Gone,
    Hello,
    Identity,
    Leave,
    Read,
    Ready,
    Refused,
    Stranger,
    Waiting,
    Welcome,
)
from .nixl import STAGE_BYTES, Nixl, Remote
from .pull import Pull, Source, Targets
from .rooms import Ended

log = logging.getLogger("tokenspeed.transfer")

_READS = 4  # of one pull on their way
_MAPPED_BYTES = 64 << 20  # that are copied at a time from a peer's arena that is mapped here


@dataclass(slots=True, eq=False)
class _Peer:
    """welcome: None until it has answered Hello; arenas: of it, where they are mapped here; remote: where they can be
    read through NIXL."""

    address: str
    welcome: Welcome | None = None
    arenas: list | None = None
    remote: Remote | None = None


class Pulls:
    """send: takes a message to an address, from the wire's thread; map_arenas: of handles (`Welcome`), where they can
    be mapped; nixl: where peers' arenas can be read through it."""

    def __init__(
        self,
        arenas: Arenas,
        identity: Identity,
        engine: str,
        lease: float,
        clock: Callable[[], float],
        send: Callable[[str, FromDecoder], None],
        cards: tuple[str, ...] = (),
        map_arenas: Callable[[tuple[bytes, ...]], list] | None = None,
        nixl: Nixl | None = None,
    ):
        self._arenas, self._hello, self._lease = arenas, Hello(engine, identity, cards, nixl is not None), lease
        self._clock, self._send, self._map, self._nixl = clock, send, map_arenas, nixl
        self._lock = threading.Lock()  # of the two below; a pull's own guards what is written for it
        self._pulls: dict[str, Pull] = {}
        self._ended: list[Ended] = []
        self._starting: deque[Pull] = deque()
        self._parting: deque[Source] = deque()
        self._peers: dict[str, _Peer] = {}
        self._forgotten: TransferError | None = None
        self._number = 0
        self._reading: dict[int, tuple[Pull, float]] = {}  # reads through NIXL, and since when
        self.bytes = 0  # that were brought so far

    # ---- the engine's thread

    def pull(self, source: Source, reserve: Callable[[], Targets | None]) -> None:
        """Bring what a room offers. reserve: asked once something is there, by `poll`, and again until there is room.
        Raises TransferError for a room that is being pulled, and where nobody can be heard of any more."""
        with self._lock:
            if self._forgotten:
                raise TransferError(str(self._forgotten))
            if source.room in self._pulls:
                raise TransferError(f"room {source.room!r} is being pulled: names can be used once.")
            pull = self._pulls[source.room] = Pull(source, reserve, self._clock())
            self._starting.append(pull)

    def cancel(self, room: str) -> None:
        """When this returns nothing is written any more, and nothing is told of it. Harmless for one that has ended."""
        with self._lock:
            pull = self._pulls.pop(room, None)
            self._ended = [ended for ended in self._ended if ended.room != room]
        if pull is not None:
            self._stop(pull)
            self._parting.append(pull.source)

    def reserve(self) -> bool:
        """Sets places aside for what is ready, the first that asked first. Whether some were."""
        with self._lock:
            waiting = [pull for pull in self._pulls.values() if pull.targets is None and pull.ready]
        some = False
        for pull in waiting:
            targets = pull.reserve()
            if targets is None:
                break
            pull.targets, some = targets, True
        return some

    def take_ended(self) -> list[Ended]:
        """Of the pulls that were not cancelled, those that have ended since the last call. Nothing is written for them
        any more."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    @property
    def open(self) -> int:
        return len(self._pulls)

    def others(self, address: str) -> list[str]:
        """Where the other ranks of a peer are; none where it has not answered yet."""
        peer = self._peers.get(address)
        welcome = peer and peer.welcome
        return [f"{address.rpartition(':')[0]}:{port}" for port in welcome.ports] if welcome else []

    # ---- the wire's thread

    @property
    def reading(self) -> bool:
        """Whether something is being read of whose end no message tells."""
        return bool(self._reading)

    def handle(self, address: str, message: FromPrefiller, data: bytes | None = None) -> None:
        """A message of a peer."""
        peer = self._peers.get(address)
        if peer is None:
            return
        match message:
            case Welcome() as welcome:
                self._welcomed(peer, welcome)
            case Refused(name, ours, theirs):
                self._lose(peer, HandshakeError(name, theirs, ours))
            case Stranger():
                if peer.welcome is not None:
                    peer.welcome = peer.arenas = None
                    self._disconnect(peer)
                    self._send(address, self._hello)
            case _:
                pull = self._pulls.get(message.room)
                if pull is None or pull.source.address != address:
                    return
                if not (isinstance(message, Waiting) and not message.offered):
                    pull.heard = self._clock()
                self._take(pull, peer, message, data)

    def tick(self) -> None:
        """What is due: pulls that start, targets that were set aside meanwhile, leases."""
        while self._starting:
            pull = self._starting.popleft()
            peer = self._peers.get(pull.source.address)
            if peer is None:
                peer = self._peers[pull.source.address] = _Peer(pull.source.address)
                self._send(peer.address, self._hello)
            elif peer.welcome is not None:
                self._begin(peer, pull)
        self.part()
        now = self._clock()
        self._take_read(now)
        for room, pull in list(self._pulls.items()):
            peer = self._peers.get(pull.source.address)
            lease = peer.welcome.lease if peer and peer.welcome else self._lease
            if now - pull.heard > lease:
                silence = self._silence(pull, lease)
                if peer is not None and peer.welcome is None:
                    self._lose(peer, silence)
                else:
                    self._end(room, silence)
                    self._parting.append(pull.source)
            elif peer is not None:
                lost = now - max(pull.heard, pull.asked) > lease / 2  # something, on its way
                if lost and peer.welcome is None:
                    pull.asked = now
                    self._send(peer.address, self._hello)
                elif lost:
                    self._begin(peer, pull)
                elif peer.remote is not None and pull.reads and now - pull.asked > lease / 4:
                    self._ask(pull)  # the peer sees nothing of what is read
                self._go_on(pull, peer)

    def part(self) -> None:
        """Tells peers of what was given up."""
        while self._parting:
            source = self._parting.popleft()
            self._send(source.address, Leave(source.room))

    def drop_idle(self) -> set[str]:
        """Forgets the peers that nothing is pulled from, and says which are left."""
        with self._lock:
            used = {pull.source.address for pull in self._pulls.values()}
        for address in self._peers.keys() - used:
            self._disconnect(self._peers.pop(address))
        return used

    def forget(self, error: TransferError) -> None:
        """Nobody can be heard of any more; `part` still tells peers."""
        with self._lock:
            self._forgotten, pulls = error, list(self._pulls.values())
        for pull in pulls:
            self._end(pull.source.room, error)
            self._parting.append(pull.source)

    def lose(self, address: str, error: TransferError) -> None:
        """What is pulled from there fails; the next pull greets the peer anew."""
        if peer := self._peers.get(address):
            self._lose(peer, error)

    def _silence(self, pull: Pull, lease: float) -> TransferError:
        what = f"nothing was heard of room {pull.source.room!r} at {pull.source.address} for {lease:g} s"
        return TransferError(what + ("" if pull.ready else ": it was not offered there") + ".")

    def _welcomed(self, peer: _Peer, welcome: Welcome) -> None:
        if not 0 < welcome.lease <= MAX_LEASE_SECONDS:
            self._lose(peer, TransferError(f"{peer.address} has a lease of {welcome.lease:g} s"))
            return
        peer.welcome, peer.arenas = welcome, None
        self._disconnect(peer)
        if welcome.handles and self._map is not None:
            try:
                peer.arenas = self._map(welcome.handles)
            except TransferError as error:
                self._lose(peer, error)
                return
        if peer.arenas is None and welcome.agent is not None and self._nixl is not None:
            peer.remote = self._nixl.connect(welcome.engine, welcome.agent)
        for pull in list(self._pulls.values()):
            if pull.source.address == peer.address:
                self._begin(peer, pull)

    def _begin(self, peer: _Peer, pull: Pull) -> None:
        """Ask for everything."""
        wanted = pull.source.engine
        if wanted is not None and peer.welcome.engine != wanted:
            message = f"engine {wanted!r} is gone; {peer.welcome.engine!r} answers at {peer.address}."
            self._end(pull.source.room, TransferError(message))
            return
        pull.restart(-1)
        self._ask(pull)

    def _lose(self, peer: _Peer, error: TransferError) -> None:
        """A peer that says or does nothing useful: the next pull greets it anew."""
        self._disconnect(self._peers.pop(peer.address))
        for room, pull in list(self._pulls.items()):
            if pull.source.address == peer.address:
                self._end(room, error)

    def _disconnect(self, peer: _Peer) -> None:
        if peer.remote is not None:
            self._nixl.disconnect(peer.remote)
            peer.remote = None

    def _ask(self, pull: Pull) -> None:
        pull.asked = self._clock()
        ask = Ask(pull.source.room, pull.source.digest, pull.epoch, len(pull.offsets))
        self._send(pull.source.address, ask)

    def _take(self, pull: Pull, peer: _Peer, message: FromPrefiller, data: bytes | None) -> None:
        room = pull.source.room
        match message:
            case Waiting():
                self._ask(pull)
            case Ready(_, epoch, first, parts, state):
                if epoch != pull.epoch:
                    pull.restart(epoch)
                if first == len(pull.offsets):
                    try:
                        pull.found(parts, state, self._arenas)
                    except TransferError as error:
                        self._end(room, TransferError(f"{peer.address} offers {error}"))
                        return
                if state is None:
                    self._ask(pull)
                self._go_on(pull, peer)
            case Data(_, number):
                moves = pull.reads.pop(number, None)
                if moves is None:  # of an epoch that is over
                    return
                if data is None or len(data) != sum(part.length for part, _ in moves):
                    self._end(room, TransferError(f"{peer.address} sent other bytes than it was asked for"))
                    return
                self._write(pull, moves, lambda: self._arenas.write(moves, data))
                self._go_on(pull, peer)
            case Closed():
                self._end(room, None if pull.done else TransferError("the room was closed before it was read"))
            case Gone(_, reason):
                self._end(room, TransferError(f"room {room!r} at {peer.address}: {reason}"))

    def _go_on(self, pull: Pull, peer: _Peer) -> None:
        """Read what is ready and has a place, and say when that was all."""
        if pull.targets is None or pull.done or peer.welcome is None:
            return
        pull.queue(self._arenas)
        while pull.moves and pull.alive and len(pull.reads) < _READS:
            if peer.arenas is not None:
                moves = pull.take(_MAPPED_BYTES)
                self._write(pull, moves, lambda moves=moves: self._arenas.copy(moves, peer.arenas))
            elif peer.remote is None:
                moves = self._begin_read(pull, MAX_READ_BYTES)
                read = Read(pull.source.room, pull.epoch, self._number, tuple(part for part, _ in moves))
                self._send(pull.source.address, read)
            elif self._nixl.free:
                moves = self._begin_read(pull, STAGE_BYTES)
                self._reading[self._number] = pull, self._clock()
                try:
                    self._nixl.read(peer.remote, self._number, moves)
                except TransferError as error:
                    self._take_failed(self._number, str(error))
            elif self._reading:
                return  # their end makes room
            else:
                self._to_sockets(peer, "reads that have begun do not end")
        if pull.alive and pull.complete:
            pull.done = True
            self._send(pull.source.address, Done(pull.source.room, pull.epoch))

    def _begin_read(self, pull: Pull, most: int) -> list[Move]:
        self._number += 1
        moves = pull.reads[self._number] = pull.take(most)
        return moves

    def _take_read(self, now: float) -> None:
        """What has come through NIXL. What has failed, or does not end within a lease, is asked for over the socket."""
        for number, found in self._nixl.ended() if self._nixl is not None else ():
            pull, _ = self._reading.get(number, (None, 0.0))
            if pull is not None and found is None:
                self._take_failed(number, "a read has failed")
            elif pull is not None:
                del self._reading[number]
                if moves := pull.reads.pop(number, None):  # of this epoch
                    self._write(pull, moves, lambda moves=moves, found=found: self._arenas.place(moves, found))
        for number, (_, since) in list(self._reading.items()):
            if now - since > self._lease:
                self._take_failed(number, f"a read has not ended within the lease of {self._lease:g} s")

    def _take_failed(self, number: int, reason: str) -> None:
        pull, _ = self._reading.pop(number)
        pull.moves.extendleft(reversed(pull.reads.pop(number, ())))
        if peer := self._peers.get(pull.source.address):
            self._to_sockets(peer, reason)

    def _to_sockets(self, peer: _Peer, reason: str) -> None:
        if peer.remote is not None:
            log.warning("%s is not read through NIXL any more, but over its socket: %s", peer.address, reason)
        self._disconnect(peer)

    def _write(self, pull: Pull, moves: list[Move], write: Callable[[], None]) -> None:
        try:
            pull.write(moves, write)
        except TransferError as error:
            self._end(pull.source.room, error)

    def _stop(self, pull: Pull) -> None:
        pull.stop()
        self.bytes += pull.bytes

    def _end(self, room: str, error: TransferError | None) -> None:
        with self._lock:
            pull = self._pulls.pop(room, None)
        if pull is not None:
            self._stop(pull)
            with self._lock:
                self._ended.append(Ended(room, error))
