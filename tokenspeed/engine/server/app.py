"""The HTTP surface: routes, keys, limits, errors. What a route does stands in the modules it calls."""

import logging
import reprlib
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from ... import __version__
from ..chat.conversation import Conversation
from ..config import PAGE_TOKENS
from ..errors import CapacityError, EngineError, RequestError, TokenSpeedError, TransferError
from .anthropic import THREAD_UNSUPPORTED, Message, ThreadUnsupported, count_tokens
from .bodies import JsonRoute
from .gate import Gate
from .http import HeadRequests, allow_origins, error_form
from .models import UnknownModel, model_card, model_list
from .openai_chat import Chat
from .openai_completions import Completion
from .openai_responses import Response as ModelResponse
from .page import page
from .protocol import (
    AbortRequest,
    AnthropicPrompt,
    AnthropicRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from .response_store import UnknownResponse
from .service import ContextOverflow, DeadlineExceeded, Overloaded, Service, caller
from .shares import Shares
from .sse import EventStream, event, json_response, while_connected

_LONG_TEXT = 20_000  # characters from which rendering and tokenising leave the event loop to others
_PING_SECONDS = 10.0
_LAST_WORDS_SECONDS = 2.0  # in which a stream that ran into its deadline says so

log = logging.getLogger("tokenspeed.server")


def create_app(
    service: Service,
    max_body_bytes: int,
    api_keys: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
) -> FastAPI:
    """The application over a running service. names: of this machine, where no key is needed;
    origins: of pages that may use it from a browser."""
    # No /docs: those pages would load scripts from elsewhere. The schema is at /openapi.json.
    about = {"title": "TokenSpeed", "description": "OpenAI-compatible inference for the Qwen3.5 family."}
    app = FastAPI(**about, version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.decoding = Shares(1)
    app.add_middleware(Gate, keys=api_keys, max_bytes=max_body_bytes, names=names, origins=origins)
    app.add_middleware(HeadRequests)
    allow_origins(app, origins)
    _errors(app)

    async def answer(
        request: Request, make: Callable[[], Any], stream: bool, count: int = 1, long: bool = False
    ) -> Response:
        """Prepare a job where it disturbs nobody, then stream it or wait for it while the client is there. long: its
        text may be longer than the body."""
        service.admit(count)
        streaming = False
        try:
            job = await while_connected(request.receive, off_event_loop(request, make, long))
            if not stream:
                return json_response(await while_connected(request.receive, job.whole()))
            pieces = job.stream()
            # Until the first piece is there, a refusal is still a status of its own.
            first = await while_connected(request.receive, anext(pieces))
            streaming = True
            limit = service.config.timeout
            seconds = None if limit is None else limit + _LAST_WORDS_SECONDS
            return EventStream(first, pieces, _last_event, lambda: service.release(count), seconds)
        finally:
            if not streaming:
                service.release(count)

    async def off_event_loop(request: Request, work: Callable[[], Any], long: bool = False) -> Any:
        """The result of `work`. Long texts are rendered and tokenised in a thread, short ones at once."""
        announced = request.headers.get("content-length")
        short = not long and announced is not None and int(announced) <= _LONG_TEXT
        return work() if short else await service.background.run(caller.get(), work)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        return await answer(request, lambda: Chat(service, body), body.stream)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        return await answer(request, lambda: Completion(service, body), body.stream, len(body.prompts))

    @app.post("/v1/messages")
    async def messages(body: AnthropicRequest, request: Request):
        return await answer(request, lambda: Message(service, body), body.stream)

    @app.post("/v1/messages/count_tokens")
    async def message_tokens(body: AnthropicPrompt, request: Request):
        return await while_connected(request.receive, off_event_loop(request, lambda: count_tokens(service, body)))

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request):
        return await answer(request, lambda: ModelResponse(service, body), body.stream, long=body.resumes)

    @app.get("/v1/responses/{id}")
    async def response(id: str):
        return json_response(service.responses.get(service.name_space(), id).frame)

    @app.delete("/v1/responses/{id}")
    async def forget_response(id: str):
        service.responses.forget(service.name_space(), id)
        return {"id": id, "object": "response", "deleted": True}

    @app.get("/v1/models")
    async def models():
        return model_list(service)

    @app.get("/v1/models/{id:path}")
    async def model(id: str):
        return model_card(service, id)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request):
        tokenizer = service.frontend.tokenizer

        def work() -> Response:
            if body.messages is None:
                ids = tokenizer.encode(body.prompt)
            else:
                options = {"add_generation_prompt": body.add_generation_prompt}
                ids = service.turns.encode(Conversation(body.messages, body.tools, **options)).ids
            found = {"tokens": ids, "count": len(ids), "max_model_len": service.room}
            if body.return_token_strs:
                found["token_strs"] = [tokenizer.decode([id], skip_special_tokens=False) for id in ids]
            return json_response(found)

        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages.")
        return await while_connected(request.receive, off_event_loop(request, work))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request):
        vocab = service.frontend.config.vocab

        def work() -> Response:
            for position, id in enumerate(body.tokens):
                if not 0 <= id < vocab:
                    raise RequestError(f"token id {id} at position {position} is outside the vocabulary of {vocab}.")
            return json_response({"prompt": service.frontend.tokenizer.decode_long(body.tokens)})

        return await while_connected(request.receive, off_event_loop(request, work))

    @app.post("/v1/abort")
    async def abort(body: AbortRequest):
        return {"aborted": await service.abort(body.request_id)}

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache():
        await service.engine.clear_cache()
        service.turns.clear()
        return {"reset": True}

    front = page()

    @app.get("/", include_in_schema=False)
    async def index():
        return front

    @app.get("/health")
    async def health():
        await service.engine.stats(_PING_SECONDS)
        return {"status": "ok"}

    @app.get("/kv_transfer")
    async def kv_transfer():
        """For routers: this engine's role and address among its peers, and where it publishes cache events."""
        peer = service.peer
        own = {"role": "both"} if peer is None else {"role": peer.role}
        where = None if peer is None else {"engine_id": peer.engine, "host": peer.host, "port": peer.port}
        return own | {"transfer": where, "kv_events": service.config.kv_events, "page_tokens": PAGE_TOKENS}

    @app.get("/metrics")
    async def metrics():
        text = service.metrics.render(await service.stats(_PING_SECONDS))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _last_event(error: Exception) -> bytes:
    """How a stream that fails on its way ends. The event's name is for Anthropic's clients."""
    if not isinstance(error, TokenSpeedError):
        log.error("unexpected error", exc_info=error)
    return event(_told(error)[1], "error")


def _brief(value: Any) -> str:
    """The beginning of a value as Python writes it, without writing all of it."""
    return reprlib.repr(value[:100] if isinstance(value, bytes) else value)


# Status, type, and what else clients tell an error by; as the nearest class that is here.
_FORMS: dict[type[TokenSpeedError], tuple[int, str, dict[str, Any]]] = {
    TokenSpeedError: (500, "internal_error", {}),
    RequestError: (400, "invalid_request_error", {}),
    ContextOverflow: (400, "invalid_request_error", {"code": "context_length_exceeded", "param": "messages"}),
    UnknownResponse: (
        400,
        "invalid_request_error",
        {"code": "previous_response_not_found", "param": "previous_response_id"},
    ),
    ThreadUnsupported: (400, "invalid_request_error", {"details": THREAD_UNSUPPORTED}),
    UnknownModel: (404, "not_found_error", {"code": "model_not_found", "param": "model"}),
    CapacityError: (400, "invalid_request_error", {}),
    TransferError: (409, "invalid_request_error", {}),
    Overloaded: (429, "rate_limit_error", {}),
    DeadlineExceeded: (504, "timeout_error", {}),
    EngineError: (503, "service_unavailable_error", {}),
}


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    if not isinstance(error, TokenSpeedError):
        return 500, error_form(500, "internal_error", "internal error")
    status, kind, more = next(_FORMS[found] for found in type(error).__mro__ if found in _FORMS)
    return status, error_form(status, kind, str(error), **more)


def _errors(app: FastAPI) -> None:
    """Every error in one form."""

    def refused(message: str, param: str | None = None) -> JSONResponse:
        return JSONResponse(error_form(400, "invalid_request_error", message, param=param), 400)

    @app.exception_handler(TokenSpeedError)
    async def ours(request: Request, error: TokenSpeedError):
        status, body = _told(error)
        if isinstance(error, ContextOverflow) and request.url.path.startswith("/v1/messages"):
            body["error"]["message"] = error.as_anthropic()
        headers = {"retry-after": str(error.retry_after)} if isinstance(error, Overloaded) else None
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        found = error.errors()[0]
        if len(found["loc"]) == 1 and isinstance(found.get("input"), bytes):  # which FastAPI took for no JSON
            given = request.headers.get("content-type", "")
            return refused(f"Content-Type is {given!r:.80}; it must be application/json")
        if found["type"] == "json_invalid":
            return refused(f"the body is not JSON: {found['ctx']['error']}")
        where = ".".join(str(part) for part in found["loc"][1:]) or "the body"
        given = _brief(found.get("input"))
        return refused(f"{where}: {found['msg']} (given: {given[:100]}{'...' if len(given) > 100 else ''})", where)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException):
        kind, message = "invalid_request_error", str(error.detail)
        if error.status_code in (404, 405):
            kind, message = "not_found_error", f"this server has no {request.method} {_brief(request.url.path)}"
        body = error_form(error.status_code, kind, message)
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RecursionError)
    async def nested(request: Request, error: RecursionError):  # nothing but a body is nested
        return refused("the body is nested too deeply")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception):
        log.error("unexpected error", exc_info=error)
        status, body = _told(error)
        return JSONResponse(body, status)
