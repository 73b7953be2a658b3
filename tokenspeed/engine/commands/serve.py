"""`serve`: an OpenAI-compatible HTTP endpoint."""

import argparse
import ipaddress

from ..config import EngineConfig
from ..errors import ConfigError
from .options import add_engine_options, engine_settings


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "serve",
        help="serve an OpenAI-compatible HTTP endpoint",
        description="Serve /v1/chat/completions, /v1/completions, /v1/messages and more until SIGTERM or Ctrl-C, then "
        "finish what runs. Other programs' base URL is http://HOST:PORT/v1.",
    )
    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need --api-key")
    http.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    http.add_argument("--api-key", action="append", default=[], help="a key that clients may use; may be given again")
    http.add_argument("--served-model-name", help="the model's name to clients (default: the checkpoint's)")
    http.add_argument("--max-requests", type=int, default=512, help="in flight at once, then 429 (default 512)")
    http.add_argument("--max-body-mib", type=int, default=64, help="the largest request taken, in MiB (default 64)")
    http.add_argument("--request-timeout", type=float, help="seconds after which a request is ended (default: none)")
    http.add_argument("--drain-seconds", type=float, default=30, help="to finish what runs at the end (default 30)")
    http.add_argument("--no-exact-history", action="store_true", help="encode known turns anew when they are sent back")
    http.add_argument("--log-prompts", action="store_true", help="log what is asked; otherwise only sizes and times")
    add_engine_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    loopback = options.host == "localhost" or (
        _is_address(options.host) and ipaddress.ip_address(options.host).is_loopback
    )
    if not loopback and not options.api_key:
        raise ConfigError(f"--host {options.host} is reachable from outside: give an --api-key, or bind to 127.0.0.1.")
    if any(not key.strip() for key in options.api_key):
        raise ConfigError("--api-key is empty; it must have at least one character.")
    # Imported here: only this command needs the server's packages.
    from ..server.main import ServerOptions, serve

    config = EngineConfig(**engine_settings(options))
    server = ServerOptions(
        host=options.host,
        port=options.port,
        api_keys=tuple(options.api_key),
        model=options.model,
        model_name=options.served_model_name,
        most_requests=options.max_requests,
        most_body_bytes=options.max_body_mib << 20,
        timeout=options.request_timeout,
        drain_seconds=options.drain_seconds,
        exact_history=not options.no_exact_history,
    )
    return serve(server, config)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
