"""Log-probabilities as the endpoints write them."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..request import TokenScores, Update
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.token_bytes(id).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """JSON has neither infinity nor NaN; OpenAI writes -9999."""
    return logprob if logprob > -9999.0 else -9999.0


def chat_logprob(tokenizer: Tokenizer, scores: TokenScores) -> dict[str, Any]:
    """An entry of a chat choice's `logprobs.content`, and of a response's `output_text`."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        spelled = list(tokenizer.token_bytes(id))
        return {"token": token_text(tokenizer, id), "logprob": finite(logprob), "bytes": spelled}

    own, *top = [entry(*pair) for pair in zip(scores.ids, scores.logprobs, strict=True)]
    return own | {"top_logprobs": top}


class TextScores:
    """Which of a turn's tokens say a part of its text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._detokenizer = tokenizer, Detokenizer(tokenizer)
        self._decoded = 0  # characters
        self._tokens: deque[tuple[int, int, TokenScores]] = deque()  # and where in the text each begins and ends

    def add(self, update: Update) -> None:
        """The turn's next tokens."""
        for id, scores in zip(update.ids, update.scores, strict=True):
            begin = self._decoded
            self._decoded += len(self._detokenizer.push(id))
            if id not in self._tokenizer.special_ids:
                # One that ends inside a character belongs to this character.
                self._tokens.append((begin, max(self._decoded, begin + 1), scores))

    def take(self, begin: int, end: int) -> list[dict[str, Any]]:
        """`chat_logprob` of each token of which a part lies in this part of the text; parts come in their order, and a
        token of two counts for the first."""
        found = []
        while self._tokens and self._tokens[0][0] < end:
            _, token_end, scores = self._tokens.popleft()
            if token_end > begin:
                found.append(chat_logprob(self._tokenizer, scores))
        return found


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
