"""Runs a router."""

import asyncio
import logging
import signal
import socket
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

# When a silent connection is asked after [s], how often then [s], how many answers may be missing; and how long what
# was sent may stay without an answer [ms].
_GONE = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000))


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
    client = backend_client()
    backends = Backends(options.backends, client, options.check_seconds)
    policy = Policy(backends, options.least_prefill)
    app = Router(backends, policy, client).app(options.api_keys, (options.host,), options.max_body_bytes)
    host, port = listener.getsockname()[:2]
    log.info("routing to %d backends at http://%s:%d/v1", len(backends.all), host, port)
    server = Server(configuration(app, options.drain_seconds))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _end, server)
    await server.serve(sockets=[listener])


def backend_client() -> httpx.AsyncClient:
    """What asks backends. Generating takes as long as it takes, so nothing times out but connecting; a host that is
    gone without a word is found out by the kernel, which asks after it where nothing has come for a while."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    options += [(socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _GONE if hasattr(socket, name)]
    # Servers close a connection that has been idle for 5 s: none is used that may be about to be closed.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=2.5)
    transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=options)
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), transport=transport, trust_env=False)


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
