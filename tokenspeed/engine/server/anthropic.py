"""Anthropic's messages, the text and tool subset, over the same conversations as OpenAI's chat."""

import json
import reprlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ..chat.conversation import Conversation
from ..errors import RequestError
from ..request import Update
from ..text.template import MAX_MARKS
from ..text.tools import Arguments, CallCut, CallStarted, Content
from ..text.turn import Reasoning, TurnEvent
from .protocol import AnthropicPrompt, AnthropicRequest
from .service import Service, new_id
from .sse import event

# Of thinking. Nothing is signed, but clients give thinking back only where a signature came with it.
_SIGNATURE = "unsigned"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}
# Of Claude Code, for whom it bills: other with every request, so that no prompt would begin like the one before it.
_BILLING = "x-anthropic-billing-header:"
THREAD_UNSUPPORTED = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}  # an error's details


class ThreadUnsupported(RequestError):
    """Its client goes on without a thread."""


def conversation(body: AnthropicPrompt) -> Conversation:
    """The request in the form that every chat endpoint shares. Raises RequestError for what is not text or tools."""
    if body.thread is not None:
        raise ThreadUnsupported("thread is not supported: send the whole conversation without it.")
    messages: list[dict[str, Any]] = []
    marks: list[int] = []

    def mark(block: Any) -> None:
        if isinstance(block, dict) and block.get("cache_control"):
            marks.append(len(messages) - 1)

    if body.system:
        blocks = body.system if isinstance(body.system, list) else [{"type": "text", "text": body.system}]
        kept = [block for block in blocks if not _is_billing(block)]
        messages.append({"role": "system", "content": _text(kept, "system")})
        mark(kept[-1] if kept else None)
    for i, message in enumerate(body.messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _CONVERT:
            raise RequestError(f"messages[{i}]: role is {reprlib.repr(role)}; it must be one of {', '.join(_CONVERT)}")
        blocks = [{"type": "text", "text": content or ""}] if content is None or isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise RequestError(f"messages[{i}]: content must be a string or a list of blocks")
        messages += _CONVERT[role](blocks, f"messages[{i}]")
        for block in blocks:
            mark(block)
    if body.cache_control and messages:
        marks.append(len(messages) - 1)
    thinking = body.thinking.type if body.thinking else None
    form = (body.output_config or {}).get("format") or body.output_format
    return Conversation(
        messages=messages,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)] if body.tools else None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        response_format=_format(form) if form else None,
        marks=tuple(sorted(set(marks))[-MAX_MARKS:]),
        enable_thinking={"enabled": True, "disabled": False}.get(thinking),
    )


def _format(form: Any) -> dict[str, Any]:
    if not isinstance(form, dict) or form.get("type") != "json_schema" or "schema" not in form:
        given = reprlib.repr(form)
        raise RequestError(f"output_config.format is {given}; it must be of type json_schema, with a schema")
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _is_billing(block: Any) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(_BILLING)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            given = reprlib.repr(kind)
            raise RequestError(f"{where}: content of type {given} is not supported; this engine reads text only")
    return "\n".join(block["text"] for block in blocks)


def _user(blocks: list, where: str) -> list[dict[str, Any]]:
    """Tool results first, as messages of their own, then what the user says."""
    results, said = [], []
    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            text = _text(block.get("content") or "", where)
            if block.get("is_error") and "error" not in text.lower():
                text = f"Error: {text}"
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            said.append(block)
    return [*results, *([{"role": "user", "content": _text(said, where)}] if said else [])]


def _assistant(blocks: list, where: str) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + _thought(block, where)
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            message.setdefault("tool_calls", []).append(
                {"id": block.get("id"), "type": "function", "function": function}
            )
        elif kind != "redacted_thinking":
            message["content"] += _text([block], where)
    return [message]


def _thought(block: dict[str, Any], where: str) -> str:
    text = block.get("thinking") or ""
    if not isinstance(text, str):
        raise RequestError(f"{where}: thinking is {reprlib.repr(text)}; it must be a string")
    return text


def _system(blocks: list, where: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(blocks, where)}]


_CONVERT = {"user": _user, "assistant": _assistant, "system": _system}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """As the same tool is written for OpenAI's API, so that the prompts are the same."""
    if tool.get("type") not in (None, "custom"):
        kind = reprlib.repr(tool["type"])
        raise RequestError(f"{where}: type {kind} is run by Anthropic's own servers; give a custom tool")
    if not isinstance(tool.get("name"), str):
        raise RequestError(f"{where} needs a name")
    function = {"name": tool["name"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema") or {"type": "object", "properties": {}}
    if tool.get("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(body: AnthropicPrompt) -> str | dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return "auto" if body.tools else "none"
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def count_tokens(service: Service, body: AnthropicPrompt) -> dict[str, int]:
    """The tokens of a conversation as a prompt. Raises RequestError for what cannot be asked."""
    prompt = service.turns.encode(conversation(body), service.name_space(body.cache_salt))
    return {"input_tokens": len(prompt.ids)}


class Message:
    """One answer in Anthropic's form."""

    def __init__(self, service: Service, body: AnthropicRequest):
        """Raises RequestError for what cannot be asked."""
        self._service, self._body = service, body
        self._transfer = service.transfer(body.kv_transfer_params, body.stream)
        self.id = new_id("msg")
        sampling = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
        # None are asked for to fill the prefix cache: the token that the engine gives all the same is dropped.
        sampling |= {"max_tokens": max(body.max_tokens, 1), "stop": body.stop_sequences}
        if body.thinking and body.thinking.type == "enabled":
            sampling["thinking_token_budget"] = body.thinking.budget_tokens
        self._reader = service.prepare(self.id, conversation(body), sampling, body.cache_salt)

    async def _updates(self) -> AsyncIterator[tuple[Update, list[TurnEvent]]]:
        async with aclosing(self._service.converse(self._reader, transfer=self._transfer)) as updates:
            async for update, events in updates:
                yield update, events if self._body.max_tokens else []

    def _usage(self) -> dict[str, int]:
        prompt, cached = len(self._reader.turn.request.prompt), self._reader.cached
        return {
            "input_tokens": prompt - cached,
            "output_tokens": min(self._reader.generated, self._body.max_tokens),
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    def _stopped(self, update: Update) -> dict[str, Any]:
        reason, stop = _STOP_REASONS[update.finish_reason], None
        if not self._body.max_tokens:
            reason = "max_tokens"
        elif self._reader.parsers[0].called and update.finish_reason == "stop":
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
        blocks: list[tuple[dict[str, Any], list[str]]] = []  # with their text or input in pieces
        stopped: dict[str, Any] = {}
        async for update, events in self._updates():
            for found in events:
                if isinstance(found, CallCut):
                    blocks.pop()  # it is no call
                kind, text = _part(found)
                if not blocks or blocks[-1][0]["type"] != kind or isinstance(found, CallStarted):
                    blocks.append((_empty(kind, found), []))
                blocks[-1][1].append(text)
            if update.finish_reason:
                stopped = self._stopped(update)
        for block, pieces in blocks:
            text = "".join(pieces)
            block |= {"input": json.loads(text)} if block["type"] == "tool_use" else {block["type"]: text}
            if block["type"] == "thinking":
                block["signature"] = _SIGNATURE
        ended = stopped | {"usage": self._usage()} | self._service.transferred(self._transfer)
        return self._frame([block for block, _ in blocks]) | ended

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: message_start, content blocks, message_delta, message_stop."""
        index, kind = -1, None  # of the open block
        yielded = False

        def told(name: str, **more: Any) -> bytes:
            return event({"type": name, **more}, name)

        def delta(name: str, field: str, text: str) -> bytes:
            return told("content_block_delta", index=index, delta={"type": name, field: text})

        def close() -> bytes:
            signed = delta("signature_delta", "signature", _SIGNATURE) if kind == "thinking" else b""
            return signed + told("content_block_stop", index=index)

        async with aclosing(self._updates()) as updates:
            async for update, events in updates:
                pieces: list[bytes] = []
                if not yielded:
                    yielded = True
                    pieces.append(told("message_start", message=self._frame([])))
                for found in events:
                    wanted, text = _part(found)
                    if wanted != kind or isinstance(found, CallStarted):
                        if kind is not None:
                            pieces.append(close())
                        index, kind = index + 1, wanted
                        pieces.append(told("content_block_start", index=index, content_block=_empty(kind, found)))
                    if text:
                        pieces.append(delta(*_DELTAS[kind], text))
                if update.finish_reason:
                    if kind is not None:
                        pieces.append(close())
                    pieces.append(told("message_delta", delta=self._stopped(update), usage=self._usage()))
                if pieces:
                    yield b"".join(pieces)
        yield told("message_stop")


_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


def _part(found: TurnEvent) -> tuple[str, str]:
    """The type of the block that an event belongs to, and the text that it adds there."""
    match found:
        case Reasoning(text):
            return "thinking", text
        case Content(text) | CallCut(_, text):
            return "text", text
        case Arguments(_, text):
            return "tool_use", text
    return "tool_use", ""


def _empty(kind: str, found: TurnEvent) -> dict[str, Any]:
    """The block that begins with an event."""
    if kind == "tool_use":
        return {"type": kind, "id": new_id("toolu"), "name": found.name, "input": {}}
    return {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
