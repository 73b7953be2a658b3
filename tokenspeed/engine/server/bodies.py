"""Request bodies as JSON, within limits that keep the event loop free: decoding holds the interpreter's lock."""

import asyncio
import gc
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from .service import caller

# Of a value, by the character that announces it, in the time that a number takes: 0.2 s in all. Text that has these
# characters counts as well; a million tokens of program text have a third of it.
_WEIGHTS = {b",": 1, b":": 2, b"[": 3, b"{": 3}
MAX_VALUES = 3 << 19

_SHORT = 1 << 16  # bytes that take no time

_decode = msgspec.json.Decoder().decode


def decode_json(body: bytes) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError for what is none, HTTPException for too many values."""
    values = sum(weight * body.count(character) for character, weight in _WEIGHTS.items())
    if values > MAX_VALUES:
        raise HTTPException(413, f"the body has about {values} JSON values; at most {MAX_VALUES} are taken")
    gc.disable()  # new values are no garbage, and to look through them takes longer than to make them
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise json.JSONDecodeError(f"{error}"[:200].removeprefix("JSON is malformed: "), "", 0) from None
    finally:
        gc.enable()


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
        if len(body) <= _SHORT:
            return decode_json(body)
        async with self.app.state.decoding.one(caller.get()):  # one of a key at a time, and others' work between two
            await asyncio.sleep(0)
            return decode_json(body)
