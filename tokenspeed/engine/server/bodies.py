"""Request bodies as JSON, within limits that keep the event loop free: decoding holds the interpreter's lock."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

MOST_VALUES = 3 << 19  # of arrays, objects and their members: 0.1 s; a text's commas and brackets count as well

_decode = msgspec.json.Decoder().decode


def decode_json(body: bytes) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError for what is none, HTTPException for too many values."""
    values = sum(map(body.count, (b",", b"[", b"{")))
    if values > MOST_VALUES:
        raise HTTPException(413, f"the body has about {values} JSON values; at most {MOST_VALUES} are taken")
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise json.JSONDecodeError(f"{error}"[:200], "", 0) from None


class JsonRoute(APIRoute):
    """A route whose body is decoded so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handler


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        self._body = b""  # a stream would keep it to its end
        return decode_json(body)
