"""Server-sent events, and the response that sends them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
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
        try:
            with contextlib.suppress(Disconnected):
                await while_connected(receive, self._send(send), self._seconds)
        finally:
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


class Disconnected(HTTPException):
    """The client went away, or did not take in time what it was sent."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection")


async def while_connected(receive: Receive, work: Awaitable[Any], seconds: float | None = None) -> Any:
    """The result of `work`, which is cancelled where the client goes away first, or so many seconds pass: then this
    raises Disconnected."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, watch, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
