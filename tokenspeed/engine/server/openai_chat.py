"""OpenAI's chat completions over the service: dictionaries out, streamed or whole."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from ..chat.conversation import Conversation
from ..errors import RequestError
from ..request import Acceptance, Request, Update
from ..text.tools import Arguments, CallCut, CallStarted, Content
from ..text.turn import Reasoning, TurnEvent, TurnText
from ..transfer.params import RemoteDecode
from .protocol import ChatRequest
from .scores import chat_logprob, prompt_logprobs
from .service import Service, new_id
from .sse import DONE, event


def usage(
    prompt: int, completion: int, cached: int, drafts: Acceptance, reasoning: int | None = None, restored: int = 0
) -> dict[str, Any]:
    """OpenAI's usage object; restored_turns: turns of the history that were put back as generated."""
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    details = ({} if reasoning is None else {"reasoning_tokens": reasoning}) | drafts.prediction_tokens()
    if details:
        found["completion_tokens_details"] = details
    if restored:
        found["prompt_tokens_details"]["restored_turns"] = restored
    return found


class Chat:
    """One chat completion."""

    def __init__(self, service: Service, body: ChatRequest):
        """Raises RequestError for what cannot be asked."""
        self._transfer = service.transfer(body.kv_transfer_params, body.stream)
        if isinstance(self._transfer, RemoteDecode):
            body = body.prefilling()
        self._service, self._body = service, body
        self.id = body.request_id or new_id("chatcmpl")
        self._created = int(time.time())
        kwargs = service.frontend.template.effort_kwargs(body.reasoning_effort) | (body.chat_template_kwargs or {})
        enable_thinking = kwargs.pop("enable_thinking", body.enable_thinking)
        if body.reasoning_effort == "none" and enable_thinking is None:
            enable_thinking = False
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true; it is false.")
        chat = Conversation(
            messages=body.messages,
            tools=body.tools or None,
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls,
            response_format=body.response_format.asked() if body.response_format else None,
            structured_outputs=body.structure(),
            enable_thinking=enable_thinking,
            template_kwargs=kwargs,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
        )
        sampling = body.sampling(logprobs=logprobs, max_tokens=body.max_completion_tokens or body.max_tokens)
        self._reader = service.prepare(self.id, chat, sampling, body.cache_salt, body.priority)

    @property
    def _request(self) -> Request:
        return self._reader.turn.request

    def _updates(self) -> AsyncIterator[tuple[Update, list[TurnEvent]]]:
        return self._service.converse(self._reader, self._body.timeout, self._transfer)

    def _usage(self) -> dict[str, Any]:
        reader = self._reader
        prompt, restored = len(self._request.prompt), reader.turn.restored
        return usage(prompt, reader.generated, reader.cached, reader.drafts, reader.reasoning_tokens, restored)

    def _finish(self, update: Update) -> str:
        called = self._reader.parsers[update.index].called and update.finish_reason == "stop"
        return "tool_calls" if called else update.finish_reason

    async def whole(self) -> dict[str, Any]:
        """The response object. Raises as `Service.run` does."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": None, "reasoning_content": None},
                "logprobs": {"content": []} if self._body.logprobs else None,
                "finish_reason": None,
            }
            for i in range(self._body.n)
        ]
        turns = [TurnText() for _ in choices]
        prompt_scores = None
        async for update, events in self._updates():
            choice = choices[update.index]
            turns[update.index].add(events)
            if update.prompt_scores is not None:
                prompt_scores = prompt_logprobs(self._service.frontend.tokenizer, update.prompt_scores)
            if choice["logprobs"]:
                choice["logprobs"]["content"] += [
                    chat_logprob(self._service.frontend.tokenizer, scores) for scores in update.scores
                ]
            if update.finish_reason:
                choice["finish_reason"], choice["stop_reason"] = self._finish(update), update.stop_reason
        for choice, turn in zip(choices, turns, strict=True):
            message = choice["message"]
            message["content"], message["reasoning_content"] = turn.content or None, turn.reasoning or None
            if turn.calls:
                message["tool_calls"] = [_call(name, arguments) for name, arguments in turn.calls]
        if self._body.return_token_ids:
            for choice, parser in zip(choices, self._reader.parsers, strict=True):
                choice["token_ids"] = parser.ids
        return self._frame("chat.completion", choices) | {
            "usage": self._usage(),
            **self._service.transferred(self._transfer),
            **({"prompt_logprobs": prompt_scores} if prompt_scores else {}),
            **({"prompt_token_ids": list(self._request.prompt)} if self._body.return_token_ids else {}),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: chunks, the usage where it is asked for, and the end."""
        options = self._body.stream_options
        continuous = bool(options and options.continuous_usage_stats)

        def chunk(index: int, delta: dict, finish: str | None = None, **more) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish} | more
            frame = self._frame("chat.completion.chunk", [choice])
            return event(frame | ({"usage": self._usage()} if continuous else {}))

        started: set[int] = set()
        async with aclosing(self._updates()) as updates:
            async for update, events in updates:
                i, chunks = update.index, []
                if i not in started:
                    started.add(i)
                    first = {"prompt_token_ids": list(self._request.prompt)} if self._body.return_token_ids else {}
                    chunks.append(chunk(i, {"role": "assistant", "content": ""}, **first))
                extra: dict[str, Any] = {}
                if self._body.logprobs and update.scores:
                    extra["logprobs"] = {
                        "content": [chat_logprob(self._service.frontend.tokenizer, scores) for scores in update.scores]
                    }
                if self._body.return_token_ids:
                    extra["token_ids"] = update.ids
                deltas = [delta for found in events if (delta := _delta(found))]
                if not deltas and extra:
                    deltas = [{}]
                for delta in deltas:
                    chunks.append(chunk(i, delta, **extra))
                    extra = {}
                if update.finish_reason:
                    chunks.append(chunk(i, {}, self._finish(update), stop_reason=update.stop_reason))
                if chunks:
                    yield b"".join(chunks)
        if options and options.include_usage:
            yield event(self._frame("chat.completion.chunk", []) | {"usage": self._usage()})
        yield DONE

    def _frame(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        model = self._service.config.model_name
        return {"id": self.id, "object": kind, "created": self._created, "model": model, "choices": choices}


def _delta(found: TurnEvent) -> dict[str, Any] | None:
    match found:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case CallStarted(index, name):
            return {"tool_calls": [{"index": index} | _call(name, "")]}
        case Arguments(index, piece):
            return {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
        case CallCut(_, text):
            return {"content": text}
    return None


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}
