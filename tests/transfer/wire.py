"""Two ends of the transfer protocol on a wire that can lose, repeat and cut, with a clock that moves by hand.

fault: told of each message with its number, says how often it arrives.
"""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import torch
from fake_nixl import Network

from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.transfer.arenas import Arenas
from tokenspeed.engine.transfer.messages import (
    Identity,
    decode_from_decoder,
    decode_from_prefiller,
    encode,
)
from tokenspeed.engine.transfer.nixl import Nixl
from tokenspeed.engine.transfer.pull import Source, Targets
from tokenspeed.engine.transfer.pulls import Pulls
from tokenspeed.engine.transfer.rooms import Rooms

LEASE = 8.0
ADDRESS, PEER = "tcp://prefiller:1", b"decoder"
PAGE_BYTES, SLOT_BYTES = 700, 3_000_000  # a slot takes several Reads, a Read several pages
SLOT = (("state", "float32", (1,)),)
IDENTITY = Identity("checkpoint", "none", (1, 1), "float32", "float32", PAGE_TOKENS, (1,), SLOT, 1, SLOT_BYTES, 0)


def arenas(pages: int, slots: int, seed: int) -> Arenas:
    """Filled at random."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    layout = SimpleNamespace(page_bytes=PAGE_BYTES, slot_bytes=SLOT_BYTES)
    return Arenas(SimpleNamespace(kv=noise(pages, PAGE_BYTES), slots=noise(slots, SLOT_BYTES), layout=layout))


class Wire:
    """Messages, one at a time. sent: what was sent so far."""

    def __init__(
        self,
        identity: Identity = IDENTITY,
        there: Arenas | None = None,
        here: Arenas | None = None,
        lease: float = LEASE,
        network: Network | None = None,
    ):
        """identity: of the decoder; there, here: the prefiller's arenas and the decoder's; network: of NIXL, where they
        have it."""
        self.now, self.sent = 0.0, []
        self.fault: Callable[[int, object], int] = lambda number, message: 1
        self.there, self.here = there or arenas(16, 4, 1), here or arenas(16, 4, 2)
        self.lending = network and Nixl(self.there, "prefill-engine", network.agent)
        self.taking = network and Nixl(self.here, "decode-engine", network.agent)
        own = self.lending and self.lending.own
        self.rooms = Rooms(self.there, IDENTITY, "prefill-engine", lease, lambda: self.now, agent=own)
        self.pulls = Pulls(self.here, identity, "decode-engine", lease, lambda: self.now, self._send, nixl=self.taking)
        self.queue: deque[tuple[object, bytes | None, bool]] = deque()
        self.prefiller_lives = self.decoder_lives = True

    def source(self, room: str, digest: bytes = b"prompt", engine: str | None = None) -> Source:
        return Source(ADDRESS, room, digest, engine)

    def _send(self, address: str, message) -> None:
        assert address == ADDRESS
        self._post(message, None, True)

    def _post(self, message, data: bytes | None, to_prefiller: bool) -> None:
        number = len(self.sent)
        self.sent.append(message)
        for _ in range(self.fault(number, message)):
            self.queue.append((message, data, to_prefiller))

    def run(self, seconds: float = 0.0, step: float = 0.5) -> None:
        """Until nothing is on its way, and then on for so long. The decoder's engine polls all the while."""
        end = self.now + seconds
        while True:
            self._poll()
            polls = 0
            while self.queue or (self.pulls.reading and polls < 100):  # some reads never end
                polls += not self.queue
                self.deliver()
                self._poll()
            if self.now >= end:
                return
            self.now += step

    def _poll(self) -> None:
        if self.decoder_lives:
            self.pulls.reserve()
        self.tick()

    def deliver(self, most: int = 1) -> None:
        """So many messages, as far as there are some."""
        while self.queue and most:
            self._deliver(*self.queue.popleft())
            most -= 1

    def tick(self) -> None:
        """What is due at either end."""
        if self.decoder_lives:
            self.pulls.tick()
        if self.prefiller_lives:
            for reply in self.rooms.tick():
                self._post(reply.message, reply.data, False)

    def _deliver(self, message, data: bytes | None, to_prefiller: bool) -> None:
        if to_prefiller and self.prefiller_lives:
            for reply in self.rooms.handle(PEER, decode_from_decoder(encode(message))):
                self._post(reply.message, reply.data, False)
        elif not to_prefiller and self.decoder_lives:
            self.pulls.handle(ADDRESS, decode_from_prefiller(encode(message)), data)

    def arrived(self, targets: Targets, pages: tuple[int, ...], slot: int) -> bool:
        """Whether the bytes of a unit are where they should be."""
        there, here = self.there, self.here
        same = [
            torch.equal(_row(here, 0, target), _row(there, 0, pages[page])) for page, target in targets.pages.items()
        ]
        return all(same) and torch.equal(_row(here, 1, targets.slot), _row(there, 1, slot))


def _row(arenas: Arenas, arena: int, number: int) -> torch.Tensor:
    size = arenas.row_bytes[arena]
    return arenas.flat[arena][number * size : (number + 1) * size]
