"""HTTP: requests in, to a backend and back, byte by byte as they come."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import TokenSpeedError
from ..server.gate import MAX_BYTES, Gate
from ..server.http import error_form
from ..server.sse import disconnected, event
from .backends import DECODE, PREFILL, REPLICA, Backend, Backends
from .policy import Choice, Policy, split
from .prompts import GENERATING, MESSAGES, RESPONSES, ids, of, tokenize_body, tokens_given

_KEPT_FROM_BACKENDS = {b"host", b"content-length", b"connection", b"keep-alive", b"te", b"transfer-encoding"}
_KEPT_FROM_BACKENDS |= {b"upgrade", b"origin", b"expect", b"proxy-authorization", b"trailer"}
_KEPT_FROM_CLIENTS = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"date", b"server"}
_LEAST_TOKENIZED = 1024  # bytes of a body from which it pays to know its tokens
_TOKENIZE_SECONDS = 10.0
_RESPONSE_ID = re.compile(rb'"id":\s*"(resp_[0-9a-zA-Z]+)"')

_NOBODY = "no backend is there that could answer; they are asked for again all the time."
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger("tokenspeed.router")


class Unroutable(TokenSpeedError):
    """A request that no backend answers. status: as HTTP has it; kind: as OpenAI's clients read it."""

    def __init__(self, message: str, status: int = 503, kind: str = "service_unavailable_error"):
        super().__init__(message)
        self.status, self.kind = status, kind

    def body(self) -> dict[str, Any]:
        return error_form(self.status, self.kind, str(self))


class Router:
    """client: without a timeout for what takes long by nature."""

    def __init__(self, backends: Backends, policy: Policy, client: httpx.AsyncClient):
        self._backends, self._policy, self._client = backends, policy, client

    def app(self, keys: tuple[str, ...], names: tuple[str, ...], max_body_bytes: int = MAX_BYTES) -> Starlette:
        """The application. keys: of clients; names: of this machine, where no key is needed."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette):
            await asyncio.gather(*map(self._backends.check, self._backends.all))
            watching = asyncio.create_task(self._backends.watch())
            yield
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self._client.aclose()

        routes = [
            *(Route(path, self.generate, methods=["POST"]) for path in GENERATING),
            Route("/v1/abort", self.tell_all, methods=["POST"]),
            Route("/reset_prefix_cache", self.tell_all, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/{path:path}", self.pass_on, methods=["GET", "POST", "DELETE"]),
        ]
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={Unroutable: _refused})
        app.add_middleware(Gate, keys=keys, max_bytes=max_body_bytes, names=names)
        return app

    # ---- routes

    async def generate(self, request: Request) -> Response:
        """To who has most of it, and has least to do."""
        path, data = request.url.path, await request.body()
        try:
            body = msgspec.json.decode(data)
            if not isinstance(body, dict):
                raise ValueError("it is no object")
        except (ValueError, RecursionError) as error:
            raise Unroutable(f"the body is not JSON: {error}", 400, "invalid_request_error") from None
        headers = _for_backend(request)
        prompt = of(path, body, len(data), await self._tokens(path, body, len(data), headers))
        known = prompt.tokens is not None or path in (MESSAGES, RESPONSES)
        transferable = known and not prompt.resumes and "kv_transfer_params" not in body
        tried: set[Backend] = set()
        refusal: Response | None = None
        while choice := self._policy.choose(prompt, transferable, frozenset(tried)):
            tried.add(choice.backend)
            answer = await self._answer(request, headers, body, data, choice)
            if answer is not None and answer.status_code not in (429, 503):
                return answer
            if answer is not None:  # it has too much to do, or is about to end: somebody else may not
                refusal = await answer.whole()
        if refusal is None:
            raise Unroutable(_NOBODY)
        return refusal

    async def pass_on(self, request: Request) -> Response:
        """Anything else: to whoever is there, or who has the response in question."""
        data, headers = await request.body(), _for_backend(request)
        home = self._policy.home_of(request.url.path.removeprefix(RESPONSES + "/"))
        alive = self._backends.alive(REPLICA, DECODE) or self._backends.alive(PREFILL)
        for backend in [home] if home in alive else alive:
            if (answer := await self._answer(request, headers, None, data, Choice(backend, 0))) is not None:
                return answer
        raise Unroutable(_NOBODY)

    async def tell_all(self, request: Request) -> Response:
        """What concerns whoever it concerns. The answers by backend."""
        data, headers, path = await request.body(), _for_backend(request), request.url.path
        alive = self._backends.alive(REPLICA, PREFILL, DECODE)
        calls = [self._client.post(backend.url + path, content=data, headers=headers, timeout=30) for backend in alive]
        found: dict[str, Any] = {}
        backends: dict[str, Any] = {}
        for backend, answer in zip(alive, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(answer, httpx.Response) and answer.status_code == 200:
                told = backends[backend.url] = _object(answer)
                for name, value in told.items():
                    found[name] = bool(found.get(name)) or bool(value)
            else:
                backends[backend.url] = {"error": str(answer)}
        return JSONResponse(found | {"backends": backends})

    async def health(self, request: Request) -> Response:
        """200 where somebody can answer."""
        states = {backend.url: "ok" if backend.alive else "lost" for backend in self._backends.all}
        there = bool(self._backends.alive(REPLICA, DECODE))
        return JSONResponse({"status": "ok" if there else "no backend", "backends": states}, 200 if there else 503)

    async def metrics(self, request: Request) -> Response:
        """Gauges of each backend, as Prometheus reads them."""
        lines = []
        for name, help in (
            ("up", "whether it answers"),
            ("requests_in_flight", "requests that it answers for this router"),
            ("work_tokens", "tokens that it is taken to have to compute for them"),
            ("known_blocks", "blocks that its cache holds, as its events say"),
        ):
            lines += [f"# HELP tokenspeed_router_{name} {help}", f"# TYPE tokenspeed_router_{name} gauge"]
            for b in self._backends.all:
                value = {"up": int(b.alive), "requests_in_flight": b.in_flight, "work_tokens": b.work}
                label = f'{{backend="{b.url}",kind="{b.kind}"}}'
                lines.append(f"tokenspeed_router_{name}{label} {value.get(name, len(b.cached))}")
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")

    # ---- one request

    async def _tokens(self, path: str, body: dict, length: int, headers: Headers) -> list[int] | None:
        """Of its prompt, where it is worth asking and somebody says."""
        if (given := tokens_given(path, body)) is not None:
            return given
        alive, asked = self._backends.alive(REPLICA, DECODE, PREFILL), tokenize_body(path, body)
        if asked is None or length < _LEAST_TOKENIZED or len(alive) < 2:
            return None
        backend = min(alive, key=lambda b: b.in_flight)
        try:
            url = f"{backend.url}/tokenize"
            answer = await self._client.post(url, json=asked, headers=headers, timeout=_TOKENIZE_SECONDS)
            return ids(_object(answer).get("tokens"))
        except httpx.HTTPError:
            return None

    async def _answer(
        self, request: Request, headers: Headers, body: dict | None, data: bytes, choice: Choice
    ) -> "_Passing | None":
        """From the backend chosen; None where it is lost before it said anything. Who prefills for it works meanwhile,
        and where that fails the backend does all of it."""
        stack = AsyncExitStack()
        answered = stack.enter_context(choice.backend.doing(choice.tokens))
        response = None
        try:
            response = await self._ask(request, headers, body, data, choice, stack)
        except httpx.LocalProtocolError as error:  # which nobody could be sent
            raise Unroutable(f"the request cannot be passed on: {error}", 400, "invalid_request_error") from None
        except httpx.TransportError as error:
            await self._failed(choice.backend, error)
        finally:
            if response is None:
                await stack.aclose()
        if response is None:
            return None
        stack.push_async_callback(response.aclose)
        kept = [(name, value) for name, value in response.headers.raw if name.lower() not in _KEPT_FROM_CLIENTS]
        pieces = self._pieces(response, choice.backend, request.url.path, answered, stack)
        return _Passing(pieces, response.status_code, kept, stack)

    async def _ask(
        self, request: Request, headers: Headers, body: dict | None, data: bytes, choice: Choice, stack: AsyncExitStack
    ) -> httpx.Response | None:
        """The head of its answer; None where the backend gives no sign of life any more. stack: ends what goes on
        beside the answer."""
        prefill = None
        if choice.prefill is not None:
            first, second = split(request.url.path, body, choice.prefill.about.transfer)
            prefill = asyncio.create_task(self._prefill(request.url.path, headers, first, choice))
            stack.callback(prefill.cancel)
        query = request.scope["query_string"]
        target = choice.backend.url.encode() + request.scope["raw_path"] + (b"?" + query if query else b"")

        def send(content: bytes) -> asyncio.Task[httpx.Response]:
            url = target.decode("latin-1")
            asked = self._client.build_request(request.method, url, content=content, headers=headers)
            return asyncio.create_task(self._client.send(asked, stream=True))

        sending = send(data if prefill is None else msgspec.json.encode(second))
        leaving = asyncio.create_task(disconnected(request.receive))
        losing = asyncio.create_task(choice.backend.gone.wait())
        stack.callback(leaving.cancel)
        try:
            await asyncio.wait({sending, leaving, losing} | ({prefill} if prefill else set()), return_when=_FIRST)
            if not sending.done() and prefill is not None and prefill.done() and not prefill.result():
                await _end(sending)
                sending = send(data)
            await asyncio.wait({sending, leaving, losing}, return_when=_FIRST)
        finally:
            losing.cancel()
            if leaving.done() or not sending.done():
                await _end(sending)
        if leaving.done():
            raise Unroutable("the client closed the connection", 499)
        return None if sending.cancelled() else sending.result()

    async def _prefill(self, path: str, headers: Headers, body: dict, choice: Choice) -> bool:
        """Whether it was done."""
        helper = choice.prefill
        with helper.doing(choice.prefill_tokens):
            try:
                answer = await self._client.post(helper.url + path, content=msgspec.json.encode(body), headers=headers)
            except httpx.TransportError as error:
                await self._failed(helper, error)
                return False
        if answer.status_code != 200:
            log.warning("%s did not prefill: %d %.300s", helper.url, answer.status_code, answer.text)
        return answer.status_code == 200

    async def _failed(self, backend: Backend, error: httpx.TransportError) -> None:
        log.warning("%s does not answer: %s", backend.url, str(error) or type(error).__name__)
        await self._backends.check(backend)

    async def _pieces(self, response, backend: Backend, path: str, answered, stack) -> AsyncIterator[bytes]:
        """The answer as it comes. What breaks off is said so, where the client is told by events."""
        first = True
        try:
            async for piece in response.aiter_raw():
                if first:
                    answered()
                    if path == RESPONSES and (found := _RESPONSE_ID.search(piece)):
                        self._policy.home(found[1].decode(), backend)
                    first = False
                yield piece
        except httpx.TransportError as error:
            log.warning("%s has broken off: %s", backend.url, str(error) or type(error).__name__)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            broken = Unroutable("the backend was lost in the middle of its answer", 502, "backend_lost_error")
            yield b"\n\n" + event(broken.body(), "error")
        finally:
            await stack.aclose()


_FIRST = asyncio.FIRST_COMPLETED


class _Passing(StreamingResponse):
    """An answer on its way. What it holds is given back however it ends, also where nothing of it was ever sent."""

    def __init__(self, pieces: AsyncIterator[bytes], status: int, headers: Headers, stack: AsyncExitStack):
        super().__init__(pieces, status)
        self.raw_headers, self._stack = headers, stack

    async def whole(self) -> Response:
        """All of it, or as much as there is to be had, while nobody has been sent anything. Nothing is held then."""
        content = b""
        with contextlib.suppress(httpx.TransportError):
            async for piece in self.body_iterator:
                content += piece
        found = Response(content, self.status_code)
        found.raw_headers += self.raw_headers
        return found

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def _end(task: asyncio.Task) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
        response = await task
        await response.aclose()


def _for_backend(request: Request) -> Headers:
    kept = [(name, value.strip()) for name, value in request.headers.raw if name not in _KEPT_FROM_BACKENDS]
    if "accept-encoding" in request.headers:
        return kept
    return [*kept, (b"accept-encoding", b"identity")]  # and not what this program could decode


def _object(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer with status 200; nothing where it is no object."""
    try:
        return msgspec.json.decode(answer.content, type=dict[str, Any]) if answer.status_code == 200 else {}
    except (msgspec.DecodeError, RecursionError):
        return {}


async def _refused(request: Request, error: Unroutable) -> Response:
    return JSONResponse(error.body(), error.status, {"retry-after": "2"} if error.status == 503 else None)
