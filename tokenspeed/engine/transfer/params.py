"""What a request says of transfers: vLLM's `kv_transfer_params`."""

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import RequestError
from .messages import MAX_ROOM_CHARACTERS

ROLES = ("prefill", "decode", "both")
TRANSPORTS = ("auto", "sockets", "nixl")


class RemoteDecode(msgspec.Struct, tag=True, frozen=True):
    """Prefill the prompt, for another engine to decode. room: the name it asks under."""

    room: str


class RemotePrefill(msgspec.Struct, tag=True, frozen=True):
    """The prompt is prefilled by another engine. engine: its name, None for whoever answers at host and port."""

    room: str
    host: str
    port: int
    engine: str | None = None


Transfer = RemoteDecode | RemotePrefill


class TransferSettings(msgspec.Struct, frozen=True):
    """role: one of ROLES; host, port: of this machine, as peers reach it; lease: seconds of silence after which a
    peer's memory is free again; transport: one of TRANSPORTS."""

    role: str
    host: str = "127.0.0.1"
    port: int = 0
    lease: float = 20.0
    transport: str = "auto"


class Address(msgspec.Struct, frozen=True):
    """An engine among its peers, and where it lends what it has prefilled; port: None where it lends nothing; tp: ranks
    that split its dense weights."""

    role: str
    engine: str
    host: str
    port: int | None
    tp: int = 1


def parse(given: Mapping[str, Any] | None, own: Address | None) -> Transfer | None:
    """What a request asks for. own: this engine's address, None where it takes no part in transfers. Raises
    RequestError for what makes no sense, or is not this engine's role."""
    role = own.role if own else None
    decode, prefill = (_flag(given or {}, name) for name in ("do_remote_decode", "do_remote_prefill"))
    if decode and prefill:
        raise RequestError("do_remote_decode and do_remote_prefill are both true; one of them can be.")
    if role is None and (decode or prefill):
        raise RequestError("kv_transfer_params need a server that was started with --role; this one was not.")
    if (decode and role == "decode") or (prefill and role == "prefill"):
        asked = "do_remote_decode" if decode else "do_remote_prefill"
        raise RequestError(f"{asked} is true, but this server's role is {role!r}; 'both' takes either.")
    if decode:
        return RemoteDecode(_name(given) or secrets.token_hex(16))
    if not prefill:
        return None
    room, host, port = _name(given), given.get("remote_host"), given.get("remote_port")
    engine = given.get("remote_engine_id")
    for name, valid, value in (
        ("transfer_id or remote_request_id", bool(room), room),
        ("remote_host", isinstance(host, str) and 0 < len(host) < 256, host),
        ("remote_port", type(port) is int and 0 < port < 1 << 16, port),
        ("remote_engine_id", engine is None or (isinstance(engine, str) and len(engine) < 256), engine),
    ):
        if not valid:
            raise RequestError(f"do_remote_prefill needs {name}; it is {value!r:.100}.")
    return RemotePrefill(room, host, port, engine)


def answer(transfer: RemoteDecode, own: Address) -> dict[str, Any]:
    """For the response of a prefill: what the decoder's request is to have. The block ids are the room's secret: the
    two engines speak of them themselves."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": own.engine,
        "remote_block_ids": [],
        "remote_request_id": transfer.room,
        "remote_host": own.host,
        "remote_port": own.port,
        "transfer_id": transfer.room,
        "tp_size": own.tp,
    }


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value not in (None, True, False):
        raise RequestError(f"{name} is {value!r:.100}; it must be true or false.")
    return bool(value)


def _name(given: Mapping[str, Any]) -> str | None:
    name = given.get("transfer_id") or given.get("remote_request_id")
    if name is not None and not (isinstance(name, str) and len(name) <= MAX_ROOM_CHARACTERS):
        raise RequestError(f"transfer_id is {name!r:.100}; it must be up to {MAX_ROOM_CHARACTERS} characters.")
    return name
