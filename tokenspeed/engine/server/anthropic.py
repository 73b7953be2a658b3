"""Anthropic's messages, the text and tool subset, over the same conversations as OpenAI's chat."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ..errors import RequestError
from ..request import Update
from ..text.template import MAX_MARKS
from ..text.tools import Arguments, CallCut, CallFinished, CallStarted, Content
from .protocol import AnthropicRequest
from .service import Service, new_id
from .sse import event
from .turns import Conversation, Reasoning, TurnEvent, TurnParser, prepare

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}


def conversation(service: Service, body: AnthropicRequest, key: str | None) -> Conversation:
    """The request in the form that every chat endpoint shares. Raises RequestError for what is not text or tools."""
    messages: list[dict[str, Any]] = []
    marks: list[int] = []

    def mark(block: Any) -> None:
        if isinstance(block, dict) and block.get("cache_control"):
            marks.append(len(messages) - 1)

    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
        mark(body.system[-1] if isinstance(body.system, list) else None)
    for i, message in enumerate(body.messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise RequestError(f"messages[{i}]: role is {role!r}; it must be user or assistant")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise RequestError(f"messages[{i}]: content must be a string or a list of blocks")
        convert = _assistant if role == "assistant" else _user
        messages += convert(blocks, f"messages[{i}]")
        for block in blocks:
            mark(block)
    thinking = (body.thinking or {}).get("type")
    sampling = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p", "max_tokens")}
    if thinking == "enabled" and isinstance(body.thinking.get("budget_tokens"), int):
        sampling["thinking_token_budget"] = body.thinking["budget_tokens"]
    return Conversation(
        messages=messages,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use", False),
        sampling=sampling | {"stop": body.stop_sequences},
        marks=tuple(sorted(set(marks))[-MAX_MARKS:]),
        enable_thinking={"enabled": True, "disabled": False}.get(thinking),
        name_space=service.name_space(key, None),
    )


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise RequestError(f"{where}: content of type {kind!r} is not supported; this engine reads text only")
    return "\n".join(block["text"] for block in blocks)


def _user(blocks: list, where: str) -> list[dict[str, Any]]:
    """Tool results first, as messages of their own, then what the user says."""
    results, said = [], []
    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            text = _text(block.get("content") or "", where)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            said.append(block)
    return [*results, *([{"role": "user", "content": _text(said, where)}] if said else [])]


def _assistant(blocks: list, where: str) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + str(block.get("thinking", ""))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            message.setdefault("tool_calls", []).append(
                {"id": block.get("id"), "type": "function", "function": function}
            )
        elif kind != "redacted_thinking":
            message["content"] += _text([block], where)
    return [message]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise RequestError(f"{where} needs a name")
    function = {"name": tool["name"], "parameters": tool.get("input_schema") or {"type": "object", "properties": {}}}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(body: AnthropicRequest) -> str | dict[str, Any]:
    choice = body.tool_choice or {"type": "auto" if body.tools else "none"}
    kind = choice.get("type")
    if kind == "tool" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in kinds:
        raise RequestError(f"tool_choice is {choice!r}; its type must be auto, any, tool (with a name) or none")
    return kinds[kind]


class Message:
    """One answer in Anthropic's form."""

    def __init__(self, service: Service, body: AnthropicRequest, key: str | None):
        """Raises RequestError for what cannot be asked."""
        self._service, self._body = service, body
        self.id = new_id("msg")
        self._prepared = prepare(
            service.frontend,
            service.tool_grammars,
            service.history,
            self.id,
            conversation(service, body, key),
            service.room,
        )
        self._parser = TurnParser(service.frontend, self._prepared)
        self._cached = 0

    async def _updates(self) -> AsyncIterator[tuple[Update, list[TurnEvent]]]:
        request = self._prepared.request
        async with aclosing(self._service.run(request, self._prepared.grammar)) as updates:
            async for update in updates:
                if update.reuse:
                    self._cached = update.reuse.cached_tokens
                events = self._parser.push(update)
                if update.finish_reason == "stop":
                    self._service.remember(request, self._parser.ids)
                yield update, events

    def _usage(self) -> dict[str, int]:
        prompt = len(self._prepared.request.prompt)
        return {
            "input_tokens": prompt - self._cached,
            "output_tokens": len(self._parser.ids),
            "cache_read_input_tokens": self._cached,
            "cache_creation_input_tokens": 0,
        }

    def _stopped(self, update: Update) -> dict[str, Any]:
        reason, stop = _STOP_REASONS[update.finish_reason], None
        if self._parser.called and update.finish_reason == "stop":
            reason = "tool_use"
        if isinstance(update.stop_reason, str):
            reason, stop = "stop_sequence", update.stop_reason
        return {"stop_reason": reason, "stop_sequence": stop}

    def _frame(self, content: list[dict]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._service.config.model_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    async def whole(self) -> dict[str, Any]:
        """The message object. Raises as `Service.run` does."""
        blocks: list[dict[str, Any]] = []
        pieces: dict[int, tuple[dict, list[str]]] = {}  # of calls: their block and their arguments
        stopped: dict[str, Any] = {}
        async for update, events in self._updates():
            for found in events:
                match found:
                    case Reasoning(text):
                        _append(blocks, "thinking", text)
                    case Content(text):
                        _append(blocks, "text", text)
                    case CallStarted(index, name):
                        block = {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}}
                        blocks.append(block)
                        pieces[index] = block, []
                    case Arguments(index, piece):
                        pieces[index][1].append(piece)
                    case CallFinished(index):
                        pieces[index][0]["input"] = json.loads("".join(pieces[index][1]))
                    case CallCut(index, text):
                        blocks.remove(pieces.pop(index)[0])
                        _append(blocks, "text", text)
            if update.finish_reason:
                stopped = self._stopped(update)
        return self._frame(blocks) | stopped | {"usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: message_start, content blocks, message_delta, message_stop."""
        index, kind = -1, None  # of the open block
        yielded = False

        def close() -> bytes:
            return event({"type": "content_block_stop", "index": index}, "content_block_stop")

        def delta(content: dict[str, Any]) -> bytes:
            return event({"type": "content_block_delta", "index": index, "delta": content}, "content_block_delta")

        async with aclosing(self._updates()) as updates:
            async for update, events in updates:
                pieces: list[bytes] = []
                if not yielded:
                    yielded = True
                    pieces.append(event({"type": "message_start", "message": self._frame([])}, "message_start"))
                for found in events:
                    wanted, start = _block(found)
                    if wanted is not None and (wanted != kind or wanted == "tool_use"):
                        if kind is not None:
                            pieces.append(close())
                        index, kind = index + 1, wanted
                        started = {"type": "content_block_start", "index": index, "content_block": start}
                        pieces.append(event(started, "content_block_start"))
                    match found:
                        case Reasoning(text):
                            pieces.append(delta({"type": "thinking_delta", "thinking": text}))
                        case Content(text) | CallCut(_, text):
                            pieces.append(delta({"type": "text_delta", "text": text}))
                        case Arguments(_, piece):
                            pieces.append(delta({"type": "input_json_delta", "partial_json": piece}))
                if update.finish_reason:
                    if kind is not None:
                        pieces.append(close())
                    end = {"type": "message_delta", "delta": self._stopped(update), "usage": self._usage()}
                    pieces.append(event(end, "message_delta"))
                if pieces:
                    yield b"".join(pieces)
        yield event({"type": "message_stop"}, "message_stop")


def _block(found: TurnEvent) -> tuple[str | None, dict[str, Any]]:
    """The kind of block an event belongs to and how such a block starts; None where it goes on with the open one."""
    match found:
        case Reasoning():
            return "thinking", {"type": "thinking", "thinking": "", "signature": ""}
        case Content() | CallCut():
            return "text", {"type": "text", "text": ""}
        case CallStarted(_, name):
            return "tool_use", {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}}
    return None, {}


def _append(blocks: list[dict[str, Any]], kind: str, text: str) -> None:
    if not blocks or blocks[-1]["type"] != kind:
        blocks.append({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
    blocks[-1][kind] += text
