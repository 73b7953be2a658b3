"""The engines behind a router: which are alive, how much they have to do, what their caches hold."""

import asyncio
import contextlib
import itertools
import logging
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import msgspec
import zmq
import zmq.asyncio

from ..server.kv_events import KvEventBatch
from .cached_blocks import CachedBlocks

REPLICA, PREFILL, DECODE = "replica", "prefill", "decode"
_DECODING_TOKENS = 256  # of prefill that a sequence which decodes is taken to cost others
_CHECK_TIMEOUT = httpx.Timeout(15.0, connect=5.0)  # longer than a server waits for its engine before it says 503

log = logging.getLogger("tokenspeed.router")


class Peer(msgspec.Struct, frozen=True):
    """Where a server's transfers are. engine_id: another one after each start; port: None where it lends nothing."""

    engine_id: str
    host: str
    port: int | None = None


class About(msgspec.Struct, frozen=True):
    """What a server says of itself (`GET /kv_transfer`). transfer: None where it takes no part in transfers; kv_events:
    where it publishes what its cache holds, None where it does not."""

    transfer: Peer | None = None
    kv_events: str | None = None


@dataclass(slots=True, eq=False)
class Backend:
    """One server. kind: what it was given as; gone: set when it gives no sign of life, until it does again; work:
    tokens of prompts that it prefills now, and as many as its answers stand for."""

    url: str
    kind: str
    alive: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    about: About = field(default_factory=About)
    cached: CachedBlocks = field(default_factory=CachedBlocks)
    work: int = 0
    in_flight: int = 0
    last_used: int = 0
    listener: asyncio.Task | None = None

    @property
    def lends(self) -> bool:
        """Whether prompts can be brought from it."""
        return self.about.transfer is not None and bool(self.about.transfer.port)

    def cost(self, tokens: int, known: int) -> int:
        """Of a prompt of so many tokens, `known` of which are here: what is computed before it is answered."""
        return tokens - known + self.work

    @contextlib.contextmanager
    def doing(self, tokens: int):
        """While it answers: prefills so many tokens until the value that this yields is called, then decodes."""
        self.in_flight += 1
        self.work += tokens
        weight = tokens

        def answered() -> None:
            nonlocal weight
            self.work += _DECODING_TOKENS - weight
            weight = _DECODING_TOKENS

        try:
            yield answered
        finally:
            self.in_flight -= 1
            self.work -= weight


class Backends:
    """Looks after them while `watch` runs."""

    def __init__(self, urls: dict[str, list[str]], client: httpx.AsyncClient, check_seconds: float = 2.0):
        """urls: by kind."""
        self.all = [Backend(url.rstrip("/"), kind) for kind, found in urls.items() for url in found]
        self._client, self._check_seconds = client, check_seconds
        self._turns = itertools.count(1)
        self._zmq = zmq.asyncio.Context()

    def alive(self, *kinds: str) -> list[Backend]:
        return [backend for backend in self.all if backend.alive and backend.kind in kinds]

    def used(self, backend: Backend) -> None:
        """It was chosen: among equals it comes last the next time."""
        backend.last_used = next(self._turns)

    async def watch(self) -> None:
        """For ever, after each was checked once. Each is asked by itself, so that one that hangs delays nobody."""
        try:
            await asyncio.gather(*map(self._watch, self.all))
        finally:
            for backend in self.all:
                self._forget(backend)
            self._zmq.destroy(linger=0)

    async def _watch(self, backend: Backend) -> None:
        while True:
            await asyncio.sleep(self._check_seconds)
            await self.check(backend)

    async def check(self, backend: Backend) -> None:
        """Whether it is there, and when it has just come, or has started anew, what it is. Asked also when a request
        to it has failed, which may have been that request's or that connection's fault alone."""
        try:
            answer = await self._client.get(f"{backend.url}/health", timeout=_CHECK_TIMEOUT)
            if answer.status_code != 200:
                self._leave_out(backend, f"/health says {answer.status_code}")
                return
            answer = await self._client.get(f"{backend.url}/kv_transfer", timeout=_CHECK_TIMEOUT)
        except httpx.HTTPError as error:
            self._leave_out(backend, str(error) or type(error).__name__)
            backend.gone.set()
            return
        about = _about(answer)
        if not backend.alive or about != backend.about:
            self._greet(backend, about)

    def _leave_out(self, backend: Backend, why: str) -> None:
        """Until it answers again."""
        if backend.alive:
            log.warning("%s is out: %s", backend.url, why)
        backend.alive = False
        self._forget(backend)

    def _greet(self, backend: Backend, about: About) -> None:
        self._forget(backend)
        backend.about = about
        if backend.kind == PREFILL and not backend.lends:
            log.warning("%s was given to prefill, but lends nothing: start it with --role prefill", backend.url)
        if about.kv_events:
            self._subscribe(backend, _reachable(about.kv_events, backend.url))
        backend.alive = True
        backend.gone.clear()
        events = "" if backend.listener else ", without cache events"
        log.info("%s is in, as %s%s", backend.url, backend.kind, events)

    def _forget(self, backend: Backend) -> None:
        if backend.listener is not None:
            backend.listener.cancel()
            backend.listener = None
        backend.cached.clear()

    def _subscribe(self, backend: Backend, endpoint: str) -> None:
        socket = self._zmq.socket(zmq.SUB)
        socket.linger, socket.maxmsgsize = 0, 1 << 28
        socket.subscribe(b"")
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            log.warning("%s: nothing can be heard of its cache at %s: %s", backend.url, endpoint, error.strerror)
            socket.close()
            return
        backend.listener = asyncio.create_task(self._listen(backend, endpoint, socket))

    async def _listen(self, backend: Backend, endpoint: str, socket: zmq.asyncio.Socket) -> None:
        decoder, expected = msgspec.msgpack.Decoder(KvEventBatch), None
        with socket:
            while True:
                frames = await socket.recv_multipart()
                try:
                    _, number, batch = frames
                    events = decoder.decode(batch).events
                except (ValueError, msgspec.DecodeError) as error:
                    log.warning("%s: %s said something that is no cache event: %s", backend.url, endpoint, error)
                    continue
                sequence = int.from_bytes(number, "big")
                if expected is not None and sequence != expected:
                    backend.cached.clear()  # something was missed: what it said before may be gone
                expected = sequence + 1
                for event in events:
                    backend.cached.apply(event)


def _about(answer: httpx.Response) -> About:
    """Nothing of a server of another make, which has no such path or says something else there."""
    try:
        return msgspec.json.decode(answer.content, type=About) if answer.status_code == 200 else About()
    except (msgspec.DecodeError, RecursionError):
        return About()


def _reachable(endpoint: str, url: str) -> str:
    """An endpoint that listens everywhere on its machine, as this one reaches it."""
    host = urlsplit(url).hostname or "127.0.0.1"
    for everywhere in ("//*:", "//0.0.0.0:", "//[::]:"):
        endpoint = endpoint.replace(everywhere, f"//[{host}]:" if ":" in host else f"//{host}:")
    return endpoint
