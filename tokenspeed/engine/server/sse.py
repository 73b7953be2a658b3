"""Server-sent events."""

from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One event; name: its type, where the API gives it one."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + _encode(data) + b"\n\n"
