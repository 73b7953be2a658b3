"""Between an engine and its transfers: what is prefilled here is offered, and what is prefilled elsewhere is brought
before its request is admitted. One thread calls it, between steps."""

import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..config import PAGE_TOKENS
from ..core import Engine, Sink
from ..errors import CapacityError, RequestError, TransferError
from ..request import PrefixReuse, Request, RequestMetrics, SamplingParams, Update
from ..schedule.cache import NoRoom
from ..schedule.scheduler import Continuation, Leaving, State
from ..text.grammar import GrammarSpec, Matcher
from .endpoint import address_of
from .identity import digest
from .params import RemoteDecode, RemotePrefill, Transfer
from .pull import Source, Targets
from .rooms import Ended

log = logging.getLogger("tokenspeed.transfer")


class Calls(Protocol):
    """What it needs of an `Endpoint`."""

    lease: float

    def offer(self, room: str, digest: bytes, pages: Sequence[int], slot: int | None, epoch: int) -> None: ...
    def pull(self, source: Source, reserve: Callable[[], Targets | None]) -> None: ...
    def poll(self) -> list[Ended]: ...
    def cancel(self, room: str, reason: str = ...) -> None: ...


@dataclass(slots=True, eq=False)
class _Offered:
    """A room. sequence: None once its prefill is over; loan: what is lent then; told: epoch and pages of the last
    offer."""

    room: str
    digest: bytes
    name_space: str
    prefix: array
    sequence: Continuation | None = None
    loan: int | None = None
    told: tuple[int, int] = (0, 0)


@dataclass(slots=True, eq=False)
class _Arriving:
    """A pull. reception: the cache's id for what was set aside, None before; refused: since when there was no room."""

    sequence: Continuation
    prefix: array
    reception: int | None = None
    refused: float | None = None
    failed: TransferError | None = None


class Exchange:
    """offered, pulled, failed: how many prompts were lent completely, brought, and not brought."""

    def __init__(self, engine: Engine, calls: Calls, clock: Callable[[], float] = time.monotonic):
        self._engine, self._cache, self._calls, self._clock = engine, engine.cache, calls, clock
        self._ids = itertools.count(-1, -1)  # the scheduler's own are not negative
        self._rooms: dict[str, _Offered] = {}
        self._arriving: dict[str, _Arriving] = {}
        self.offered = self.pulled = self.failed = 0

    def submit(
        self, request: Request, sink: Sink, transfer: Transfer, grammar: GrammarSpec | Matcher | None = None
    ) -> None:
        """As `Engine.submit`, for a request that is prefilled elsewhere or decoded elsewhere. Of the latter nothing is
        generated: it ends when all but the last token of its prompt are prefilled. Raises RequestError also for a room
        that was used before."""
        if transfer.room in self._rooms or transfer.room in self._arriving:
            raise RequestError(f"transfer_id {transfer.room!r} is in use; a name can be used once.")
        if isinstance(transfer, RemoteDecode):
            self._offer(request, sink, transfer.room)
        else:
            self._pull(request, sink, transfer, grammar)

    def step(self) -> None:
        """Tells peers what is new, and takes what has come. Mutates the cache."""
        for offered in [offered for offered in self._rooms.values() if offered.sequence]:
            try:
                self._follow(offered)
            except TransferError as error:  # its prefill goes on: it can be of use to others
                log.warning("room %.40s is not offered any more: %s", offered.room, error)
                self._calls.cancel(offered.room, str(error))
                del self._rooms[offered.room]
        for room, error in self._calls.poll():
            if offered := self._rooms.pop(room, None):
                if offered.sequence is not None:
                    self._engine.abort(offered.sequence.request.id)  # nobody wants it any more
                self._give_back(offered)
                self.offered += error is None
            elif arriving := self._arriving.pop(room, None):
                self._arrived(room, arriving, error)
        for room, arriving in list(self._arriving.items()):
            if error := self._given_up(arriving):
                self._calls.cancel(room)
                del self._arriving[room]
                self._arrived(room, arriving, error)

    @property
    def lends(self) -> bool:
        """Whether a room is open that a decoder may be reading."""
        return bool(self._rooms)

    @property
    def lease(self) -> float:
        """Seconds of silence after which a room is given up."""
        return self._calls.lease

    def close(self) -> None:
        """Everything is given back; requests that waited for something compute it."""
        for room in list(self._rooms):
            self._calls.cancel(room, "the engine ends")
            self._give_back(self._rooms.pop(room))
        for room, arriving in list(self._arriving.items()):
            self._calls.cancel(room)
            del self._arriving[room]
            self._arrived(room, arriving, TransferError("the engine's transfers end"))

    def stats(self) -> dict[str, float]:
        """Counters, and gauges of now."""
        return {
            "transfers_offered": self.offered,
            "transfers_pulled": self.pulled,
            "transfers_failed": self.failed,
            "transfer_rooms": len(self._rooms),
            "transfer_pulls": len(self._arriving),
        }

    # ---- prefilled here

    def _offer(self, request: Request, sink: Sink, room: str) -> None:
        engine = self._engine
        if not self._cache.config.enabled:
            raise RequestError("do_remote_decode needs the prefix cache, which is off here.")
        request.check(engine.vocabulary, engine.limits.max_tokens)
        prefix = array("i", request.prompt[:-1])
        if not prefix:  # nothing to lend
            sink(_ended(request, 0))
            return
        offered = _Offered(room, digest(request.name_space, prefix), request.name_space, prefix)
        self._calls.offer(room, offered.digest, (), None, 0)
        own = replace(
            request,
            prompt=request.prompt[:-1],
            params=SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
            boundaries=tuple(count for count in request.boundaries if count <= len(prefix)),
            snapshot_token_id=None,
            stops_after=None,
        )
        try:
            if self._lend(offered):
                sink(_ended(request, len(prefix)))
            else:
                (offered.sequence,) = engine.submit(own, lambda update: sink(_without_output(update)))
        except Exception:
            self._calls.cancel(room, "the request was refused")
            self._give_back(offered)
            raise
        self._rooms[room] = offered

    def _follow(self, offered: _Offered) -> None:
        """Offers the pages that have become whole, and with the end of the prefill all of it. Raises TransferError
        where that cannot be."""
        sequence = offered.sequence
        if sequence.state is State.ENDED:
            offered.sequence, offered.told = None, (sequence.preemptions, 0)
            if sequence.leaving is not Leaving.FINISHED or not self._lend(offered):
                finished = sequence.leaving is Leaving.FINISHED
                self._calls.cancel(offered.room, "its state was not kept" if finished else "the prefill was aborted")
                del self._rooms[offered.room]
            return
        if sequence.state is State.RETIRING:
            return  # it keeps what was told of until then
        # While it waits again others may take its pages, and what comes back from host memory is not there yet.
        waiting = sequence.state in (State.WAITING, State.ARRIVING)
        pages = 0 if waiting else sequence.consumed // PAGE_TOKENS
        if (sequence.preemptions, pages) == offered.told:
            return
        offered.told, found = (sequence.preemptions, pages), ()
        if pages:
            # Whole pages of a sequence that runs stay where they are: they need not be lent.
            id = next(self._ids)
            loan = self._cache.lend(id, offered.name_space, offered.prefix[: pages * PAGE_TOKENS])
            found = loan.pages[: loan.kv_tokens // PAGE_TOKENS].tolist()
            self._cache.release(id)
            if len(found) < pages:
                raise TransferError("the cache was cleared")  # and what it finds later is not this prefill's
        self._calls.offer(offered.room, offered.digest, found, None, sequence.preemptions)

    def _lend(self, offered: _Offered) -> bool:
        """All of it, where it is there. Raises TransferError where it cannot be offered; nothing is lent then."""
        id = next(self._ids)
        loan = self._cache.lend(id, offered.name_space, offered.prefix)
        if loan.state_tokens < len(offered.prefix):
            self._cache.release(id)
            return False
        # Pages that were told of before are the same pages: they stayed while it ran, and it has ended just now.
        try:
            self._calls.offer(offered.room, offered.digest, loan.pages.tolist(), loan.slot, offered.told[0])
        except TransferError:
            self._cache.release(id)
            raise
        offered.loan = id
        return True

    def _give_back(self, offered: _Offered) -> None:
        if offered.loan is not None:
            self._cache.release(offered.loan)

    # ---- prefilled elsewhere

    def _pull(self, request: Request, sink: Sink, transfer: RemotePrefill, grammar) -> None:
        prefix = array("i", request.prompt[:-1])
        source = Source(
            address_of(transfer.host, transfer.port), transfer.room, digest(request.name_space, prefix), transfer.engine
        )
        sequence = self._engine.submit(request, sink, grammar)[0]
        arriving = _Arriving(sequence, prefix)
        try:
            self._calls.pull(source, lambda: self._reserve(arriving))
        except TransferError as error:
            self._count(transfer.room, error)
            return
        scored = request.params.prompt_logprobs is not None
        match = self._cache.probe(request.name_space, sequence.tokens, prompt_logprobs=scored)
        if scored or not self._cache.config.enabled or match.state_tokens >= len(prefix):
            self._calls.cancel(transfer.room)  # nothing is lacking, or it must be computed here all the same
            return
        sequence.held = True
        self._arriving[transfer.room] = arriving

    def _reserve(self, arriving: _Arriving) -> Targets | None:
        id = next(self._ids)
        try:
            found = self._cache.receive(id, arriving.sequence.request.name_space, arriving.prefix)
        except (CapacityError, RequestError) as error:
            arriving.failed = TransferError(str(error))
            return None
        if isinstance(found, NoRoom):
            arriving.refused = arriving.refused or self._clock()
            return None
        arriving.reception = id
        pages, first = found.pages.tolist(), found.kv_tokens // PAGE_TOKENS
        return Targets({number: pages[number] for number in range(first, len(pages))}, found.slot)

    def _given_up(self, arriving: _Arriving) -> TransferError | None:
        if arriving.sequence.state is State.ENDED:
            return TransferError("the request was aborted")
        if arriving.failed:
            return arriving.failed
        waited = arriving.reception is None and arriving.refused and self._clock() - arriving.refused
        if waited and waited > self._calls.lease:  # the one who lends should not wait for ever
            return TransferError(f"there was no room for it for {self._calls.lease:g} s")
        return None

    def _arrived(self, room: str, arriving: _Arriving, error: TransferError | None) -> None:
        """Nothing is written for it any more: its request is admitted with what has come, or computes it."""
        sequence = arriving.sequence
        sequence.held = False
        if error is None and sequence.state is not State.ENDED:
            self._cache.received(arriving.reception)
            sequence.pin = arriving.reception
            self.pulled += 1
            return
        if arriving.reception is not None:
            self._cache.release(arriving.reception)
        if sequence.state is not State.ENDED:
            self._count(room, error)

    def _count(self, room: str, error: TransferError) -> None:
        self.failed += 1
        log.warning("a prompt is prefilled here, not brought as room %.40s: %s", room, error)


def _ended(request: Request, cached: int) -> Update:
    """The news of a prefill for which nothing had to be computed."""
    reuse = PrefixReuse(cached, cached, cached, 0, "NEW_TOKENS")
    return Update(request.id, 0, finish_reason="length", reuse=reuse, metrics=RequestMetrics(0.0, 0.0, 0.0, 0, 0))


def _without_output(update: Update) -> Update:
    """The token that the engine gives all the same is not wanted."""
    update.ids, update.text, update.scores = [], "", []
    return update
