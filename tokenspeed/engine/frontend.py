"""The text side of a checkpoint: what callers write, as requests; what the engine answers, as results. No weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .config import ModelConfig
from .errors import RequestError
from .request import CompletionOutput, Logprob, Request, RequestOutput, SamplingParams, TokenScores, Update
from .text.generation_config import GenerationDefaults
from .text.template import ChatTemplate, EncodedPrompt
from .text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Frontend:
    """A checkpoint's architecture, tokenizer, chat template and sampling defaults."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: GenerationDefaults

    @classmethod
    def from_directory(cls, directory: Path) -> "Frontend":
        """Raises ConfigError for what is missing or malformed."""
        tokenizer = Tokenizer.from_directory(directory)
        return cls(
            directory,
            ModelConfig.from_directory(directory),
            tokenizer,
            ChatTemplate.from_directory(directory, tokenizer),
            GenerationDefaults.from_directory(directory, tokenizer),
        )

    def sampling_params(self, **chosen) -> SamplingParams:
        """The checkpoint's own sampling values, and over them what the caller chose (None: nothing chosen)."""
        d = self.defaults
        own = {
            "temperature": d.temperature if d.do_sample else 0.0,
            "top_k": d.top_k,
            "top_p": d.top_p,
            "min_p": d.min_p,
            "repetition_penalty": d.repetition_penalty,
        }
        return SamplingParams(**own | {name: value for name, value in chosen.items() if value is not None})

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None, **kwargs) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks; kwargs as `ChatTemplate.render` takes them."""
        return self.tokenizer.encode_rendered(self.template.render(messages, tools, **kwargs))

    def request(
        self, id: str, prompt: Prompt, params: SamplingParams, boundaries: Sequence[int] | None = None, **rest
    ) -> Request:
        """A request for a raw prompt, as text or as ids. A state is kept before its last token unless `boundaries` says
        where else, so that the same prompt again costs one token."""
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = tuple(map(int, prompt))
        except (TypeError, ValueError):
            raise RequestError(f"the prompt is {type(prompt).__name__}; it must be text or token ids.") from None
        return Request(id, ids, params, (len(ids) - 1,) if boundaries is None else tuple(boundaries), **rest)

    def chat_request(
        self, id: str, messages: list[dict], params: SamplingParams, tools: list[dict] | None = None, **options
    ) -> Request:
        """A request for a conversation; options as `ChatTemplate.encode` takes them. States are kept at the template's
        stable boundaries and before the last token."""
        encoded = self.template.encode(messages, tools, name_space="", **options)
        return self.request(id, encoded.ids, params, chat_boundaries(encoded), kept_with=encoded.kept_with)


def chat_boundaries(encoded: EncodedPrompt) -> tuple[int, ...]:
    """Where later prompts will leave a conversation, the same one again among them."""
    return tuple(sorted({*encoded.boundaries, len(encoded.ids) - 1} - {0}))


class Collector:
    """Puts a request's updates together. `take` is its sink; `output` grows as they come."""

    def __init__(self, frontend: Frontend, request: Request, prompt: str | None = None):
        self._tokenizer, self._request = frontend.tokenizer, request
        params = request.params
        wants = params.logprobs is not None
        outputs = [
            CompletionOutput(i, logprobs=[] if wants else None, cumulative_logprob=0.0 if wants else None)
            for i in range(params.n)
        ]
        self.output = RequestOutput(request.id, prompt, list(request.prompt), outputs)
        self.error: str | None = None

    def take(self, update: Update) -> None:
        """Add an Update. Mutates `output`."""
        output = self.output.outputs[update.index]
        output.token_ids += update.ids
        output.text += update.text
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

    def snapshot(self) -> RequestOutput:
        """The output as it stands, which later updates leave alone."""
        outputs = [
            replace(o, token_ids=list(o.token_ids), logprobs=None if o.logprobs is None else list(o.logprobs))
            for o in self.output.outputs
        ]
        return replace(self.output, outputs=outputs)

    def _logprobs(self, scores: TokenScores) -> dict[int, Logprob]:
        found = {}
        for id, logprob, rank in zip(scores.ids, scores.logprobs, scores.ranks, strict=True):
            found.setdefault(id, Logprob(logprob, rank, self._tokenizer.decode([id], skip_special_tokens=False)))
        return found
