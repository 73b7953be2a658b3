"""What the items of OpenAI's responses say, as messages and tools of a conversation, and back."""

import base64
import binascii
import contextlib
import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RequestError
from .protocol import is_reference
from .service import new_id

_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_SEARCHES = ("web_search",)  # begins the types of tools that are left out: no model needs one to answer
_INPUT = "input"  # a custom tool's only parameter


def as_messages(given: str | list[Any], look_up: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a response's input. An assistant's reasoning, text and calls that follow each other are one message.

    look_up: an item of an earlier response by its id; raises RequestError. Reasoning that comes as its id alone, as
    langchain sends it after a stream, is empty where it is not found. Raises RequestError, which names the item, for
    what is neither text nor a call.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    named: set[str] = set()
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, Mapping):
            raise RequestError(f"{where} must be an object, not {reprlib.repr(item)}")
        if item.get("type") == "item_reference":
            item = look_up(_new_name(item.get("id"), named, where))
        elif is_reference(item):
            with contextlib.suppress(RequestError):
                item = look_up(_new_name(item.get("id"), named, where))
        _add(messages, item, where)
    return messages


def _new_name(id: Any, named: set[str], where: str) -> str:
    """The id of a referenced item. One is taken once, so that a short body has no prompt longer than what is stored."""
    if not isinstance(id, str) or id in named:
        why = "is referenced twice" if isinstance(id, str) else "must be a string"
        raise RequestError(f"{where}: the id {reprlib.repr(id)} of an item {why}")
    named.add(id)
    return id


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type") or "message"
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message":
        role, text = item.get("role"), _text(item.get("content"), where)
        if role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        thought = _text(item.get("content") or item.get("summary"), where) or unsealed(item.get("encrypted_content"))
        if last is None or last["content"] or "tool_calls" in last:
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        last["reasoning_content"] = last.get("reasoning_content", "") + thought
    elif kind in ("function_call", "custom_tool_call"):
        if last is None:
            last = {"role": "assistant", "content": ""}
            messages.append(last)
        arguments = item.get("arguments") if kind == "function_call" else json.dumps({_INPUT: item.get("input") or ""})
        call = {"id": item.get("call_id"), "type": "function"}
        call["function"] = {"name": item.get("name"), "arguments": arguments}
        last.setdefault("tool_calls", []).append(call)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        text = _text(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    else:
        raise RequestError(
            f"{where}: an item of type {reprlib.repr(kind)} is not supported; this engine reads text and calls"
        )


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in (*_TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{where}: content of type {reprlib.repr(kind)} is not supported; this engine reads text only"
            )
        texts.append(text)
    return "".join(texts)


def output_message(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that a response's items come back as."""
    messages: list[dict[str, Any]] = []
    for item in items:
        _add(messages, item, "output")
    return messages


def sealed(text: str) -> str:
    """Reasoning for the field in which a client carries it unread. It is spelled otherwise, not encrypted."""
    return base64.b64encode(text.encode()).decode()


def unsealed(value: Any) -> str:
    """What `sealed` was given; "" for what it did not make."""
    try:
        return base64.b64decode(value or "", validate=True).decode()
    except (binascii.Error, ValueError, TypeError):
        return ""


class Tools:
    """The tools of a request. definitions: as a conversation takes them."""

    def __init__(self, tools: list[Any]):
        """Raises RequestError for what is neither a function, a custom tool nor a web search, which is left out."""
        self.definitions: list[dict[str, Any]] = []
        self._custom: set[str] = set()
        for i, tool in enumerate(tools):
            self._take(tool, f"tools[{i}]")

    def _take(self, tool: Any, where: str) -> None:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if isinstance(kind, str) and kind.startswith(_SEARCHES):
            return
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            for inner in tool["tools"]:
                self._take(inner, where)
            return
        if kind not in ("function", "custom") or not isinstance(tool.get("name"), str):
            raise RequestError(f"{where} is {reprlib.repr(tool)}; it must be a function or a custom tool with a name")
        function = {"name": tool["name"]}
        if tool.get("description"):
            function["description"] = tool["description"]
        if kind == "function":
            function["parameters"] = tool.get("parameters") or {"type": "object", "properties": {}}
            if tool.get("strict"):
                function["strict"] = True
        else:
            self._custom.add(tool["name"])
            form = tool.get("format")
            grammar = form.get("definition") if isinstance(form, Mapping) else None
            about = "free text" + (f" of this grammar:\n{grammar}" if isinstance(grammar, str) else "")
            properties = {_INPUT: {"type": "string", "description": about}}
            function["parameters"] = {"type": "object", "properties": properties, "required": [_INPUT]}
        self.definitions.append({"type": "function", "function": function})

    def choice(self, given: Any) -> str | dict[str, Any] | None:
        """A tool_choice as a conversation takes it."""
        if isinstance(given, Mapping) and given.get("type") in ("function", "custom"):
            return {"type": "function", "function": {"name": given.get("name")}}
        if isinstance(given, Mapping):
            raise RequestError(f"tool_choice is {reprlib.repr(given)}; it must be none, auto, required or name a tool")
        return given if self.definitions or given != "auto" else None

    def call_item(self, name: str) -> dict[str, Any]:
        """A call that begins."""
        call_id = new_id("call", "_")
        if name in self._custom:
            found = {"type": "custom_tool_call", "id": new_id("ctc", "_"), "input": ""}
        else:
            found = {"type": "function_call", "id": new_id("fc", "_"), "arguments": ""}
        return found | {"call_id": call_id, "name": name, "status": "in_progress"}

    @staticmethod
    def custom_input(arguments: str) -> str:
        """The text that a custom tool is called with."""
        try:
            found = json.loads(arguments)
        except ValueError:  # the call was cut
            return ""
        return str(found.get(_INPUT, ""))
