"""What a request must bring before anything of it is read: a key, or that it comes from this machine's own pages."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .http import error_form
from .service import caller

MAX_BYTES = 32 << 20  # of one body, unless told otherwise
_MAX_TOTAL_BYTES = 1 << 30  # of all bodies that are held at a time
_SECONDS, _PAUSE = 300.0, 20.0  # of a body: in all, and until the next piece
_DRAIN_SECONDS, _DRAIN_PAUSE = 5.0, 2.0  # of a refused body: in all, and until the next piece
OPEN_PATHS = frozenset({"/", "/health", "/kv_transfer", "/metrics", "/openapi.json"})


class Gate:
    """Checks a request by its headers, and then passes its body on within limits.

    With keys: the caller's, compared in constant time, on every path that is not open. Without: that Host names this
    machine, so that a page elsewhere whose name was made to point here is refused, and that Origin, which browsers
    send with what pages make them send, is this server's own or one that may use it.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_bytes: int = MAX_BYTES,
        names: Collection[str] = (),
        origins: Collection[str] = (),
    ):
        """max_bytes: of one body; names: of this machine, beside localhost and its loopback addresses; origins: of
        pages that may ask, beside this server's own, "*" for all."""
        self._app, self.max_bytes = app, max_bytes
        self._keys = [key.encode() for key in keys]
        self._names = {"localhost", *(name.lower() for name in names)}
        self._origins = frozenset(origin.lower() for origin in origins)
        self.held = 0  # bytes of bodies that are being worked on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            response = JSONResponse(error_form(*refusal), refusal[0], {"connection": "close"})
            if "expect" not in headers:
                await _drain(receive)
            await response(scope, receive, send)
            return
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self.held -= body.bytes

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str, str] | None:
        """Status, type and message; None for a request that may pass. Sets `caller`."""
        caller.set(None)
        if self._keys:
            if scope["path"] not in OPEN_PATHS and not self._known(headers):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                return 401, "authentication_error", message
        elif refusal := self._foreign(headers):
            return 403, "permission_error", refusal
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self.max_bytes:
            return 413, "invalid_request_error", _too_large(self.max_bytes)
        if self.held + int(announced) > _MAX_TOTAL_BYTES:
            return 429, "rate_limit_error", f"bodies of {self.held} bytes are being worked on; try again later."
        return None

    def _known(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or ""
        scheme, _, token = (headers.get("authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if any(matches):
            caller.set(given)
        return any(matches)

    def _foreign(self, headers: Headers) -> str | None:
        """Why a server without keys may not answer."""
        host = headers.get("host", "")
        if not self._own(f"//{host}"):
            return f"Host is {host!r:.100}, no name of this machine; use localhost, or start the server with --api-key."
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return None
        if urlsplit(f"//{host}").netloc.lower() != origin.lower().partition("://")[2]:
            return (
                f"Origin is {origin!r:.100}: pages of other servers may use this one only with an --allow-origin that "
                "names theirs, or with an --api-key."
            )
        return None

    def _own(self, address: str) -> bool:
        try:
            name = urlsplit(address).hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


class _Body:
    """One request's body as it comes."""

    def __init__(self, gate: Gate, receive: Receive):
        self._gate, self._receive = gate, receive
        self._more = True
        self._end = time.monotonic() + _SECONDS
        self.bytes = 0

    async def receive(self):
        if not self._more:
            return await self._receive()
        left = min(_PAUSE, self._end - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly", {"connection": "close"}) from None
        got = len(message.get("body", b""))
        self.bytes += got
        self._gate.held += got
        self._more = message.get("more_body", False)
        if self.bytes > self._gate.max_bytes:
            if self._more:
                await _drain(self._receive)
            raise HTTPException(413, _too_large(self._gate.max_bytes), {"connection": "close"})
        if self._gate.held > _MAX_TOTAL_BYTES:
            raise HTTPException(429, "too many bodies are being worked on; try again later.", {"retry-after": "1"})
        return message


async def _drain(receive: Receive) -> None:
    """Reads and drops what comes of a refused body without a pause: a client that sends all of it before it reads would
    find its connection reset in place of the answer."""
    end, more = time.monotonic() + _DRAIN_SECONDS, True
    while more and time.monotonic() < end:
        try:
            message = await asyncio.wait_for(receive(), _DRAIN_PAUSE)
        except TimeoutError:
            return
        more = message.get("more_body", False)


def _too_large(max_bytes: int) -> str:
    return f"the body is larger than {max_bytes} bytes, the most this server takes"
