"""The offline API: a model in this process, prompts in, results out."""

import asyncio
import atexit
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .cache import CacheConfig, Policy, PrefixCache
from .checkpoint import resolve
from .config import EngineConfig
from .core import Engine
from .device import pick_device
from .errors import ConfigError, EngineError, RequestError, TokenSpeedError
from .frontend import Collector, Frontend, Prompt
from .loading import load_runner, longest_sequence
from .parallel.comm import ONE_RANK
from .ranks import start_ranks
from .request import Request, RequestOutput, SamplingParams, Update
from .scheduler import Limits

_GHOST_NODES_PER_PAGE = 4  # evicted pages whose token ids are remembered


def load_engine(frontend: Frontend, config: EngineConfig, progress: bool = True) -> Engine:
    """Weights, memory and scheduler of a checkpoint; with more than one rank this process becomes rank 0. Raises
    ConfigError or CapacityError for what cannot be used."""
    if config.tp == config.ep == 1:
        device = pick_device(config.device)
        runner, plan = load_runner(frontend.directory, config, device, ONE_RANK, list, progress)
    else:
        ranks = start_ranks(frontend.directory, config)
        atexit.register(ranks.close)
        communicator, channel = ranks.communicator, ranks.channel
        runner, plan = load_runner(frontend.directory, config, ranks.device, communicator, channel.smallest, progress)
        runner.announce = channel.send
    cache = PrefixCache(
        CacheConfig(
            pages=plan.pages,
            slots=plan.slots,
            ghost_nodes=_GHOST_NODES_PER_PAGE * plan.pages,
            grid_tokens=config.snapshot_grid,
            policy=Policy.VALUE if config.cache_policy == "value" else Policy.LRU,
            enabled=config.prefix_cache,
        )
    )
    longest = longest_sequence(frontend.config, config, plan)
    drafts = config.draft_depths(runner.model.mtp is not None)
    limits = Limits(config.max_num_seqs, config.max_batch_tokens, longest, drafts=drafts)
    eos_ids = frontend.defaults.eos_ids
    return Engine(runner, cache, limits, frontend.tokenizer, eos_ids, config.seed, config.validate)


class LLM:
    """A checkpoint, ready to generate.

    model: a directory, a hub id, or None for the shipped model; progress: show loading; settings: the fields of
    EngineConfig. Raises ConfigError or CapacityError for what cannot be used.
    """

    def __init__(self, model: str | Path | None = None, progress: bool = True, **settings):
        try:
            config = EngineConfig(**settings)
        except TypeError as error:
            raise ConfigError(f"unknown engine setting: {error}") from None
        self.frontend = Frontend.from_directory(resolve(model))
        self.engine = load_engine(self.frontend, config, progress)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue prompts (texts, or lists of token ids), all side by side; results in the order of the prompts.

        sampling_params: one for all or one each; None: the checkpoint's own values. Raises RequestError or
        CapacityError for a prompt that cannot be taken, before anything runs.
        """
        prompts = [prompts] if _is_prompt(prompts) else list(prompts)
        params = self._params(sampling_params, len(prompts))
        requests = [self.frontend.request(self._id(), *pair) for pair in zip(prompts, params, strict=True)]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        return self._run(requests, texts, progress)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
        tools: list[dict] | None = None,
        **template_options,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. tools: OpenAI definitions; template_options: as `ChatTemplate.encode`."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        params = self._params(sampling_params, len(conversations))
        requests = [
            self.frontend.chat_request(self._id(), *pair, tools, **template_options)
            for pair in zip(conversations, params, strict=True)
        ]
        return self._run(requests, [None] * len(requests), progress)

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> Iterator[tuple[int, Update]]:
        """Continue prompts side by side and yield the news as they come: (which prompt, update).

        Closing the iterator aborts what still runs. Raises as `generate` does, before the first update.
        """
        pairs = zip(prompts, self._params(params, len(prompts)), strict=True)
        yield from self.follow([self.frontend.request(self._id(), *pair) for pair in pairs])

    def follow(self, requests: Sequence[Request]) -> Iterator[tuple[int, Update]]:
        """As `stream`, for requests that the caller made."""
        place = {request.id: i for i, request in enumerate(requests)}
        news: list[Update] = []
        self._submit(requests, [news.append] * len(requests))
        try:
            while self.engine.has_work and place:
                self.engine.step()
                ready, news[:] = list(news), []
                for update in ready:
                    _raise_error(update.error)
                    yield place[update.request_id], update
        finally:
            for id in place:
                self.engine.abort(id)
            self._settle()

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; kwargs as `ChatTemplate.render` takes them."""
        return self.frontend.encode_chat(messages, tools, **kwargs)

    def _params(self, given, count: int) -> list[SamplingParams]:
        given = given or self.frontend.sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling parameters for {count} prompts; one, or one each, is needed.")
        return params

    def _id(self) -> str:
        return str(next(self._ids))

    def _submit(self, requests: Sequence[Request], sinks: Sequence[Callable[[Update], None]]) -> None:
        """All or none."""
        done: list[str] = []
        try:
            for request, sink in zip(requests, sinks, strict=True):
                self.engine.submit(request, sink)
                done.append(request.id)
        except TokenSpeedError:
            for id in done:
                self.engine.abort(id)
            raise

    def _run(self, requests: list[Request], texts: list[str | None], progress: bool) -> list[RequestOutput]:
        collectors = [Collector(self.frontend, *pair) for pair in zip(requests, texts, strict=True)]
        self._submit(requests, [collector.take for collector in collectors])
        finished = tokens = 0
        bar = tqdm(total=len(requests), desc="generating", unit="prompt", disable=not progress, leave=False)
        try:
            while finished < len(requests):
                self.engine.step()
                now = sum(collector.output.finished for collector in collectors)
                if now > finished:
                    bar.update(now - finished)
                    finished = now
                    tokens = sum(len(o.token_ids) for c in collectors for o in c.output.outputs)
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
        finally:
            bar.close()
            for request in requests:
                self.engine.abort(request.id)
            self._settle()
        for collector in collectors:
            _raise_error(collector.error)
        return [collector.output for collector in collectors]

    def _settle(self) -> None:
        """Reconcile what is still on its way, so that all memory is back."""
        while self.engine.failed is None and self.engine.has_work:
            self.engine.step()


class AsyncLLM:
    """The engine in a thread of its own, for callers on an event loop. Settings as for LLM; `close` ends the thread."""

    def __init__(self, model: str | Path | None = None, progress: bool = True, **settings):
        self._llm = LLM(model, progress, **settings)
        self.frontend, self.engine = self._llm.frontend, self._llm.engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="tokenspeed-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """The growing result, at each token that came. Leaving the loop early aborts the request.

        Raises RequestError or CapacityError for what cannot be taken, EngineError where the engine failed.
        """
        params = sampling_params or self.frontend.sampling_params()
        request = self.frontend.request(request_id or self._id(), prompt, params)
        async for output in self.follow(request, prompt if isinstance(prompt, str) else None):
            yield output

    async def chat(
        self,
        messages: list[dict],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        tools: list[dict] | None = None,
        **template_options,
    ) -> AsyncIterator[RequestOutput]:
        """The growing answer to a conversation; as `LLM.chat` and `generate`."""
        params = sampling_params or self.frontend.sampling_params()
        request = self.frontend.chat_request(request_id or self._id(), messages, params, tools, **template_options)
        async for output in self.follow(request):
            yield output

    def _id(self) -> str:
        return f"async-{self._llm._id()}"

    async def follow(self, request: Request, prompt: str | None = None) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a request that the caller made; prompt: its text, for the result."""
        collector = Collector(self.frontend, request, prompt)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def tell(what: Update | Exception) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        def submit() -> None:
            try:
                self.engine.submit(request, tell)
            except TokenSpeedError as error:
                with contextlib.suppress(RuntimeError):  # the caller's event loop is gone
                    tell(error)

        if self._closed:
            raise EngineError("the engine was closed.")
        self._inbox.put(submit)
        running = True
        try:
            while running:
                what = await news.get()
                if isinstance(what, Exception):
                    running = False  # it never did; another request may run under this id
                    raise what
                collector.take(what)
                running = not collector.output.finished
                _raise_error(what.error)
                yield collector.snapshot()
        finally:
            if running:
                await self.abort(request.id)

    async def abort(self, request_id: str) -> None:
        """Harmless for a request that does not run."""
        self._inbox.put(lambda: self.engine.abort(request_id))

    def close(self) -> None:
        """Ends the thread; requests that run are aborted, and their callers told. Twice is harmless."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _loop(self) -> None:
        engine = self.engine
        while True:
            idle = engine.failed is not None or not engine.has_work
            try:
                work = self._inbox.get(block=idle)
            except queue.Empty:
                with contextlib.suppress(EngineError):  # every request has been told, and later ones are refused
                    engine.step()
                continue
            if work is None:
                break
            work()
        for request_id in engine.request_ids:
            engine.abort(request_id)
        self._llm._settle()


def _is_prompt(prompts) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _raise_error(error: str | None) -> None:
    if error:
        raise EngineError(error)
