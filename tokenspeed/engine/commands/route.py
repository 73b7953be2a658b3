"""`route`: one endpoint before several servers."""

import argparse
import math
from urllib.parse import urlsplit

from ..errors import ConfigError
from .serve import check_reach


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "route",
        help="put one endpoint before several servers",
        description="Route requests to servers: each to the one whose prefix cache holds most of its prompt (start "
        "them with --kv-events), or that has least to do. Long prompts are prefilled by --prefill servers for --decode "
        "servers. Servers that stop answering are left out until they answer again. Programs' base URL is "
        "http://HOST:PORT/v1.",
    )
    add = parser.add_argument_group("servers").add_argument
    repeated = {"action": "append", "default": [], "metavar": "URL"}
    add(
        "--replica",
        **repeated,
        help="a server that does all of a request, as http://HOST:PORT; may repeat (default none)",
    )
    add(
        "--prefill",
        **repeated,
        help="a server that prefills for others (serve --role prefill); may repeat (default none)",
    )
    add("--decode", **repeated, help="a server that decodes (serve --role decode, or both); may repeat (default none)")
    add(
        "--prefill-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="tokens that a decode server's cache must lack of a prompt for it to be prefilled apart (default 1024)",
    )
    add(
        "--check-seconds",
        type=float,
        default=2,
        metavar="S",
        help="between two looks whether a server answers (default 2 s)",
    )
    add = parser.add_argument_group("router").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key (default 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key clients may use, which is passed on: servers must take it, too; may repeat (default none)",
    )
    add("--max-body-mib", type=int, default=32, metavar="MIB", help="the largest request taken (default 32 MiB)")
    add("--drain-seconds", type=float, default=30, metavar="S", help="to finish what runs at the end (default 30 s)")
    return parser


def run(options: argparse.Namespace) -> int:
    check_reach(options)
    given = {kind: getattr(options, kind) for kind in ("replica", "prefill", "decode")}
    urls = [url.rstrip("/") for found in given.values() for url in found]
    for url in urls:
        if not _is_url(url):
            raise ConfigError(f"{url!r} is no server's URL; it must be like http://127.0.0.1:8001, without a path.")
        if urls.count(url) > 1:
            raise ConfigError(f"{url} is given {urls.count(url)} times; each server has one place.")
    if not given["replica"] and not given["decode"]:
        raise ConfigError("no server is given that answers; --replica URL or --decode URL is needed.")
    if given["prefill"] and not given["decode"]:
        raise ConfigError("--prefill is given without --decode: nobody would decode what is prefilled.")
    for name, valid, wanted in (
        ("port", 0 <= options.port < 1 << 16, "from 0 to 65535"),
        ("prefill_tokens", options.prefill_tokens >= 1, "at least 1"),
        ("check_seconds", 0 < options.check_seconds < math.inf, "a time > 0"),
        ("max_body_mib", 1 <= options.max_body_mib <= 1024, "from 1 to 1024"),
        ("drain_seconds", 0 <= options.drain_seconds < math.inf, "a time >= 0"),
    ):
        if not valid:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)!r}; it must be {wanted}.")
    # Imported here: only this command needs it.
    from ..router.main import RouterOptions, route

    return route(
        RouterOptions(
            given,
            options.host,
            options.port,
            tuple(options.api_key),
            options.prefill_tokens,
            options.check_seconds,
            options.max_body_mib << 20,
            options.drain_seconds,
        )
    )


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.path and parts.port != 0
    except ValueError:
        return False
