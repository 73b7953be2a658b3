"""uvicorn's HTTP protocol within limits: what a connection may send before its request begins, and how long it may
leave lying what it was sent."""

import asyncio
import json
import resource
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .http import error_form

_SPARE_DESCRIPTORS = 256  # files and sockets beside the connections


@dataclass(eq=False)
class Connections:
    """Makes the protocols of one server within these limits, and knows which of them have sent no whole request yet.

    head_bytes, headers: of a request's line and headers, which must have come in head_seconds. max_connections: at a
    time; max_idle of them may have sent no whole head yet, beyond it the one that has taken longest goes.
    unread_seconds: in which a client must read something of what waits for it. waiting: who has sent no whole head, the
    longest first.
    """

    head_bytes: int = 65536
    headers: int = 128
    head_seconds: float = 10.0
    max_connections: int = 4096
    max_idle: int = 1024
    unread_seconds: float = 30.0
    waiting: "dict[BoundedProtocol, None]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes no more connections than the process has descriptors for."""
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_connections = max(min(self.max_connections, descriptors - _SPARE_DESCRIPTORS), 16)

    def __call__(self, **settings: Any) -> "BoundedProtocol":
        """For `uvicorn.Config(http=...)`."""
        return BoundedProtocol(self, **settings)


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, shared: Connections, **settings: Any):
        super().__init__(**settings)
        self._shared = shared
        self._head = 0  # bytes of the head that is being read
        self._refused = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._shared.max_connections:
            limit = self._shared.max_connections
            self._refuse("503 Service Unavailable", f"{limit} connections are open, the most there may be")
            return
        self._expect_head()
        if len(self._shared.waiting) > self._shared.max_idle:
            next(iter(self._shared.waiting))._refuse("408 Request Timeout", "too many connections wait for a request")

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_come()
        self._stop_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self in self._shared.waiting:
            self._head += len(data)
        super().data_received(data)
        if self._head > self._shared.head_bytes and self in self._shared.waiting:  # nothing of it came to its end
            self._too_large()

    def on_message_begin(self) -> None:
        if self not in self._shared.waiting:
            self._expect_head()
        super().on_message_begin()
        self._counted = 0

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name, value)
        if len(self.headers) >= self._shared.headers:
            self._too_large()
        if self._refused:
            raise ValueError("too large")  # which the parser passes on as an error of the request
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            raise ValueError("too large")
        self._head_has_come()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self._shared.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # a client that asks for no more and does not read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _count(self, *parts: bytes) -> None:
        self._counted += sum(map(len, parts))
        if self._counted > self._shared.head_bytes:
            self._too_large()

    def _too_large(self) -> None:
        self._refuse(
            "431 Request Header Fields Too Large",
            f"a request's line and headers may have {self._shared.head_bytes} bytes and {self._shared.headers} fields",
        )

    def _expect_head(self) -> None:
        self._head = 0
        self._shared.waiting[self] = None
        self._head_timer = self.loop.call_later(
            self._shared.head_seconds,
            self._refuse,
            "408 Request Timeout",
            f"the request's headers did not come within {self._shared.head_seconds:g} s",
        )

    def _head_has_come(self) -> None:
        self._shared.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _refuse(self, status: str, message: str) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._head_has_come()
        if self.cycle is not None and not self.cycle.response_complete:  # in whose middle nothing can be said
            self.transport.abort()
            return
        text = json.dumps(error_form(int(status[:3]), "invalid_request_error", message))
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n{text}".encode())
        self.transport.close()
        self.loop.call_later(1, self.transport.abort)  # also where it is never read
