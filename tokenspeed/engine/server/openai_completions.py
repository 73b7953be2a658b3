"""OpenAI's text completions over the service: dictionaries out, streamed or whole."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from ..chat.formats import Format
from ..errors import RequestError
from ..request import Acceptance, Request, TokenScores, Update
from ..transfer.params import RemoteDecode
from .openai_chat import usage
from .protocol import CompletionRequest
from .scores import completion_logprobs, prompt_logprobs
from .service import Service, new_id
from .sse import DONE, event


class Completion:
    """One text completion: of one prompt or of several."""

    def __init__(self, service: Service, body: CompletionRequest):
        """Raises RequestError for what cannot be asked."""
        self._transfer = service.transfer(body.kv_transfer_params, body.stream)
        if isinstance(self._transfer, RemoteDecode):
            body = body.prefilling()
        self._service, self._body = service, body
        self.id = body.request_id or new_id("cmpl")
        self._created = int(time.time())
        if self._transfer is not None and len(body.prompts) > 1:
            raise RequestError(f"kv_transfer_params are those of one prompt; {len(body.prompts)} were given.")
        asked = body.response_format.asked() if body.response_format else None
        self._format = Format.of_text(asked, body.structure())
        self.requests: list[Request] = []
        for prompt in body.prompts:
            ids = service.frontend.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            if body.truncate_prompt_tokens is not None:
                ids = ids[-body.truncate_prompt_tokens :]
            wants = body.logprobs if body.echo and body.logprobs is not None else body.prompt_logprobs
            # None are asked for: the token that the engine gives all the same is dropped.
            max_tokens = 1 if self._scores_only else body.max_tokens
            sampling = body.sampling(logprobs=body.logprobs, prompt_logprobs=wants, max_tokens=max_tokens)
            request = service.frontend.request(
                self.id,
                ids,
                service.params(sampling),
                name_space=service.name_space(body.cache_salt),
                priority=body.priority,
            )
            service.check_room(request)
            self.requests.append(request)
        self._cached, self._generated, self._drafts = 0, 0, Acceptance()
        self._prompt_scores: dict[int, list[TokenScores]] = {}  # by the prompt's number
        self._told: dict[int, int] = {}  # characters of a choice's tokens, of the choices that have begun

    @property
    def _scores_only(self) -> bool:
        return self._body.max_tokens == 0

    async def whole(self) -> dict[str, Any]:
        """The response object. Raises as `Service.run` does."""
        joined = [[Update(self.id, i) for i in range(self._body.n)] for _ in self.requests]
        async for number, update in self._updates():
            known = joined[number][update.index]
            known.ids += update.ids
            known.text += update.text
            known.scores += update.scores
            known.finish_reason, known.stop_reason = update.finish_reason, update.stop_reason
        choices = [self._choice(number, update) for number, updates in enumerate(joined) for update in updates]
        return self._frame(choices) | {"usage": self._usage()} | self._service.transferred(self._transfer)

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: chunks of all prompts as they come, the usage where it is asked for, and the end."""
        options = self._body.stream_options
        async with contextlib.aclosing(self._updates()) as updates:
            async for number, update in updates:
                choice = self._choice(number, update)
                frame = self._frame([choice])
                if options and options.continuous_usage_stats:
                    frame["usage"] = self._usage()
                if any(value for name, value in choice.items() if name != "index"):
                    yield event(frame)
        if options and options.include_usage:
            yield event(self._frame([]) | {"usage": self._usage()})
        yield DONE

    def _choice(self, number: int, update: Update) -> dict[str, Any]:
        """What an update adds to its choice. With a choice's first one comes what is asked for of its prompt."""
        body, tokenizer, prompt = self._body, self._service.frontend.tokenizer, self.requests[number].prompt
        index, prompt_scores = number * body.n + update.index, self._prompt_scores.get(number)
        first = index not in self._told
        text, ids, scores = update.text, update.ids, update.scores
        if body.echo and first:
            text = tokenizer.decode(list(prompt)) + text
            ids, scores = [*prompt, *ids], [None, *(prompt_scores or ()), *scores]
        at, logprobs = self._told.setdefault(index, 0), None
        if body.logprobs is not None and scores:
            logprobs = completion_logprobs(tokenizer, ids, scores, at)
            self._told[index] = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": update.finish_reason}
        choice["stop_reason"] = update.stop_reason
        if body.return_token_ids:
            choice["token_ids"] = update.ids
        if first and body.return_token_ids:
            choice["prompt_token_ids"] = list(prompt)
        if first and prompt_scores is not None and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(tokenizer, prompt_scores)
        return choice

    async def _updates(self) -> AsyncIterator[tuple[int, Update]]:
        """The updates of every prompt, each with the prompt's number. The prompts run side by side."""
        if len(self.requests) == 1:
            async with contextlib.aclosing(self._run(0)) as updates:
                async for update in updates:
                    yield 0, update
            return
        news: asyncio.Queue[tuple[int, Update] | asyncio.Task] = asyncio.Queue()

        async def pump(number: int) -> None:
            async for update in self._run(number):
                news.put_nowait((number, update))

        tasks = [asyncio.create_task(pump(number)) for number in range(len(self.requests))]
        for task in tasks:
            task.add_done_callback(news.put_nowait)
        try:
            running = len(tasks)
            while running:
                what = await news.get()
                if isinstance(what, asyncio.Task):
                    what.result()  # raises what ended it; the others are ended below
                    running -= 1
                else:
                    yield what
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, number: int) -> AsyncIterator[Update]:
        run = self._service.run(self.requests[number], self._format, self._body.timeout, number, self._transfer)
        async with contextlib.aclosing(run) as updates:
            async for update in updates:
                if self._scores_only:
                    update.ids, update.text, update.scores = [], "", []
                if update.prompt_scores is not None:  # which come with the first choice of a prompt
                    self._prompt_scores[number] = update.prompt_scores
                self._generated += len(update.ids)
                self._cached += update.reuse.cached_tokens if update.reuse else 0
                self._drafts.add(update.metrics and update.metrics.drafts)
                yield update

    def _usage(self) -> dict[str, Any]:
        return usage(sum(len(request.prompt) for request in self.requests), self._generated, self._cached, self._drafts)

    def _frame(self, choices: list[dict]) -> dict[str, Any]:
        model = self._service.config.model_name
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": model,
            "choices": choices,
        }
