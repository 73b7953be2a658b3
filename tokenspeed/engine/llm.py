"""The offline API: a model in this process, prompts in, results out."""

import asyncio
import atexit
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .chat.collector import Collector
from .chat.conversation import Conversation
from .chat.formats import Format
from .chat.turn import PreparedTurn, TurnReader, Turns
from .checkpoint import resolve
from .config import EngineConfig
from .core import Engine
from .errors import ConfigError, EngineError, RequestError, TokenSpeedError
from .executor.device import pick_device
from .executor.loading import load_runner, longest_sequence
from .executor.ranks import ALONE, Beside, start_ranks
from .parallel.comm import ONE_RANK
from .request import Failure, Request, RequestOutput, SamplingParams, Update
from .schedule.cache import CacheConfig, Policy, PrefixCache
from .schedule.scheduler import Limits
from .text.frontend import Frontend, Prompt
from .text.grammar import GrammarSpec
from .text.turn import TurnEvent

_GHOST_NODES_PER_PAGE = 4  # evicted pages whose token ids are remembered


def load_engine(frontend: Frontend, config: EngineConfig, progress: bool = True, beside: Beside = ALONE) -> Engine:
    """Weights, memory and scheduler of a checkpoint; with more than one rank this process becomes rank 0. beside: what
    the other ranks do beside their Steps. Raises ConfigError or CapacityError for what cannot be used."""
    if config.tensor_parallel_size == config.expert_parallel_size == 1:
        device = pick_device(config.device)
        runner, sizes = load_runner(frontend.directory, config, device, ONE_RANK, list, progress)
    else:
        ranks = start_ranks(frontend.directory, config, beside)
        atexit.register(ranks.close)
        communicator, channel = ranks.communicator, ranks.channel
        runner, sizes = load_runner(frontend.directory, config, ranks.device, communicator, channel.smallest, progress)
        ranks.runner, runner.announce, runner.check = runner, ranks.announce, ranks.check
    cache = PrefixCache(
        CacheConfig(
            pages=sizes.pages,
            slots=sizes.slots,
            host_pages=sizes.host_pages,
            host_slots=sizes.host_slots,
            ghost_nodes=_GHOST_NODES_PER_PAGE * sizes.pages,
            grid_tokens=config.snapshot_grid,
            policy=Policy.VALUE if config.cache_policy == "value" else Policy.LRU,
            enabled=config.enable_prefix_caching,
        )
    )
    longest = longest_sequence(frontend.config, config, sizes)
    drafts = config.draft_depths(runner.model.mtp is not None, runner.device.type == "cuda")
    drafting = {"drafts": drafts, "draft_costs": runner.draft_costs}
    limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, longest, **drafting)
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
        self.frontend = Frontend.from_directory(resolve(model, config.load_format))
        self.turns = Turns(self.frontend)
        self.engine = load_engine(self.frontend, config, progress)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
        response_format: dict | None = None,
        structured_outputs: dict | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts (texts, or lists of token ids), all side by side; results in the order of the prompts.

        sampling_params: one for all or one each; None: the checkpoint's own values. response_format,
        structured_outputs: what every result must look like, as in `Conversation`. Raises RequestError or CapacityError
        for a prompt that cannot be taken, before anything runs, and EngineError where the engine fails. What ends one
        prompt on its way, as CorruptedError does, is raised where it is the only one, else it is that result's `error`.
        """
        prompts = [prompts] if _is_prompt(prompts) else list(prompts)
        params = self._params(sampling_params, len(prompts))
        grammar = self.turns.grammar(Format.of_text(response_format, structured_outputs))
        requests = [self.frontend.request(self._id(), *pair) for pair in zip(prompts, params, strict=True)]
        tokenizer = self.frontend.tokenizer
        collectors = [
            Collector(tokenizer, request, prompt if isinstance(prompt, str) else None)
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        return self._run(requests, [grammar] * len(requests), collectors, progress)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
        tools: list[dict] | None = None,
        **options,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. tools: OpenAI definitions; options: the fields of `Conversation`
        (tool_choice, response_format, enable_thinking, ...). Each result has its `answer`: reasoning, content and tool
        calls. Raises as `generate` does."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        params = self._params(sampling_params, len(conversations))
        turns = [
            self.prepare(_conversation(messages, tools, options), own)
            for messages, own in zip(conversations, params, strict=True)
        ]
        requests = [turn.request for turn in turns]
        readers = [TurnReader(self.turns, turn) for turn in turns]
        collectors = [
            Collector(self.frontend.tokenizer, request, None, reader)
            for request, reader in zip(requests, readers, strict=True)
        ]
        grammars = [self.turns.grammar(turn.format) for turn in turns]
        return self._run(requests, grammars, collectors, progress)

    def prepare(self, chat: Conversation, params: SamplingParams | None = None) -> PreparedTurn:
        """A conversation ready for `follow_turn`. Raises RequestError for what cannot be asked."""
        return self.turns.prepare(self._id(), chat, params or self.frontend.sampling_params())

    def follow_turn(self, turn: PreparedTurn) -> Iterator[tuple[Update, list[TurnEvent]]]:
        """Answer a conversation and yield the news as they come, each with what it adds to the turn. As `stream`."""
        reader = TurnReader(self.turns, turn)
        with contextlib.closing(self.follow([turn.request], [self.turns.grammar(turn.format)])) as news:
            for _, update in news:
                yield update, reader.take(update)

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> Iterator[tuple[int, Update]]:
        """Continue prompts side by side and yield the news as they come: (which prompt, update).

        Closing the iterator aborts what still runs. Raises as `generate` does, before the first update.
        """
        pairs = zip(prompts, self._params(params, len(prompts)), strict=True)
        yield from self.follow([self.frontend.request(self._id(), *pair) for pair in pairs])

    def follow(
        self, requests: Sequence[Request], grammars: Sequence[GrammarSpec | None] | None = None
    ) -> Iterator[tuple[int, Update]]:
        """As `stream`, for requests that the caller made; grammars: what their outputs must look like."""
        place = {request.id: i for i, request in enumerate(requests)}
        news: list[Update] = []
        self._submit(requests, grammars or [None] * len(requests), [news.append] * len(requests))
        try:
            # Whoever else runs the engine meanwhile leaves news here, too.
            while news or any(map(self.engine.runs, place)):
                if not news:
                    self.engine.step()
                ready, news[:] = list(news), []
                for update in ready:
                    _raise_error(update.error, len(requests) == 1)
                    yield place[update.request_id], update
        finally:
            self._settle(place)

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **options) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; options as in `chat`."""
        return self.turns.encode(_conversation(messages, tools, options)).ids

    def _params(self, given, count: int) -> list[SamplingParams]:
        given = given or self.frontend.sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling parameters for {count} prompts; one, or one each, is needed.")
        return params

    def _id(self) -> str:
        return str(next(self._ids))

    def _submit(
        self,
        requests: Sequence[Request],
        grammars: Sequence[GrammarSpec | None],
        sinks: Sequence[Callable[[Update], None]],
    ) -> None:
        """All or none."""
        done: list[str] = []
        try:
            for request, grammar, sink in zip(requests, grammars, sinks, strict=True):
                self.engine.submit(request, sink, grammar)
                done.append(request.id)
        except TokenSpeedError:
            for id in done:
                self.engine.abort(id)
            raise

    def _run(
        self,
        requests: list[Request],
        grammars: list[GrammarSpec | None],
        collectors: list[Collector],
        progress: bool,
    ) -> list[RequestOutput]:
        self._submit(requests, grammars, [collector.take for collector in collectors])
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
            self._settle([request.id for request in requests])
        for collector in collectors:
            _raise_error(collector.error, len(collectors) == 1)
        return [collector.output for collector in collectors]

    def _settle(self, ids: Iterable[str]) -> None:
        """Abort what still runs of these requests, and reconcile what is on its way, so that their memory is back. What
        others asked for goes on as far as that takes."""
        own = set(ids)
        for id in own:
            self.engine.abort(id)
        while self.engine.failed is None and self.engine.holds(own):
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
        text = prompt if isinstance(prompt, str) else None
        async for output in self._follow(request, None, Collector(self.frontend.tokenizer, request, text)):
            yield output

    async def chat(
        self,
        messages: list[dict],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        tools: list[dict] | None = None,
        **options,
    ) -> AsyncIterator[RequestOutput]:
        """The growing answer to a conversation; as `LLM.chat` and `generate`."""
        params = sampling_params or self.frontend.sampling_params()
        turns = self._llm.turns
        turn = turns.prepare(request_id or self._id(), _conversation(messages, tools, options), params)
        reader = TurnReader(turns, turn)
        collector = Collector(self.frontend.tokenizer, turn.request, None, reader)
        grammar = turns.grammar(turn.format)
        async for output in self._follow(turn.request, grammar, collector):
            yield output

    def _id(self) -> str:
        return f"async-{self._llm._id()}"

    async def _follow(
        self, request: Request, grammar: GrammarSpec | None, collector: Collector
    ) -> AsyncIterator[RequestOutput]:
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def tell(what: Update | Exception) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        def submit() -> None:
            try:
                self.engine.submit(request, tell, grammar)
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
        self._llm._settle(engine.request_ids)


def _conversation(messages: list[dict], tools: list[dict] | None, options: dict) -> Conversation:
    try:
        return Conversation(messages, tools, **options)
    except TypeError:
        known = Conversation.__dataclass_fields__.keys() - {"messages", "tools"}
        unknown = ", ".join(sorted(options.keys() - known))
        raise RequestError(f"{unknown}: no option of a conversation; known are {', '.join(sorted(known))}.") from None


def _is_prompt(prompts) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _raise_error(failure: Failure | None, alone: bool = True) -> None:
    """alone: nobody else's outputs would be lost with it. What failed the engine has failed everybody."""
    if failure and (alone or isinstance(failure.error, EngineError)):
        raise failure.error
