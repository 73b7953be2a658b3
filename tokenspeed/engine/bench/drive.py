"""Keeps an engine busy with requests from a series, a bounded number of them at once."""

from collections.abc import Callable, Iterator

from ..core import Engine, Sink, Update
from ..errors import EngineError, TokenSpeedError
from ..request import Request
from ..text.grammar import GrammarSpec


def drive(
    engine: Engine,
    work: Iterator[tuple[Request, Sink, GrammarSpec | None]],
    max_running: int,
    refused: Callable[[Request, TokenSpeedError], None] | None = None,
) -> None:
    """Submit requests, each with its sink and its grammar, in order, up to `max_running` at once, until all have
    ended. However it ends, nothing runs after it.

    refused: told of a request that the engine does not take; without it the error is raised. Raises EngineError where
    the engine fails, and what a sink raises.
    """
    running: dict[str, int] = {}  # continuations that have not ended
    raised: list[Exception] = []

    def watched(request: Request, sink: Sink) -> Sink:
        def take(update: Update) -> None:
            try:
                sink(update)
            except Exception as error:
                raised.append(error)
                raise
            if update.finish_reason:
                running[request.id] -= 1
                if not running[request.id]:
                    del running[request.id]

        return take

    try:
        more = True
        while more or running:
            while more and len(running) < max_running:
                request, sink, grammar = next(work, (None, None, None))
                more = request is not None
                if more:
                    running[request.id] = request.params.n
                    try:
                        engine.submit(request, watched(request, sink), grammar)
                    except EngineError:
                        raise
                    except TokenSpeedError as error:
                        del running[request.id]
                        if refused is None:
                            raise
                        refused(request, error)
            if running:
                engine.step()
            if raised:
                raise raised[0]
    finally:
        for id in list(running):
            engine.abort(id)
        settle(engine)


def settle(engine: Engine) -> None:
    """Reconcile what is on its way, so that all memory is back."""
    while engine.failed is None and engine.has_work:
        engine.step()
