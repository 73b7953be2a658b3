"""What the endpoints share: admission under load, deadlines, naming, timing. No HTTP here."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from ..chat.conversation import Conversation
from ..chat.formats import Format
from ..chat.turn import PreparedTurn, TurnReader, Turns
from ..errors import CorruptedError, EngineError, RequestError, TokenSpeedError
from ..request import Request, SamplingParams, Update
from ..text.frontend import Frontend
from ..text.turn import TurnEvent
from ..transfer.params import Address, RemoteDecode, Transfer, answer, parse
from .background import Background
from .client import EngineClient
from .formats import Compiled, Formats
from .messages import Submit
from .metrics import Metrics
from .names import Names
from .response_store import ResponseStore

# The key of the request that is being answered, None where none is needed. It follows a request through its tasks and
# threads, so that no endpoint can forget to say whose a name is.
caller: ContextVar[str | None] = ContextVar("caller", default=None)


class Overloaded(TokenSpeedError):
    """The queue is full. retry_after: seconds after which it may not be."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(TokenSpeedError):
    """A request took longer than its deadline."""


class ContextOverflow(RequestError):
    """A prompt and its answer do not fit. prompt, answer, room: tokens; answer: as asked for, 0 where any would do."""

    def __init__(self, prompt: int, answer: int, room: int):
        self.prompt, self.answer, self.room = prompt, answer, room
        parts = f"{prompt} in the messages, {answer} in the completion" if answer else f"{prompt} in the messages"
        super().__init__(  # clients look for the first words, and for the numbers in this order
            f"This model's maximum context length is {room} tokens. However, you requested {prompt + answer} tokens "
            f"({parts}). Please reduce the length of the messages{' or completion' if answer else ''}."
        )

    def as_anthropic(self) -> str:
        """The same in the words that Anthropic's clients shrink a request by."""
        if self.answer and self.prompt < self.room:
            return (
                f"input length and `max_tokens` exceed context limit: {self.prompt} + {self.answer} > {self.room}, "
                "decrease input length or `max_tokens` and try again"
            )
        return f"prompt is too long: {self.prompt} tokens > {self.room - 1} maximum"


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """model_name: as clients see it; max_requests: in flight at once, beyond them 429; timeout: seconds a request may
    take unless it asks for less, None for no limit; exact_history: known turns come back as they were generated;
    kv_events: where the engine publishes cache events."""

    model_name: str
    max_requests: int = 512
    timeout: float | None = None
    exact_history: bool = True
    kv_events: str | None = None


class Service:
    """The engine behind the endpoints."""

    def __init__(self, frontend: Frontend, engine: EngineClient, config: ServiceConfig):
        self.frontend, self.engine, self.config = frontend, engine, config
        self.metrics = Metrics()
        self.turns = Turns(frontend, config.exact_history)
        self.responses = ResponseStore()
        self.formats, self.names, self.background = Formats(frontend.directory), Names(), Background()
        self.started = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._compiling: set[str] = set()  # requests that the engine does not know yet

    @property
    def room(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self.engine.ready.max_model_len

    @property
    def peer(self) -> Address | None:
        """This engine among others; None where it takes no part in transfers."""
        return self.engine.ready.transfer

    def transfer(self, given: dict[str, Any] | None, stream: bool) -> Transfer | None:
        """What `kv_transfer_params` ask for. Raises RequestError as `parse`, and for a prefill that is to be
        streamed."""
        transfer = parse(given, self.peer)
        if stream and isinstance(transfer, RemoteDecode):
            raise RequestError("stream is true, but with do_remote_decode there is nothing to stream; leave it out.")
        return transfer

    def transferred(self, transfer: Transfer | None) -> dict[str, Any]:
        """What the response of a prefill has for the decoder's request; nothing for another one's."""
        return {"kv_transfer_params": answer(transfer, self.peer)} if isinstance(transfer, RemoteDecode) else {}

    def name_space(self, salt: str | None = None) -> str:
        """The caller's. Prompts of different keys or salts never share memory."""
        key = caller.get()
        if not key and not salt:
            return ""
        return hashlib.blake2b(f"{key or ''}\0{salt or ''}".encode(), digest_size=12).hexdigest()

    def admit(self, requests: int = 1) -> None:
        """Count requests as in flight, before anything is computed for them; whoever calls owes a `release`.

        Raises Overloaded where that many more are too many.
        """
        if self.draining:
            raise Overloaded("the server is shutting down; use another one.", 5)
        if self.in_flight + requests > self.config.max_requests:
            raise Overloaded(
                f"{self.in_flight} requests are in flight of at most {self.config.max_requests}; try again later.",
                1,
            )
        self.in_flight += requests

    def release(self, requests: int = 1) -> None:
        """These requests are answered, or given up."""
        self.in_flight -= requests

    async def run(
        self,
        request: Request,
        format: Format | None = None,
        timeout: float | None = None,
        part: int = 0,
        transfer: Transfer | None = None,
    ) -> AsyncIterator[Update]:
        """The updates of a request, timed and within its deadline. Leaving early aborts it.

        request.id is a name inside the caller's key, to abort it by; the engine knows it by an id of its own. part:
        which one of several requests of that name it is; transfer: where it is prefilled or decoded, if elsewhere.

        Raises what the engine refuses the request with, RequestError for a name that is in use, DeadlineExceeded, or
        EngineError.
        """
        if isinstance(transfer, RemoteDecode):
            format = None  # nothing is generated here
        elif self.peer is not None and self.peer.role == "prefill":
            raise RequestError("this server's role is 'prefill': it takes requests with do_remote_decode alone.")
        limit = min(filter(None, (timeout, self.config.timeout)), default=None)
        start = last = time.monotonic()
        outcome, first, key = "aborted", True, caller.get()
        try:
            with self.names.used(key, request.id, part) as id:
                compiled = Compiled(None, 0)
                if format is not None:
                    self._compiling.add(id)
                    try:
                        async with asyncio.timeout(limit):
                            compiled = await self.formats.compile(key, request.name_space, format)
                        aborted = id not in self._compiling
                    finally:
                        self._compiling.discard(id)
                    if aborted:
                        outcome = "abort"
                        for child in range(request.params.n):
                            yield Update(id, child, finish_reason=outcome)
                        return
                submit = Submit(replace(request, id=id), compiled.spec, compiled.size, transfer)
                left = None if limit is None else max(limit - (time.monotonic() - start), 0.001)
                async with aclosing(self.engine.generate(submit, left)) as updates:
                    async for update in updates:
                        now = time.monotonic()
                        if update.ids:
                            (self.metrics.first_token if first else self.metrics.inter_token).observe(now - last)
                            self.metrics.generated.inc(len(update.ids))
                            first, last = False, now
                        outcome = update.finish_reason or outcome
                        yield update
            self.metrics.request.observe(time.monotonic() - start)
        except TimeoutError:
            outcome = "timeout"
            raise DeadlineExceeded(f"the request took longer than its deadline of {limit:g} s.") from None
        except (CorruptedError, EngineError):
            outcome = "error"
            raise
        except TokenSpeedError:
            outcome = "refused"
            raise
        finally:
            self.metrics.requests.labels(outcome).inc()

    async def abort(self, name: str) -> bool:
        """Ends the caller's requests of that name. False where none runs."""
        ids = self.names.ids(caller.get(), name)
        compiling = self._compiling.intersection(ids)
        self._compiling -= compiling
        found = [await self.engine.abort(id) for id in ids]
        return any(found) or bool(compiling)

    def check_room(self, request: Request) -> None:
        """Raises ContextOverflow where the prompt and the answer asked for do not fit."""
        prompt, answer = len(request.prompt), request.params.max_tokens or 0
        if prompt + max(answer, 1) > self.room:
            raise ContextOverflow(prompt, answer, self.room)

    def prepare(
        self, id: str, chat: Conversation, sampling: dict[str, Any], salt: str | None = None, priority: int = 0
    ) -> TurnReader:
        """A conversation ready for `converse`. sampling: fields of SamplingParams that were given; salt: as
        `name_space`. Raises RequestError for what cannot be asked."""
        params = self.params(sampling)
        turn = self.turns.prepare(id, chat, params, self.name_space(salt), priority)
        self.check_room(turn.request)
        return TurnReader(self.turns, turn)

    def params(self, sampling: dict[str, Any]) -> SamplingParams:
        """The checkpoint's values, and over them those that were given; without max_tokens, as many as fit."""
        bound = sampling.get("max_tokens")
        params = self.frontend.sampling_params(**sampling | {"max_tokens": bound or self.room})
        return params if bound else replace(params, max_tokens=None)

    async def converse(
        self, reader: TurnReader, timeout: float | None = None, transfer: Transfer | None = None
    ) -> AsyncIterator[tuple[Update, list[TurnEvent]]]:
        """The updates of a conversation's turn, each with what it adds. As `run`."""
        turn: PreparedTurn = reader.turn
        self.metrics.restored.inc(turn.restored)
        async with aclosing(self.run(turn.request, turn.format, timeout, transfer=transfer)) as updates:
            async for update in updates:
                yield update, reader.take(update)

    async def stats(self, timeout: float) -> dict[str, float]:
        """The engine's numbers (`Engine.stats`) and this process's. Raises EngineError as `EngineClient.stats`."""
        own = {"requests_in_flight": self.in_flight, "server_tasks": len(asyncio.all_tasks())}
        return await self.engine.stats(timeout) | own


def new_id(prefix: str, mark: str = "-") -> str:
    return f"{prefix}{mark}{uuid.uuid4().hex}"
