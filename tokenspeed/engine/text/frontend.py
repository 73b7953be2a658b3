"""The text side of a checkpoint: tokenizer, template, defaults, and raw prompts as requests. No weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path

from ..config import ModelConfig
from ..errors import RequestError
from ..request import Request, SamplingParams
from .generation_config import GenerationDefaults
from .template import ChatTemplate
from .tokenizer import Tokenizer

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

    def request(
        self, id: str, prompt: Prompt, params: SamplingParams, boundaries: Sequence[int] | None = None, **rest
    ) -> Request:
        """A request for a raw prompt, as text or as ids. A state is kept before its last token unless `boundaries` says
        where else, so that the same prompt again costs one token."""
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        try:
            if isinstance(prompt, (bytes, bytearray, memoryview)):
                raise TypeError
            ids = tuple(map(index, prompt))
        except TypeError:
            raise RequestError(f"the prompt is {_kind(prompt)}; it must be text or token ids (integers).") from None
        return Request(id, ids, params, (len(ids) - 1,) if boundaries is None else tuple(boundaries), **rest)


def _kind(prompt: object) -> str:
    """What a prompt is made of, for an error."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray, memoryview)) and prompt:
        other = next((item for item in prompt if not isinstance(item, int)), prompt[0])
        return f"a {type(prompt).__name__} with {other!r} in it"
    return f"of type {type(prompt).__name__}"
