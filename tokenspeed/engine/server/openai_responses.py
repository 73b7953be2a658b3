"""OpenAI's responses over the service: items in, items out, streamed or whole."""

import reprlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from ..chat.conversation import Conversation
from ..errors import RequestError
from ..request import Update
from ..text.tools import Arguments, CallCut, CallFinished, CallStarted, Content
from ..text.turn import Reasoning, TurnEvent
from ..transfer.params import RemoteDecode
from .protocol import ResponsesRequest
from .response_items import Tools, as_messages, output_message, sealed
from .response_store import StoredResponse
from .scores import TextScores
from .service import Service, new_id
from .sse import event

_ENCRYPTED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"


class Response:
    """One response."""

    def __init__(self, service: Service, body: ResponsesRequest):
        """Raises RequestError for what cannot be asked."""
        self._service, self._body = service, body
        self._transfer = service.transfer(body.kv_transfer_params, body.stream)
        self.id = new_id("resp", "_")
        self._created = int(time.time())
        self._name_space = service.name_space()
        self._tools = Tools(body.tools or [])
        earlier = body.previous_response_id
        known = [] if earlier is None else service.responses.get(self._name_space, earlier).messages
        self._messages = [*known, *as_messages(body.input, lambda id: service.responses.item(self._name_space, id))]
        system = [{"role": "system", "content": body.instructions}] if body.instructions else []
        effort = (body.reasoning or {}).get("effort")
        chat = Conversation(
            messages=[*system, *self._messages],
            tools=self._tools.definitions or None,
            tool_choice=self._tools.choice(body.tool_choice),
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=body.format(),
            structured_outputs=body.structured_outputs,
            enable_thinking=False if effort == "none" else None,
            template_kwargs=service.frontend.template.effort_kwargs(effort),
            add_generation_prompt=True,
        )
        names = ("temperature", "top_p", "stop", "top_k", "repetition_penalty", "logit_bias", "ignore_eos")
        sampling = {name: getattr(body, name) for name in names} | {"max_tokens": body.max_output_tokens}
        sampling["seed"] = None if body.seed is None else body.seed % 2**63
        include, scores = body.include or [], None
        if body.top_logprobs and _LOGPROBS not in include:
            raise RequestError(f"top_logprobs needs {_LOGPROBS!r} in include; include is {reprlib.repr(include)}.")
        if _LOGPROBS in include and not isinstance(self._transfer, RemoteDecode):
            sampling["logprobs"], scores = body.top_logprobs or 0, TextScores(service.frontend.tokenizer)
        self._reader = service.prepare(self.id, chat, sampling, body.cache_salt, body.priority)
        self._scores = scores
        self._output = _Output(self._tools, _ENCRYPTED in include, scores)

    async def _updates(self) -> AsyncIterator[tuple[Update, list[TurnEvent]]]:
        async with aclosing(self._service.converse(self._reader, transfer=self._transfer)) as updates:
            async for update, events in updates:
                if self._scores:
                    self._scores.add(update)
                yield update, events

    async def whole(self) -> dict[str, Any]:
        """The response object. Raises as `Service.run` does."""
        async with aclosing(self._updates()) as updates:
            async for update, events in updates:
                self._output.take(events)
                last = update
        self._output.end()
        return self._ended(last)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: the response begins, its items come, it ends."""
        number = 0

        def told(found: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return event(found | {"sequence_number": number - 1}, found["type"])

        begun = False
        async with aclosing(self._updates()) as updates:
            async for update, events in updates:
                pieces: list[dict[str, Any]] = []
                if not begun:
                    begun = True
                    frame = self._frame("in_progress")
                    pieces += ({"type": f"response.{name}", "response": frame} for name in ("created", "in_progress"))
                pieces += self._output.take(events)
                if update.finish_reason:
                    pieces += self._output.end()
                    ended = self._ended(update)
                    pieces.append({"type": f"response.{ended['status']}", "response": ended})
                if pieces:
                    yield b"".join(map(told, pieces))

    def _ended(self, last: Update) -> dict[str, Any]:
        """The finished response, remembered where it may be gone on with."""
        cut = last.finish_reason == "length"
        frame = self._frame("incomplete" if cut else "completed")
        if cut:
            frame["incomplete_details"] = {"reason": "max_output_tokens"}
        reader = self._reader
        prompt, generated = len(reader.turn.request.prompt), reader.generated
        frame["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": reader.cached},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": reader.reasoning_tokens},
            "total_tokens": prompt + generated,
        }
        if isinstance(self._transfer, RemoteDecode):  # no answer to go on with
            return frame | self._service.transferred(self._transfer)
        if self._body.store:
            messages = [*self._messages, *output_message(frame["output"])]
            kept = frame | {"output": [_without_logprobs(item) for item in frame["output"]]}
            self._service.responses.put(self._name_space, self.id, StoredResponse(messages, kept))
        return frame

    def _frame(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._reader.turn.request.params
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._service.config.model_name,
            "output": self._output.items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None} | (body.reasoning or {}),
            "store": body.store,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | (body.text or {}),
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "metadata": body.metadata or {},
        }


class _Output:
    """The items of a response as they come, and the events that tell of them. items: what is complete."""

    def __init__(self, tools: Tools, seal: bool, scores: TextScores | None):
        """seal: reasoning also comes in the field that a client without a store sends back. scores: of the tokens so
        far, where messages come with them."""
        self.items: list[dict[str, Any]] = []
        self._tools, self._seal, self._scores = tools, seal, scores
        self._item: dict[str, Any] | None = None  # the open one
        self._pieces: list[str] = []  # of its text or arguments
        self._logprobs: list[dict[str, Any]] = []  # of its text

    def take(self, events: list[TurnEvent]) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        for found in events:
            match found:
                case Reasoning(text):
                    told += self._text("reasoning", text)
                case Content(text, at):
                    told += self._text("message", text, self._scores.take(*at) if self._scores else [])
                case CallStarted(_, name):
                    told += self._begin(self._tools.call_item(name))
                case Arguments(_, piece):
                    self._pieces.append(piece)
                    if self._item["type"] == "function_call":
                        told.append(self._about("response.function_call_arguments.delta", delta=piece))
                case CallFinished():
                    told += self.end()
                case CallCut():
                    told += self.end("incomplete")
        return told

    def end(self, status: str = "completed") -> list[dict[str, Any]]:
        """The open item is complete."""
        if self._item is None:
            return []
        item, text, self._pieces = self._item, "".join(self._pieces), []
        logprobs, self._logprobs = self._logprobs, []
        kind, told = item["type"], []
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = text
            told.append(self._about("response.function_call_arguments.done", arguments=text, name=item["name"]))
        elif kind == "custom_tool_call":
            item["input"] = self._tools.custom_input(text)
            told.append(self._about("response.custom_tool_call_input.delta", delta=item["input"]))
            told.append(self._about("response.custom_tool_call_input.done", input=item["input"]))
        else:
            part = _part(kind, text, logprobs)
            told.append(self._about_text("done", text=text, logprobs=logprobs))
            told.append(self._about("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
            if kind == "reasoning" and self._seal:
                item["encrypted_content"] = sealed(text)
        self._item = None
        self.items.append(item)
        told.append({"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item})
        return told

    def _text(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        told = []
        if self._item is None or self._item["type"] != kind:
            told += self._begin(_empty(kind))
            told.append(self._about("response.content_part.added", content_index=0, part=_part(kind, "", [])))
        self._pieces.append(text)
        self._logprobs += logprobs
        told.append(self._about_text("delta", delta=text, logprobs=logprobs))
        return told

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        told = self.end()
        self._item = item
        told.append({"type": "response.output_item.added", "output_index": len(self.items), "item": dict(item)})
        return told

    def _about(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self._item["id"], "output_index": len(self.items), **more}

    def _about_text(self, what: str, logprobs: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Reasoning has no log-probabilities."""
        if self._item["type"] == "reasoning":
            return self._about(f"response.reasoning_text.{what}", content_index=0, **more)
        return self._about(f"response.output_text.{what}", content_index=0, logprobs=logprobs, **more)


def _empty(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": kind, "id": new_id("rs", "_"), "summary": [], "content": [], "status": "in_progress"}
    return {"type": kind, "id": new_id("msg", "_"), "role": "assistant", "content": [], "status": "in_progress"}


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _without_logprobs(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is remembered: in memory its log-probabilities are many times the size of its text."""
    if item["type"] != "message":
        return item
    return item | {"content": [part | {"logprobs": []} for part in item["content"]]}
