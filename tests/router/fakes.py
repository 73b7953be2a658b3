"""Servers that only say who they are, and a router in front of them, all in this process."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import msgspec
import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tokenspeed.engine.router.app import Router
from tokenspeed.engine.router.backends import Backends
from tokenspeed.engine.router.main import backend_client, configuration
from tokenspeed.engine.router.policy import Policy
from tokenspeed.engine.server.kv_events import KvEventBatch

PAGE = 4


class Served:
    """An application on a port of its own, in a thread of its own."""

    def __init__(self, app, port: int = 0):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = configuration(app, 0)
        config.timeout_keep_alive = 600  # what is not given back stays open
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=(self._server.serve([self.socket]),), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    @property
    def connections(self) -> int:
        """That are open."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self.socket.close()


class Fake:
    """A server. asked: the bodies it got; status: of what it says; gate: until it is set an answer's second half does
    not come; events: tells of blocks; silent: says nothing any more, not even that it is there; about: what it says of
    itself."""

    def __init__(self, name: str, port: int = 0, peer: dict | None = None):
        self.name, self.status = name, 200
        self.asked: list[dict] = []
        self.left = 0  # requests whose clients went away
        self.breaks = self.silent = False
        self.gate = threading.Event()
        self.gate.set()
        self._publisher = zmq.Context.instance().socket(zmq.PUB)
        self._publisher.linger = 0
        self.events = f"tcp://127.0.0.1:{self._publisher.bind_to_random_port('tcp://127.0.0.1')}"
        self.about = {"role": "both", "transfer": peer, "kv_events": self.events}
        self.tokens: list | dict | None = None  # what it says a prompt has, instead of its characters
        self._sequence = 0
        routes = [
            Route("/health", self._health),
            Route("/kv_transfer", self._about),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/models", lambda request: JSONResponse({"data": [name]})),
            Route("/{path:path}", self._generate, methods=["POST"]),
        ]
        self._app = Starlette(routes=routes)
        self.served = Served(self._app, port)
        self.url = self.served.url

    async def _health(self, request: Request):
        while self.silent and not await request.is_disconnected():
            await asyncio.sleep(0.01)
        return JSONResponse({"status": "ok"})

    async def _about(self, request: Request):
        return JSONResponse(self.about)

    async def _tokenize(self, request: Request):
        body = await request.json()
        if self.tokens is not None:
            return JSONResponse(self.tokens)
        text = body.get("prompt") or "".join(m["content"] for m in body["messages"])
        return JSONResponse({"tokens": [ord(c) for c in text]})

    async def _generate(self, request: Request):
        body = await request.json()
        headers = request.headers
        about = {
            "path": request.scope["raw_path"].decode(),
            "key": headers.get("authorization"),
            "title": headers.get("x-title"),
        }
        self.asked.append(body | about)
        if self.status != 200:
            return JSONResponse({"error": self.name}, self.status, {"x-who": self.name})
        if not body.get("stream"):
            while not self.gate.is_set() and not await request.is_disconnected():
                await asyncio.sleep(0.01)
            self.left += not self.gate.is_set()
            headers = {"x-who": self.name, "x-title": self.asked[-1]["title"] or ""}
            return JSONResponse({"who": self.name, "id": f"resp_{self.name}"}, headers=headers)

        async def pieces():
            try:
                yield f'data: {{"id": "resp_{self.name}"}}\n\n'.encode()
                while not self.gate.is_set():
                    await asyncio.sleep(0.01)
                if self.breaks:
                    raise RuntimeError("breaks")
                yield b"data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(pieces(), media_type="text/event-stream")

    def store(self, tokens: list[int], skip: int = 0) -> None:
        """Its cache holds these, as whole blocks. skip: sequence numbers that get lost."""
        whole = len(tokens) // PAGE * PAGE
        blocks = [hash((self.name, *tokens[: at + PAGE])) & (2**63 - 1) for at in range(0, whole, PAGE)]
        event = ["BlockStored", blocks, None, tokens[:whole], PAGE, None, None]
        self._sequence += skip
        batch = msgspec.msgpack.encode([time.time(), [event], None])
        assert msgspec.msgpack.decode(batch, type=KvEventBatch)
        self._publisher.send_multipart((b"", self._sequence.to_bytes(8, "big"), batch))
        self._sequence += 1

    def stop(self) -> None:
        self.served.stop()
        self._publisher.close()


@contextlib.contextmanager
def routed(keys: tuple[str, ...] = (), least_prefill: int = 1024, **fakes: list[Fake]):
    """A router's client before servers, by kind."""
    client = backend_client()
    backends = Backends({kind: [fake.url for fake in found] for kind, found in fakes.items()}, client, 0.05)
    router = Router(backends, Policy(backends, least_prefill), client)
    served = Served(router.app(keys, ()))
    try:
        with httpx.Client(base_url=served.url, timeout=20) as caller:
            caller.backends = {backend.url: backend for backend in backends.all}
            yield caller
    finally:
        served.stop()
        for found in fakes.values():
            for fake in found:
                fake.gate.set()
                with contextlib.suppress(OSError):
                    fake.stop()


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.01)
