"""Log-probabilities as the endpoints write them."""

from collections.abc import Sequence
from typing import Any

from ..request import TokenScores
from ..text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes(id).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN; OpenAI writes -9999."""
    return logprob if logprob > -9999.0 else -9999.0


def chat_logprob(tokenizer: Tokenizer, scores: TokenScores) -> dict[str, Any]:
    """An entry of a chat choice's `logprobs.content`."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        spelled = list(tokenizer.token_bytes(id))
        return {"token": token_text(tokenizer, id), "logprob": finite(logprob), "bytes": spelled}

    own, *top = [entry(*pair) for pair in zip(scores.ids, scores.logprobs, strict=True)]
    return own | {"top_logprobs": top}


def prompt_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScores]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: an entry a prompt token, none for the first."""

    def entry(found: TokenScores) -> dict[str, Any]:
        return {
            str(id): {"logprob": finite(logprob), "rank": rank, "decoded_token": token_text(tokenizer, id)}
            for id, logprob, rank in zip(found.ids, found.logprobs, found.ranks, strict=True)
        }

    return [None, *map(entry, scores)]


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScores | None], at: int = 0
) -> dict[str, Any]:
    """A text completion's `logprobs`; None among the scores: the first token of a prompt. at: where in the choice's
    text the first token begins, in characters."""
    tokens, offsets = [token_text(tokenizer, id) for id in ids], []
    for token in tokens:
        offsets.append(at)
        at += len(token)

    def top(found: TokenScores) -> dict[str, float]:
        pairs = zip(found.ids, found.logprobs, strict=True)
        return {token_text(tokenizer, id): finite(logprob) for id, logprob in pairs}

    return {
        "tokens": tokens,
        "token_logprobs": [None if found is None else finite(found.logprobs[0]) for found in scores],
        "top_logprobs": [None if found is None else top(found) for found in scores],
        "text_offset": offsets,
    }
