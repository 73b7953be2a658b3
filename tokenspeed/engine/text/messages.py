"""Checking a conversation before a template sees it, and saying which markup in it is the model's own."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic_core import from_json

from ..errors import RequestError
from .literals import Hidden, LiteralGuard, Span

TOOL_CALL = "<tool_call>"  # opens one in the model's own markup
ROLES = ("system", "user", "assistant", "tool")
_SYSTEM_NAMES = ("developer",)  # what OpenAI's newer clients call it
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_MEDIA = ("image", "audio", "video", "file")
_MAX_DEPTH = 64

_THINK = re.compile(r"\A\s*(<think>)(?:.*?(</think>))?|\A.*?^(</think>)$", re.DOTALL | re.MULTILINE)
_TOOL_CALL = re.compile(r"^</?tool_call>$", re.MULTILINE)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of `messages` as templates of this family expect it; raises RequestError naming the message and the value.

    Content is a string, a list of text parts, or, for an assistant, absent; None is the empty string. Other keys whose
    value is None are dropped, `developer` is `system`, and reasoning under another usual name is `reasoning_content`.
    `arguments` of tool calls are parsed; of JSON that was cut short, as max_tokens cuts a call, what is there counts.
    """
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty; give at least one message")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def merge_systems(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Checked messages with one system message, at the front, that holds the text of all of them in their order, an
    empty line between two; and for each of the messages its index there."""
    texts = [_text(message["content"]) for message in messages if message["role"] == "system"]
    merged: list[dict[str, Any]] = [{"role": "system", "content": "\n\n".join(filter(None, texts))}] if texts else []
    places = []
    for message in messages:
        if message["role"] != "system":
            merged.append(message)
        places.append(0 if message["role"] == "system" else len(merged) - 1)
    return merged, places


def _text(content: str | list[dict[str, Any]]) -> str:
    return (content if isinstance(content, str) else "".join(part["text"] for part in content)).strip()


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A copy of `tools`, JSON schemas of functions with a name each; raises RequestError."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise RequestError(f"tools must be a list of functions, not {type(tools).__name__}")
    checked = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        tool = _plain_object(tool, where)
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{where} must be a function with a name, not {_show(tool)}")
        checked.append(tool)
    return checked


def hide_literals(message: dict[str, Any], guard: LiteralGuard, hidden: Hidden) -> dict[str, Any]:
    """A copy of a checked message whose control-token literals are marks, but for an assistant's own markup.

    A history may hold what the model wrote as it wrote it. In an assistant's `content` these are therefore control
    tokens, as `transformers` reads them: the `<think>` and `</think>` of a block that the content begins with (where
    the opening one stood in the prompt: the first `</think>` on a line of its own), unless the message gives its
    reasoning apart, and `<tool_call>` and `</tool_call>` each on a line of its own. All else in it, and everything in
    the strings of users, tools and systems, is text.
    """
    if message["role"] != "assistant":
        return guard.hide(message, hidden)
    result = guard.hide({key: value for key, value in message.items() if key != "content"}, hidden)
    think = "reasoning_content" not in message
    content = message.get("content")
    if isinstance(content, str):
        result["content"] = _hide_content(content, think, guard, hidden)
    elif content is not None:
        result["content"] = [
            {**guard.hide(part, hidden), "text": _hide_content(part["text"], think and i == 0, guard, hidden)}
            for i, part in enumerate(content)
        ]
    return result


def _hide_content(content: str, think: bool, guard: LiteralGuard, hidden: Hidden) -> str:
    content = guard.normalized(content)
    keep: set[Span] = {match.span() for match in _TOOL_CALL.finditer(content)}
    if think and (match := _THINK.match(content)):
        keep |= {match.span(group) for group in (1, 2, 3) if match[group]}
    return guard.hide_text(content, hidden, frozenset(keep))


def _check_message(message: Any, where: str) -> dict[str, Any]:
    given = _plain_object(message, where)
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role in _SYSTEM_NAMES:
        role = message["role"] = "system"
    if role not in ROLES:
        raise RequestError(f"{where}: role is {role!r}; it must be one of {', '.join(ROLES)}")
    for name in _REASONING_NAMES:
        if not isinstance(message.get(name, ""), str):
            raise RequestError(f"{where}: {name} must be a string, not {_show(message[name])}")
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if "content" in given:
        message.setdefault("content", "")
        _check_content(message["content"], where)
    elif role != "assistant":
        raise RequestError(f"{where}: a {role} message needs content")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if role != "assistant" or not isinstance(calls, list):
            raise RequestError(f"{where}: tool_calls must be a list in an assistant message, not {_show(calls)}")
        for i, call in enumerate(calls):
            _check_tool_call(call, f"{where}.tool_calls[{i}]")
    elif role == "assistant" and "content" not in message and reasoning is None:
        raise RequestError(f"{where}: an assistant message needs content, reasoning_content or tool_calls")
    return message


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RequestError(f"{where}: content must be a string or a list of text parts, not {_show(content)}")
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        named = (kind, *part) if isinstance(kind, str) else ()
        media = next((medium for medium in _MEDIA for name in named if medium in name), None)
        if media is not None:
            raise RequestError(f"{where}.content[{i}]: {media} input is not supported; this engine reads text only")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}.content[{i}] must be a text part, not {_show(part)}")


def _check_tool_call(call: Any, where: str) -> None:
    """Parses the arguments in place (the message is our copy)."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{where} must be a function with a name and arguments, not {_show(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = _plain(_parse_arguments(arguments, where), where, 0)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}: arguments must be an object, not {_show(arguments)}")
    function["arguments"] = arguments


def _parse_arguments(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        try:
            return from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
        except ValueError:
            raise RequestError(f"{where}: arguments are not JSON ({error}): {_show(text)}") from None


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _plain_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} must be an object, not {_show(value)}")
    return _plain(value, where, 0)


def _plain(value: Any, where: str, depth: int) -> Any:
    """A deep copy of a JSON-like value out of plain Python types, so that a template never holds a caller's object."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} levels deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise RequestError(f"{where}: key {_show(key)} must be a string")
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds {_show(value)}, a {type(value).__name__}; only JSON values are allowed")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
