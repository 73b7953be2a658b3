"""Runs a router."""

import asyncio
import logging
import signal
import sys
from dataclasses import dataclass, field

import httpx
import uvicorn
from starlette.types import ASGIApp

from ..server.connections import Connections
from ..server.main import Server, listen
from .app import Router
from .backends import Backends
from .policy import Policy

log = logging.getLogger("tokenspeed.router")


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """As the options of `route`. backends: URLs by kind."""

    backends: dict[str, list[str]] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    least_prefill: int = 1024
    check_seconds: float = 2.0
    max_body_bytes: int = 32 << 20
    drain_seconds: float = 30


def route(options: RouterOptions) -> int:
    """Route until SIGTERM or Ctrl-C; the exit status. Raises ConfigError where it cannot listen."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    listener = listen(options.host, options.port)
    asyncio.run(_route(options, listener))
    return 0


async def _route(options: RouterOptions, listener) -> None:
    # Generating takes as long as it takes; a backend that is gone is found out by connecting and by /health.
    timeout = httpx.Timeout(None, connect=5.0)
    # Servers close a connection that has been idle for 5 s: none is used that may be about to be closed.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.5)
    client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
    backends = Backends(options.backends, client, options.check_seconds)
    policy = Policy(backends, options.least_prefill)
    app = Router(backends, policy, client).app(options.api_keys, (options.host,), options.max_body_bytes)
    host, port = listener.getsockname()[:2]
    log.info("routing to %d backends at http://%s:%d/v1", len(backends.all), host, port)
    server = Server(configuration(app, options.drain_seconds))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _end, server)
    await server.serve(sockets=[listener])


def configuration(app: ASGIApp, drain_seconds: float) -> uvicorn.Config:
    """How it is served: connections within the limits that servers have."""
    return uvicorn.Config(
        app,
        http=Connections(),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=drain_seconds,
    )


def _end(server: Server) -> None:
    """The first time when what runs has finished, the second time at once."""
    server.force_exit, server.should_exit = server.should_exit, True
