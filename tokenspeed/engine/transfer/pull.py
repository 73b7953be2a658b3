"""One pull: where its unit lies at the peer, what of it is still to be read, and what is written for it here. It sends
nothing: `pulls` speaks with the peers."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import TransferError
from .arenas import Arenas, Move
from .messages import KV, MAX_READ_BYTES, SLOTS, Part

_MAX_OFFSET = 1 << 62  # with which one can reckon in 64 bits


class Targets(NamedTuple):
    """Where a unit goes. pages: of the prompt's page numbers those that are lacking, each with the page it goes to;
    slot: where the state goes."""

    pages: Mapping[int, int]
    slot: int


class Source(NamedTuple):
    """Where a unit is. address: as ZeroMQ takes it; engine: whose it is to be, None for whoever answers there."""

    address: str
    room: str
    digest: bytes
    engine: str | None = None


@dataclass(slots=True, eq=False)
class Pull:
    """heard, asked: when something was heard of the room, and when it was asked for; targets: None until places were
    set aside; offsets: where each of the prompt's pages lies at the peer, as far as they are ready. queued: pages of
    which the moves were made out; state: where the state lies, once it is ready; reads: on their way, by number; done:
    all was read, which is said; bytes: that were written; alive: whether anything may still be written."""

    source: Source
    reserve: Callable[[], Targets | None]
    heard: float
    targets: Targets | None = None
    epoch: int = -1
    offsets: list[int] = field(default_factory=list)
    queued: int = 0
    state: Part | None = None
    state_queued: bool = False
    moves: deque[Move] = field(default_factory=deque)
    reads: dict[int, list[Move]] = field(default_factory=dict)
    asked: float = 0.0
    done: bool = False
    bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    alive: bool = True

    @property
    def ready(self) -> bool:
        """Whether something is there to be read."""
        return bool(self.offsets) or self.state is not None

    @property
    def complete(self) -> bool:
        """Whether everything was read."""
        return self.state_queued and not self.moves and not self.reads

    def restart(self, epoch: int) -> None:
        """Whatever was read counts no more."""
        self.epoch, self.queued, self.state, self.state_queued, self.done = epoch, 0, None, False, False
        self.offsets.clear()
        self.moves.clear()
        self.reads.clear()

    def found(self, parts: Sequence[Part], state: Part | None, arenas: Arenas) -> None:
        """The next pages lie there, and the state. Raises TransferError for what cannot be a unit's."""
        (page, slot), pages = arenas.row_bytes, len(self.offsets)
        for part in parts:
            if part.arena != KV or part.length < 1 or part.length % page:
                raise TransferError(f"{part} as pages of {page} bytes")
            pages += part.length // page
        if pages * page > arenas.flat[KV].numel():
            raise TransferError(f"{pages} pages, more than there are here")
        if state is not None and (state.arena, state.length) != (SLOTS, slot):
            raise TransferError(f"{state} as a state of {slot} bytes")
        if wrong := [part for part in (*parts, state) if part and not 0 <= part.offset < _MAX_OFFSET]:
            raise TransferError(f"{wrong[0]}, where no arena can be")
        for part in parts:
            self.offsets += range(part.offset, part.offset + part.length, page)
        self.state = state

    def queue(self, arenas: Arenas) -> None:
        """Makes out the moves of what was found since the last call; places are set aside."""
        for page in range(self.queued, len(self.offsets)):
            if page in self.targets.pages:
                part = Part(KV, self.offsets[page], arenas.row_bytes[KV])
                self.moves += _pieces(part, arenas.page(self.targets.pages[page]))
        self.queued = len(self.offsets)
        if self.state is not None and not self.state_queued:
            self.moves += _pieces(self.state, arenas.slot(self.targets.slot))
            self.state_queued = True

    def take(self, most: int) -> list[Move]:
        """The next moves, of so many bytes at most; they are queued no more."""
        taken, size = [], 0
        while self.moves and size + self.moves[0].part.length <= most:
            taken.append(self.moves.popleft())
            size += taken[-1].part.length
        return taken

    def write(self, moves: Sequence[Move], write: Callable[[], None]) -> None:
        """Writes what was read for these moves, where the pull is alive. Raises TransferError where that fails."""
        with self.lock:
            if not self.alive:
                return
            try:
                write()
            except RuntimeError as error:  # the device's, or nothing lies there in a peer's arena
                raise TransferError(f"what {self.source.address} offers cannot be copied: {error}") from None
            self.bytes += sum(part.length for part, _ in moves)

    def stop(self) -> None:
        """When this returns nothing is written any more."""
        with self.lock:
            self.alive = False


def _pieces(part: Part, target: int) -> list[Move]:
    """A part in pieces that one Read may ask for."""
    ends = range(0, part.length, MAX_READ_BYTES)
    return [Move(Part(part.arena, part.offset + at, min(MAX_READ_BYTES, part.length - at)), target + at) for at in ends]
