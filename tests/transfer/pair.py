"""Two engines, one of which prefills what the other decodes, on a wire under observation."""

from random import Random

from lab import Lab, Talk
from wire import IDENTITY, Wire

from tokenspeed.engine.errors import TokenSpeedError
from tokenspeed.engine.transfer.arenas import Arenas
from tokenspeed.engine.transfer.exchange import Exchange
from tokenspeed.engine.transfer.params import RemoteDecode, RemotePrefill
from tokenspeed.engine.transfer.rooms import Ended

LEASE = 1.0  # 50 steps


class Calls:
    """The five calls of one side on a simulated wire."""

    lease = LEASE

    def __init__(self, wire: Wire, prefills: bool):
        self._wire, self._prefills = wire, prefills
        self.offer, self.pull = wire.rooms.offer, wire.pulls.pull

    def poll(self) -> list[Ended]:
        if self._prefills:
            return self._wire.rooms.take_ended()
        self._wire.pulls.reserve()
        return self._wire.pulls.take_ended()

    def cancel(self, room: str, reason: str = "cancelled") -> None:
        if self._prefills:
            self._wire.rooms.close(room, reason)
        else:
            self._wire.pulls.cancel(room)


class Pair:
    """prefill, decode: labs. Whatever is submitted to the decoder's lab, or stepped in it, goes through both.

    seed: of how far messages and engines get between each other's steps; network: of NIXL, where both have it."""

    def __init__(
        self, model, *, prefill: dict | None = None, decode: dict | None = None, drafts=0, seed: int = 0, network=None
    ):
        self.prefill = Lab(model, **{"drafts": drafts} | (prefill or {}))
        self.decode = Lab(model, **{"drafts": drafts} | (decode or {}))
        arenas = Arenas(self.prefill.memory), Arenas(self.decode.memory)
        self.wire = wire = Wire(IDENTITY, *arenas, LEASE, network)
        self.random = Random(seed)
        self.lender = Exchange(self.prefill.engine, Calls(wire, True), lambda: wire.now)
        self.taker = Exchange(self.decode.engine, Calls(wire, False), lambda: wire.now)
        self.refused: list[TokenSpeedError] = []  # by the prefiller
        self.updates: dict[str, list] = {}  # of the prefiller's requests
        self._submit, self._step, self._inside = self.decode.engine.submit, self.decode.engine.step, False
        self.decode.engine.submit, self.decode.engine.step = self._submit_both, self.step

    def _submit_both(self, request, sink, grammar=None):
        if self._inside:
            return self._submit(request, sink, grammar)
        self._inside = True
        try:
            self.taker.submit(request, sink, RemotePrefill(request.id, "prefiller", 1), grammar)
            news = self.updates[request.id] = []
            if self.wire.prefiller_lives:
                try:
                    self.lender.submit(request, news.append, RemoteDecode(request.id))
                except TokenSpeedError as error:
                    self.refused.append(error)
        finally:
            self._inside = False

    def step(self) -> None:
        """A bit of everything."""
        wire, random = self.wire, self.random
        wire.now += 0.02
        wire.tick()
        wire.deliver(random.choice([0, 1, 1, 2, 4, 100]))
        if wire.prefiller_lives and random.random() < 0.7:
            if self.prefill.engine.has_work:
                self.prefill.engine.step()
            self.lender.step()
        wire.deliver(random.choice([0, 1, 100]))
        if wire.decoder_lives and random.random() < 0.7:
            if self.decode.engine.has_work:
                self._step()
            self.taker.step()

    def run(self, *talks: Talk, steps: int = 4000) -> None:
        """Until these are done, or everything where none is named."""
        for _ in range(steps):
            if all(talk.finished for talk in talks) if talks else not self.busy:
                return
            self.step()
        raise AssertionError(f"not done after {steps} steps")

    @property
    def busy(self) -> bool:
        wire = self.wire
        prefill = self.prefill.engine.has_work or self.lender.stats()["transfer_rooms"]
        decode = self.decode.engine.has_work or self.taker.stats()["transfer_pulls"]
        return bool((wire.prefiller_lives and prefill) or (wire.decoder_lives and decode))

    def settle(self) -> None:
        """Until everything is done that the leases allow for, and nothing is left on a side that lives."""
        self.run()
        for lab, lives in ((self.prefill, self.wire.prefiller_lives), (self.decode, self.wire.decoder_lives)):
            if lives:
                assert held(lab) == {}, "something is held by nobody"
                assert lab.cache.check() == ""


def held(lab: Lab) -> dict[str, int]:
    """What is not free, and not merely kept for later prompts."""
    stats = lab.stats()
    names = ("pages_held", "slots_working", "slots_promised", "slots_draining", "running", "pinned")
    return {name: stats[name] for name in names if stats[name]}
