"""The prefiller's side: rooms, each with one prompt's unit, which one decoder may read once.

The engine's thread offers and closes; the wire's thread answers peers. What is read may be taken back by the engine
meanwhile (a sequence gives way): its room then gets another epoch, and the decoder reads again.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import HandshakeError, TransferError
from .arenas import Arenas
from .identity import check
from .messages import (
    KV,
    MAX_READ_BYTES,
    MAX_ROOM_CHARACTERS,
    SLOTS,
    Agent,
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

MAX_ROOMS = 4096  # that are open, or asked for, at a time
_MAX_PEERS = 1024
_REMEMBERED = 1 << 14  # names of rooms that are over


class Ended(NamedTuple):
    """A room or a pull is over. error: why without success."""

    room: str
    error: TransferError | None


class Reply(NamedTuple):
    """To a peer, with a frame of data or without."""

    peer: bytes
    message: FromPrefiller
    data: bytes | None = None


@dataclass(slots=True, eq=False)
class _Room:
    """heard: when the decoder, or the engine, last did something here. asker: who has asked first; asked: what of it
    was not answered yet."""

    heard: float
    digest: bytes | None = None  # None: asked for, and not offered
    epoch: int = 0
    pages: tuple[int, ...] = ()
    slot: int | None = None
    asker: bytes | None = None
    asked: Ask | None = None
    answer_by: float = 0.0


class Rooms:
    """handles: makes what lets a peer that reads the card's memory map the arenas; agent: through which others can
    read them; ports: of this engine's other ranks."""

    def __init__(
        self,
        arenas: Arenas,
        identity: Identity,
        engine: str,
        lease: float,
        clock: Callable[[], float],
        handles: Callable[[tuple[str, ...]], tuple[bytes, ...]] = lambda cards: (),
        agent: Agent | None = None,
        ports: tuple[int, ...] = (),
    ):
        self._arenas, self._identity, self._engine, self._lease = arenas, identity, engine, lease
        self._clock, self._handles, self._agent, self._ports = clock, handles, agent, ports
        self._lock = threading.Lock()
        self._rooms: dict[str, _Room] = {}
        self._over: OrderedDict[str, str] = OrderedDict()
        self._peers: OrderedDict[bytes, None] = OrderedDict()
        self._ended: list[Ended] = []
        self._parting: list[Reply] = []  # to decoders, of rooms that are over
        self._forgotten: TransferError | None = None
        self._called = clock()  # when the engine last made a call

    # ---- the engine's thread

    def offer(self, name: str, digest: bytes, pages: Sequence[int], slot: int | None, epoch: int) -> None:
        """These pages of a prompt are there to be read, in order, and with a slot all of it is. Again with more of
        them, or with another epoch, after which other pages may be meant. Raises TransferError for a name that was
        used before, and where nobody can ask any more."""
        if not 0 < len(name) <= MAX_ROOM_CHARACTERS:
            raise TransferError(f"the room's name has {len(name)} characters; 1 to {MAX_ROOM_CHARACTERS} are needed.")
        with self._lock:
            self._called = self._clock()
            if any(ended.room == name for ended in self._ended):
                return  # of which the engine is about to be told
            if self._forgotten:
                raise TransferError(str(self._forgotten))
            if name in self._over:
                raise TransferError(f"room {name!r} is over ({self._over[name]}): names can be used once.")
            room = self._rooms.get(name)
            if room is None or room.digest is None:
                if sum(other.digest is not None for other in self._rooms.values()) >= MAX_ROOMS:
                    raise TransferError(f"{MAX_ROOMS} rooms are open, the most there may be.")
                room = self._rooms.setdefault(name, _Room(self._clock()))
                room.digest = digest
            if slot is not None and room.slot is None:
                room.heard = self._clock()
            room.pages, room.slot, room.epoch = tuple(pages), slot, epoch

    def close(self, name: str, reason: str) -> None:
        """The engine needs what it offered, and hears no more of it. Harmless for a room that is over."""
        with self._lock:
            self._ended = [ended for ended in self._ended if ended.room != name]
            if name in self._rooms:
                self._end(name, reason)

    def take_ended(self) -> list[Ended]:
        """Of the rooms that were offered, those that decoders have ended or let lapse since the last call. From when it
        is here nothing of it is read."""
        with self._lock:
            self._called = self._clock()
            ended, self._ended = self._ended, []
        return ended

    @property
    def open(self) -> int:
        return sum(room.digest is not None for room in self._rooms.values())

    # ---- the wire's thread

    def handle(self, peer: bytes, message: FromDecoder) -> list[Reply]:
        """The answers to a message."""
        if isinstance(message, Hello):
            return [Reply(peer, self._welcome(peer, message))]
        with self._lock:
            if peer not in self._peers:
                return [Reply(peer, Stranger())]
            self._peers.move_to_end(peer)
            if message.room in self._over:
                return [Reply(peer, Gone(message.room, self._over[message.room]))]
            room = self._rooms.get(message.room)
            if room is None:
                if len(message.room) > MAX_ROOM_CHARACTERS:
                    return [Reply(peer, Gone(message.room, "no room has so long a name"))]
                if isinstance(message, Leave):
                    self._remember(message.room, "the decoder has left")
                    return []
                if not isinstance(message, Ask) or len(self._rooms) >= 2 * MAX_ROOMS:
                    return [Reply(peer, Gone(message.room, "there is no such room"))]
                room = self._rooms[message.room] = _Room(self._clock())
            if room.asker not in (None, peer):
                return [Reply(peer, Gone(message.room, "another decoder is reading it"))]
            room.asker, room.heard = peer, self._clock()
            match message:
                case Ask():
                    room.asked, room.answer_by = message, self._clock() + self._lease / 4
                    reply = self._answer(message.room, room)
                    return [reply] if reply else []
                case Done(name, epoch):
                    if room.slot is None or epoch != room.epoch:
                        room.asked = Ask(name, room.digest or b"")
                        return [self._answer(name, room) or Reply(peer, Waiting(name, room.digest is not None))]
                    self._end(name, "the decoder has it", part=False)
                    self._ended.append(Ended(name, None))
                    return [Reply(peer, Closed(name))]
                case Leave(name):
                    self._end(name, "the decoder has left", tell=True, part=False)
                    return []
                case Read(name, epoch, number, parts):
                    if epoch != room.epoch:
                        return []  # Ready has told it, or will
                    if not self._readable(room, parts):
                        return [Reply(peer, Gone(name, "it was not offered there"))]
        data = self._arenas.read(parts)
        with self._lock:
            whole = self._rooms.get(name) is room and room.epoch == epoch
        return [Reply(peer, Data(name, number), data)] if whole else []

    def tick(self) -> list[Reply]:
        """Answers to those who have waited for news, and an end to rooms whose lease is over."""
        now, replies = self._clock(), self.parting()
        with self._lock:
            for name, room in list(self._rooms.items()):
                if room.asked is not None and (reply := self._answer(name, room)):
                    replies.append(reply)
                waits = room.digest is not None and room.slot is None  # for the engine, not for the decoder
                if not waits and now - room.heard > self._lease:
                    self._end(name, f"no decoder was heard of for its lease of {self._lease:g} s", tell=True)
        return replies

    def parting(self) -> list[Reply]:
        """What decoders are to hear of rooms that are over."""
        with self._lock:
            replies, self._parting = self._parting, []
        return replies

    def forget(self, error: TransferError) -> None:
        """Nobody can ask any more."""
        with self._lock:
            self._forgotten = error
            for name in list(self._rooms):
                self._end(name, str(error), tell=True)

    def _welcome(self, peer: bytes, hello: Hello) -> Welcome | Refused:
        try:
            check(self._identity, hello.identity)
        except HandshakeError as error:
            return Refused(error.field, error.ours, error.theirs)
        with self._lock:
            self._peers[peer] = None
            if len(self._peers) > _MAX_PEERS:
                self._peers.popitem(last=False)
        agent = self._agent if hello.nixl else None
        return Welcome(self._engine, self._lease, self._handles(hello.cards), agent, self._ports)

    def _answer(self, name: str, room: _Room) -> Reply | None:
        """What there is to say to what was asked; None as long as there is nothing new and it need not be said yet, and
        where the engine that prefills has stood still for a lease: then nobody shall wait for it."""
        asked, peer = room.asked, room.asker
        if room.digest is not None:
            if room.slot is None and self._clock() - self._called > self._lease:
                return None
            if asked.digest != room.digest:
                self._end(name, "it has another prompt", tell=True, part=False)
                return Reply(peer, Gone(name, self._over[name]))
            first = asked.pages if asked.epoch == room.epoch else 0
            if first < len(room.pages) or room.slot is not None or (asked.epoch not in (-1, room.epoch)):
                room.asked = None
                parts = self._arenas.rows(KV, room.pages[first:])
                state = None if room.slot is None else self._arenas.rows(SLOTS, [room.slot])[0]
                return Reply(peer, Ready(name, room.epoch, first, parts, state))
        if self._clock() < room.answer_by:
            return None
        room.asked = None
        return Reply(peer, Waiting(name, room.digest is not None))

    def _readable(self, room: _Room, parts: Sequence) -> bool:
        """Whether every part lies in what the room offers."""
        offered = (set(room.pages), set() if room.slot is None else {room.slot})
        for part in parts:
            if part.arena not in (KV, SLOTS) or part.offset < 0 or part.length < 1:
                return False
            size = self._arenas.row_bytes[part.arena]
            rows = range(part.offset // size, (part.offset + part.length - 1) // size + 1)
            if len(rows) > len(room.pages) + 1 or not offered[part.arena].issuperset(rows):
                return False
        return 0 < sum(part.length for part in parts) <= MAX_READ_BYTES

    def _end(self, name: str, reason: str, tell: bool = False, part: bool = True) -> None:
        """The room is over. tell: the engine, which has not asked for it, as a failure; part: tell the decoder."""
        room = self._rooms.pop(name)
        self._remember(name, reason)
        if part and room.asker is not None:
            self._parting.append(Reply(room.asker, Gone(name, reason)))
        if tell and room.digest is not None:
            self._ended.append(Ended(name, TransferError(reason)))

    def _remember(self, name: str, reason: str) -> None:
        self._over[name] = reason
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
