"""What a caller asks for, as checked values."""

import math
from dataclasses import dataclass

from .errors import RequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    temperature: 0 is greedy; top_k: 0 is off; top_p in (0, 1], min_p in [0, 1]; seed: the noise is a function of it,
    the output index and the token alone; max_tokens: at most this many; ignore_eos: go on past an end-of-sequence id.
    Raises RequestError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    ignore_eos: bool = False

    def __post_init__(self):
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number >= 0"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("seed", 0 <= self.seed < 2**63, "in [0, 2^63)"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be {wanted}.")


def check_prompt(tokens: list[int], max_tokens: int, vocab: int, max_context: int) -> None:
    """Raises RequestError for a prompt this model cannot take."""
    if not tokens:
        raise RequestError("the prompt is empty; at least one token is needed.")
    for position, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise RequestError(f"token id {token} at position {position} is outside the vocabulary of {vocab}.")
    if len(tokens) + max_tokens > max_context:
        raise RequestError(
            f"the prompt of {len(tokens)} tokens and max_tokens {max_tokens} exceed the context of {max_context} "
            "tokens; shorten either (longer contexts need YaRN in the checkpoint's rope_parameters)."
        )
