"""Server-sent events, and the response that sends them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def json_response(data: Any) -> Response:
    """A value as JSON. msgspec writes a million ids in the time in which the standard library writes a few thousand."""
    return Response(_encode(data), media_type="application/json")


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event; name: its type, where the API gives it one."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + _encode(data) + b"\n\n"


class EventStream(Response):
    """Pieces as they come, until they end or the client goes away: then the iterator is closed at once.

    first: the first piece, which is there already; failed: the last event where the iterator raises; done: called once,
    however it ends; seconds: after which a client that does not take what it is sent is given up, None for never.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        failed: Callable[[Exception], bytes],
        done: Callable[[], None],
        seconds: float | None,
    ):
        self._seconds = seconds
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._first, self._rest, self._failed, self._done = first, rest, failed, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((sending, watching), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, watching):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(sending, watching, return_exceptions=True)
            await self._rest.aclose()
            self._done()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for piece in self._rest:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:  # the status is out: what went wrong is told as the last event
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
