"""`serve`: an OpenAI-compatible HTTP endpoint."""

import argparse
import ipaddress
import math

from ..config import EngineConfig
from ..errors import ConfigError
from ..transfer.params import ROLES, TRANSPORTS, TransferSettings
from .options import add_engine_options, engine_settings


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="serve an OpenAI-compatible HTTP endpoint",
        description="Serve /v1/chat/completions, /v1/completions, /v1/messages and more until SIGTERM or Ctrl-C, then "
        "finish what runs. Other programs' base URL is http://HOST:PORT/v1.",
    )
    http = parser.add_argument_group("server")
    add = http.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    add(
        "--api-key", action="append", default=[], metavar="KEY", help="a key clients may use; may repeat (default none)"
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin, as https://example.com, use the server from a browser; * for all; may repeat "
        "(default none)",
    )
    add("--served-model-name", metavar="NAME", help="the model's name to clients (default: the checkpoint's)")
    add("--max-requests", type=int, default=512, metavar="N", help="in flight at once, beyond it 429 (default 512)")
    add("--max-body-mib", type=int, default=32, metavar="MIB", help="the largest request taken (default 32 MiB)")
    add("--request-timeout", type=float, metavar="S", help="seconds after which a request ends (default: no limit)")
    add("--drain-seconds", type=float, default=30, metavar="S", help="to finish what runs at the end (default 30 s)")
    add("--no-exact-history", action="store_true", help="encode known turns anew when they come back (default off)")
    add(
        "--kv-events",
        metavar="ENDPOINT",
        help="publish what the prefix cache stores and lets go, with its tokens, as vLLM's KV events on a ZeroMQ PUB "
        "socket, for routers: tcp://HOST:PORT; anyone who reaches it can read it (default: none)",
    )
    transfer = parser.add_argument_group("prefill apart from decode")
    add = transfer.add_argument
    add(
        "--role",
        choices=ROLES,
        help="take part in transfers (vLLM's kv_transfer_params): prefill for others, decode what others have "
        "prefilled, or both (default: neither)",
    )
    add(
        "--transfer-host",
        default="127.0.0.1",
        metavar="HOST",
        help="this machine's address, at which decoders reach it; keep it in a private network: who knows a transfer's "
        "name can read its prompt's state there (default 127.0.0.1)",
    )
    add("--transfer-port", type=int, default=0, metavar="PORT", help="port for decoders (default 0: a free one)")
    add(
        "--transfer-lease",
        type=float,
        default=20,
        metavar="S",
        help="seconds without a word after which a peer's memory is freed, and a prompt is prefilled here (default 20)",
    )
    add(
        "--transfer-transport",
        choices=TRANSPORTS,
        default="auto",
        help="how bytes go between engines: auto takes CUDA IPC on one GPU, else NIXL where both have its package and "
        "it works, else sockets; nixl takes no CUDA IPC and refuses to start without the package (default auto)",
    )
    add_engine_options(parser)
    return parser


def check_reach(options: argparse.Namespace) -> None:
    """Raises ConfigError for an address that others reach without a key."""
    loopback = options.host == "localhost" or (
        _is_address(options.host) and ipaddress.ip_address(options.host).is_loopback
    )
    if not loopback and not options.api_key:
        raise ConfigError(f"--host {options.host} is reachable from outside: give an --api-key, or bind to 127.0.0.1.")
    if any(not key.strip() for key in options.api_key):
        raise ConfigError("--api-key is empty; it must have at least one character.")


def run(options: argparse.Namespace) -> int:
    check_reach(options)
    for name, valid, wanted in (
        ("port", 0 <= options.port < 1 << 16, "from 0 to 65535"),
        ("max_requests", options.max_requests >= 1, "at least 1"),
        ("max_body_mib", 1 <= options.max_body_mib <= 1024, "from 1 to 1024"),
        ("request_timeout", options.request_timeout is None or 0 < options.request_timeout < math.inf, "a time > 0"),
        ("transfer_port", 0 <= options.transfer_port < 1 << 16, "from 0 to 65535"),
        ("transfer_lease", 0 < options.transfer_lease <= 3600, "a time > 0 and at most 3600"),
        ("transfer_host", options.transfer_host not in ("", "*", "0.0.0.0", "::"), "an address that peers can reach"),
        ("drain_seconds", 0 <= options.drain_seconds < math.inf, "a time >= 0"),
    ):
        if not valid:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)!r}; it must be {wanted}.")
    # Imported here: only this command needs the server's packages.
    from ..server.main import ServerOptions, serve

    config = EngineConfig(**engine_settings(options))
    transfer = None
    if options.role is not None:
        if config.rendezvous is not None:
            raise ConfigError(
                f"--role {options.role} under torchrun: ranks exchange state with peers where this command starts them "
                "itself, on one machine."
            )
        where = options.transfer_host, options.transfer_port
        transfer = TransferSettings(options.role, *where, options.transfer_lease, options.transfer_transport)
    server = ServerOptions(
        host=options.host,
        port=options.port,
        api_keys=tuple(options.api_key),
        origins=tuple(options.allow_origin),
        model=options.model,
        model_name=options.served_model_name,
        max_requests=options.max_requests,
        max_body_bytes=options.max_body_mib << 20,
        timeout=options.request_timeout,
        drain_seconds=options.drain_seconds,
        exact_history=not options.no_exact_history,
        kv_events=options.kv_events,
        transfer=transfer,
    )
    return serve(server, config)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
