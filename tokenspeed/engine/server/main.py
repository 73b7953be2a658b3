"""Runs the server: the engine process, uvicorn, and an orderly end."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ..checkpoint import resolve
from ..config import EngineConfig
from ..errors import ConfigError, EngineError
from ..text.frontend import Frontend
from ..transfer.params import TransferSettings
from .app import create_app
from .client import EngineClient
from .connections import Connections
from .log import Log
from .messages import Settings
from .service import Service, ServiceConfig

_PATH_CHARACTERS = 200  # of one in the log
_LAST_WORDS_SECONDS = 0.3  # in which answers that are cut short say so
_STOP_SECONDS = 5.0  # for the engine to end by itself

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
    max_requests: int = 512
    max_body_bytes: int = 32 << 20
    timeout: float | None = None
    drain_seconds: float = 30
    exact_history: bool = True
    kv_events: str | None = None
    transfer: TransferSettings | None = None


def serve(options: ServerOptions, config: EngineConfig) -> int:
    """Serve until a signal or the engine's end; the exit status. Raises ConfigError for what cannot be used."""
    lines = Log()
    directory = resolve(options.model, config.load_format)
    frontend = Frontend.from_directory(directory)
    listener = listen(options.host, options.port)
    loop = _new_loop()
    try:
        return loop.run_until_complete(
            _serve(options, Settings(str(directory), config, options.kv_events, options.transfer), frontend, listener)
        )
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        lines.flush()


async def _serve(options: ServerOptions, settings: Settings, frontend: Frontend, listener: socket.socket) -> int:
    engine, formats, signals = EngineClient(settings), None, None
    try:
        await engine.start()
        name = options.model_name or options.model or frontend.directory.name
        service_config = ServiceConfig(
            name, options.max_requests, options.timeout, options.exact_history, options.kv_events
        )
        service = Service(frontend, engine, service_config)
        formats = service.formats
        await formats.start()
        app = AccessLog(create_app(service, options.max_body_bytes, options.api_keys, (options.host,), options.origins))
        settings = {"log_config": None, "access_log": False, "lifespan": "off", "proxy_headers": False, "ws": "none"}
        server = Server(uvicorn.Config(app, http=Connections(), **settings))
        signals = _Signals()
        gc.freeze()  # what is there stays: no collection looks through it while somebody waits
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        log.info("serving %s at http://%s:%d/v1", name, host, port)
        ends = [asyncio.create_task(wait()) for wait in (signals.first.wait, engine.done.wait)]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in ends:
            task.cancel()
        service.draining = True
        if engine.failed is None:
            log.info("finishing %d requests", service.in_flight)
            await _until(
                lambda: engine.failed or signals.second.is_set() or not service.in_flight, options.drain_seconds
            )
            engine.give_up("the server ended before the request did")
        failed = engine.failed
        await _until(lambda: not service.in_flight, _LAST_WORDS_SECONDS)
        server.should_exit = True
        await _until(serving.done, _LAST_WORDS_SECONDS)
        server.force_exit = True  # some client does not read what is left for it
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        if failed is not None:
            raise EngineError(failed)
        return 0
    finally:
        if formats is not None:
            await formats.close()
        seconds = _STOP_SECONDS + (options.transfer.lease if options.transfer else 0)  # decoders may still read
        await engine.close(seconds if signals is None or not signals.second.is_set() else _LAST_WORDS_SECONDS)


class _Signals:
    """SIGTERM and SIGINT. first: to end when what runs is finished; second: to end at once."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._came)

    def _came(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _until(condition: Callable[[], Any], seconds: float) -> None:
    """Returns when it holds, or after so many seconds."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.02)


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers: who runs it decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


class AccessLog:
    """One line a request: method, path, status, seconds. Never what was asked, and no line that a path would make."""

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
            path = quote(scope["path"])[:_PATH_CHARACTERS]
            log.info("%s %s %d %.3f s", scope["method"], path, status, time.monotonic() - start)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError where it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listener


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop serves
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
