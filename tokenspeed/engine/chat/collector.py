"""A request's updates put together to its result."""

from dataclasses import replace

from ..request import CompletionOutput, Failure, Logprob, Request, RequestOutput, TokenScores, Update
from ..text.tokenizer import Tokenizer
from ..text.tools import Content
from ..text.turn import TurnEvent, TurnText
from .turn import TurnReader


class Collector:
    """Puts a request's updates together. `take` is its sink; `output` grows as they come, its answers with the last."""

    def __init__(
        self, tokenizer: Tokenizer, request: Request, prompt: str | None = None, reader: TurnReader | None = None
    ):
        """prompt: its text, for the result; reader: of a conversation's turn, which is then taken apart."""
        self._tokenizer, self._request, self._reader = tokenizer, request, reader
        self._turns = [TurnText() for _ in range(request.params.n)] if reader else []
        params = request.params
        wants = params.logprobs is not None
        outputs = [
            CompletionOutput(i, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None)
            for i in range(params.n)
        ]
        self.output = RequestOutput(request.id, prompt, list(request.prompt), outputs)
        self.error: Failure | None = None

    def take(self, update: Update) -> list[TurnEvent]:
        """Add an Update. Mutates `output`. Returns what it adds to the turn; for a raw prompt its text is content."""
        output = self.output.outputs[update.index]
        output.token_ids += update.ids
        output.text += update.text
        events: list[TurnEvent] = [Content(update.text)]
        if self._reader:
            events = self._reader.take(update)
            self._turns[update.index].add(events)
            if update.finish_reason:
                output.answer = self._turns[update.index].answer()
        for scores in update.scores:
            output.logprobs.append(self._logprobs(scores))
            output.cumulative_logprob += scores.logprobs[0]
        if update.prompt_scores is not None:
            self.output.prompt_logprobs = [None, *(self._logprobs(scores) for scores in update.prompt_scores)]
        self.output.reuse = self.output.reuse or update.reuse
        if update.finish_reason:
            output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
            self.output.metrics = update.metrics
            self.output.finished = all(o.finish_reason for o in self.output.outputs)
            self.error = self.error or update.error
            self.output.error = self.error and self.error.error
        return events

    def snapshot(self) -> RequestOutput:
        """The output as it stands, which later updates leave alone; calls are in its answers once those are whole."""
        outputs = [
            replace(o, token_ids=list(o.token_ids), logprobs=None if o.logprobs is None else list(o.logprobs))
            for o in self.output.outputs
        ]
        for output, turn in zip(outputs, self._turns, strict=bool(self._turns)):
            output.answer = output.answer or turn.answer(finished=False)
        return replace(self.output, outputs=outputs)

    def _logprobs(self, scores: TokenScores) -> dict[int, Logprob]:
        found = {}
        for id, logprob, rank in zip(scores.ids, scores.logprobs, scores.ranks, strict=True):
            found.setdefault(id, Logprob(logprob, rank, self._tokenizer.decode([id], skip_special_tokens=False)))
        return found
