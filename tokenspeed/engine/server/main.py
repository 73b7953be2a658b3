"""Runs the server: the engine process, uvicorn, and an orderly end."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ..checkpoint import resolve
from ..config import EngineConfig
from ..errors import ConfigError, EngineError
from ..frontend import Frontend
from .app import create_app
from .client import EngineClient
from .messages import Settings
from .service import Service, ServiceConfig

log = logging.getLogger("tokenspeed.server")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """As the options of `serve`; port 0 takes a free one, model None is the shipped one."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    model: str | None = None
    model_name: str | None = None
    most_requests: int = 512
    most_body_bytes: int = 64 << 20
    timeout: float | None = None
    drain_seconds: float = 30
    exact_history: bool = True
    kv_events: str | None = None


def serve(options: ServerOptions, config: EngineConfig) -> int:
    """Serve until a signal or the engine's end; the exit status. Raises ConfigError for what cannot be used."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    directory = resolve(options.model)
    frontend = Frontend.from_directory(directory)
    listener = _listen(options.host, options.port)
    loop = _new_loop()
    try:
        return loop.run_until_complete(
            _serve(options, Settings(str(directory), config, options.kv_events), frontend, listener)
        )
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _serve(options: ServerOptions, settings: Settings, frontend: Frontend, listener: socket.socket) -> int:
    engine = EngineClient(settings)
    try:
        await engine.start()
        name = options.model_name or options.model or frontend.directory.name
        service_config = ServiceConfig(name, options.most_requests, options.timeout, options.exact_history)
        service = Service(frontend, engine, service_config)
        app = AccessLog(create_app(service, options.api_keys, options.most_body_bytes, options.origins))
        server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", proxy_headers=False))
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        log.info("serving %s at http://%s:%d/v1", name, host, port)
        ends = [asyncio.create_task(wait()) for wait in (stop.wait, engine.done.wait)]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        service.draining = True
        if engine.failed is None:
            log.info("finishing %d requests", service.in_flight)
            deadline = time.monotonic() + options.drain_seconds
            while service.in_flight and engine.failed is None and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        elif service.in_flight:
            await asyncio.sleep(0.2)  # for the answers that say so
        failed = engine.failed
        server.should_exit = True
        server.force_exit = service.in_flight > 0
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        if failed is not None:
            raise EngineError(failed)
        return 0
    finally:
        await engine.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: this module decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class AccessLog:
    """One line a request: method, path, status, seconds. Never what was asked."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def watched(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            log.info("%s %s %d %.3f s", scope["method"], scope["path"], status, time.monotonic() - start)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return listener


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop serves
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
