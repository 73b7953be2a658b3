"""What a request's prompt is, as far as a router needs to know: its tokens where they can be had, and a name for its
conversation."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..server.protocol import is_reference

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
GENERATING = (COMPLETIONS, CHAT, MESSAGES, RESPONSES)
_BYTES_A_TOKEN = 4  # of a body, where nothing better is known


@dataclass(frozen=True, slots=True)
class Prompt:
    """tokens: None where they were not made out; size: how many there are, or about so many; conversation: equal for
    the turns of one, "" where there is nothing to tell it by; resumes: whether what comes before is stored at one
    server."""

    tokens: list[int] | None
    size: int
    conversation: str = ""
    resumes: bool = False


def tokenize_body(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """What `POST /tokenize` is to be asked for this request; None where it cannot say."""
    if path == CHAT and isinstance(body.get("messages"), list):
        names = ("model", "messages", "tools", "add_generation_prompt")
        return {name: body[name] for name in names if body.get(name) is not None}
    if path == COMPLETIONS and isinstance(body.get("prompt"), str):
        return {"prompt": body["prompt"]} | ({"model": body["model"]} if body.get("model") else {})
    return None


def tokens_given(path: str, body: dict[str, Any]) -> list[int] | None:
    """Where the request itself has token ids."""
    return ids(body.get("prompt")) if path == COMPLETIONS else None


def ids(value: Any) -> list[int] | None:
    """A list of token ids; None for anything else."""
    whole = isinstance(value, list) and bool(value) and all(type(id) is int and 0 <= id < 2**31 for id in value)
    return value if whole else None


def of(path: str, body: dict[str, Any], length: int, tokens: list[int] | None) -> Prompt:
    """length: of the body, in bytes."""
    size = len(tokens) if tokens is not None else length // _BYTES_A_TOKEN
    return Prompt(tokens, size, _conversation(path, body), _resumes(body))


def _resumes(body: dict[str, Any]) -> bool:
    said = body.get("input")
    items = said if isinstance(said, list) else ()
    referred = any(isinstance(item, dict) and is_reference(item) for item in items)
    return referred or body.get("previous_response_id") is not None


def _conversation(path: str, body: dict[str, Any]) -> str:
    """How it opens: later turns open alike."""
    if isinstance(previous := body.get("previous_response_id"), str):
        return previous
    said = body.get("messages") if path in (CHAT, MESSAGES) else body.get("input", body.get("prompt"))
    opening: list[Any] = [body.get("system"), body.get("instructions")]
    if isinstance(said, list):
        first = next((i for i, m in enumerate(said) if isinstance(m, dict) and m.get("role") == "user"), 0)
        opening += said[: first + 1]
    elif isinstance(said, str):
        opening.append(said[:1024])
    text = json.dumps(opening, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
