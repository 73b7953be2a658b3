"""The five calls, and the thread that speaks with peers: ZeroMQ sockets, MessagePack, no code."""

import contextlib
import logging
import socket as sockets
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import torch
import zmq

from ..errors import ConfigError, TransferError
from . import cuda_ipc, nixl
from .arenas import Arenas
from .messages import (
    MAX_MESSAGE_BYTES,
    MAX_READ_BYTES,
    FromDecoder,
    Identity,
    OtherVersion,
    Refused,
    decode_from_decoder,
    decode_from_prefiller,
    encode,
)
from .messages import VERSION as _VERSION
from .pull import Source, Targets
from .pulls import Pulls
from .rooms import Ended, Reply, Rooms

_TICK_MS = 50
_READING_TICK_MS = 1
_CLOSE_SECONDS = 5.0
_LINGER_MS = 500  # for the last messages to go out
_MESSAGES = 64  # that are taken from a socket before something else has its turn
_MAX_IDLE_PEERS = 64  # connections from which those go that nothing is pulled from
_MAX_PEERS = 256  # connections at a time

log = logging.getLogger("tokenspeed.transfer")


def address_of(host: str, port: int) -> str:
    """As ZeroMQ takes it."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Endpoint:
    """One engine among its peers. engine: its name, new with each start. The engine's thread makes every call."""

    def __init__(self, host: str, port: int | None, lease: float, transport: str = "auto"):
        """host: of this machine, as peers reach it; port: 0 takes a free one, and None is for who only pulls; lease:
        seconds; transport: one of TRANSPORTS."""
        self.host, self.port, self.lease, self.transport = host, port, lease, transport
        self.engine = uuid.uuid4().hex
        self._awake, self._wake = sockets.socketpair()
        self._wake.setblocking(False)
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._dealers: dict[str, zmq.Socket] = {}

    def register(self, arenas: Arenas, identity: Identity, ports: tuple[int, ...] = ()) -> None:
        """Let peers of the same identity read the arenas, as far as rooms offer them, and listen. ports: of this
        engine's other ranks. Raises ConfigError where the address cannot be had, and where NIXL is asked for and does
        not work."""
        cards = cuda_ipc.readable(arenas) if self.transport == "auto" else ()
        self._device = arenas.device
        self._nixl = None
        if self.transport != "sockets":
            self._nixl = nixl.start(arenas, self.engine, self.transport == "nixl")
        self.rooms = Rooms(
            arenas,
            identity,
            self.engine,
            self.lease,
            time.monotonic,
            lambda readable: cuda_ipc.export(arenas, readable) if cards else (),
            self._nixl and self._nixl.own,
            ports,
        )
        self.pulls = Pulls(
            arenas,
            identity,
            self.engine,
            self.lease,
            time.monotonic,
            self._send,
            cards,
            lambda handles: cuda_ipc.map_arenas(arenas, handles),
            self._nixl,
        )
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger, self._router.ipv6 = 0, True
        self._router.router_handover = True  # a decoder that connects anew is still the same
        self._router.maxmsgsize = MAX_MESSAGE_BYTES
        if self.port is not None:
            self._bind()
        self._thread = threading.Thread(target=self._run, name="tokenspeed-transfer", daemon=True)
        self._thread.start()

    def _bind(self) -> None:
        try:
            self._router.bind(address_of(self.host, self.port) if self.port else address_of(self.host, 0)[:-1] + "*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen on {self.host} port {self.port}: {error.strerror}.") from None
        self.port = int(self._router.last_endpoint.decode().rpartition(":")[2])

    def offer(self, room: str, digest: bytes, pages: Sequence[int], slot: int | None, epoch: int) -> None:
        """As `Rooms.offer`."""
        self.rooms.offer(room, digest, pages, slot, epoch)
        self._call()

    def pull(self, source: Source, reserve: Callable[[], Targets | None]) -> None:
        """As `Pulls.pull`."""
        self.pulls.pull(source, reserve)
        self._call()

    def poll(self) -> list[Ended]:
        """Rooms and pulls that have ended since the last call, but for those that were cancelled. Nothing of a room
        that is here is read any more, and nothing is written for a pull."""
        if self.pulls.reserve():
            self._call()
        return self.rooms.take_ended() + self.pulls.take_ended()

    def cancel(self, room: str, reason: str = "the engine has cancelled it") -> None:
        """Give up a room or a pull; harmless for what has ended. What it held can be used for something else."""
        self.rooms.close(room, reason)
        self.pulls.cancel(room)
        self._call()

    def close(self) -> None:
        """Ends the thread. Peers are told, and hear no more."""
        self._stopped.set()
        self._call()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
        self._awake.close()
        self._wake.close()

    def _call(self) -> None:
        """The thread shall look what there is to do."""
        with contextlib.suppress(OSError):  # it has been called often enough, or it has ended
            self._wake.send(b"\0")

    # ---- the thread

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for NIXL
        poller = self._poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._awake.fileno(), zmq.POLLIN)
        try:
            while not self._stopped.is_set():
                ready = dict(poller.poll(_READING_TICK_MS if self.pulls.reading else _TICK_MS))
                if self._awake.fileno() in ready:
                    self._awake.recv(4096)
                if self._router in ready:
                    self._take_asked()
                for address, dealer in list(self._dealers.items()):
                    if dealer in ready:
                        self._take_answered(address, dealer)
                for reply in self.rooms.tick():
                    self._reply(reply)
                self.pulls.tick()
        except Exception:  # whatever it is, the engine goes on without transfers
            log.exception("this engine's transfers end")
        finally:
            error = TransferError("this engine's transfers have ended")
            self.pulls.forget(error)
            self.rooms.forget(error)
            try:
                self._part()
            finally:
                self._context.destroy(linger=_LINGER_MS)
                if self._nixl is not None:
                    self._nixl.close()

    def _part(self) -> None:
        for reply in self.rooms.parting():
            self._reply(reply)
        self.pulls.part()

    def _take_asked(self) -> None:
        for _ in range(_MESSAGES):
            try:
                peer, *frames = self._router.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = decode_from_decoder(frames[0] if len(frames) == 1 else b"")
            except OtherVersion:
                theirs = str(frames[0][0]) if frames and frames[0] else "none"
                self._reply(Reply(peer, Refused("version", str(_VERSION), theirs)))
                continue
            except TransferError:
                continue
            try:
                replies = self.rooms.handle(peer, message)
            except Exception:  # a message may cost its sender the room, but nobody else anything
                log.exception("a decoder's message was not understood: %.200r", message)
                continue
            for reply in replies:
                self._reply(reply)

    def _reply(self, reply: Reply) -> None:
        frames = [reply.peer, encode(reply.message)] + ([] if reply.data is None else [reply.data])
        with contextlib.suppress(zmq.ZMQError):  # it does not read, or is gone: its lease ends
            self._router.send_multipart(frames, zmq.DONTWAIT, copy=reply.data is None)

    def _send(self, address: str, message: FromDecoder) -> None:
        dealer = self._dealers.get(address) or self._connect(address)
        if dealer is not None:
            with contextlib.suppress(zmq.ZMQError):
                dealer.send(encode(message), zmq.DONTWAIT)

    def _connect(self, address: str) -> zmq.Socket | None:
        """None where there are too many connections: nothing is heard from there, and the lease ends."""
        if len(self._dealers) >= _MAX_IDLE_PEERS:
            self._drop_idle()
        if len(self._dealers) >= _MAX_PEERS:
            return None
        dealer = self._dealers[address] = self._context.socket(zmq.DEALER)
        dealer.linger, dealer.ipv6 = 0, True
        dealer.identity = uuid.uuid4().bytes
        dealer.maxmsgsize = MAX_READ_BYTES + MAX_MESSAGE_BYTES
        with contextlib.suppress(zmq.ZMQError):  # no address: the same
            dealer.connect(address)
        self._poller.register(dealer, zmq.POLLIN)
        return dealer

    def _drop_idle(self) -> None:
        """Also those to peers that were lost."""
        used = self.pulls.drop_idle()
        for address in [address for address in self._dealers if address not in used]:
            dealer = self._dealers.pop(address)
            self._poller.unregister(dealer)
            dealer.close()

    def _take_answered(self, address: str, dealer: zmq.Socket) -> None:
        for _ in range(_MESSAGES):
            try:
                head, *data = dealer.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = decode_from_prefiller(head)
            except OtherVersion:
                message = Refused("version", str(head[0]) if head else "none", str(_VERSION))
            except TransferError:
                continue
            try:
                self.pulls.handle(address, message, data[0] if data else None)
            except Exception as error:
                log.exception("a prefiller's message could not be followed: %.200r", message)
                self.pulls.lose(address, TransferError(f"{address}: {type(error).__name__}: {error}"))
