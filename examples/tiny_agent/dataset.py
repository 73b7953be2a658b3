"""Conversations as token ids that fill a given length, and batches of them."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from examples.tiny_agent.data import Generator
from examples.tiny_agent.render import Part, Piece, render_exchange, render_head

# Weight of a token in the loss. What others say is worth a little, as plain language modelling.
LOSS_WEIGHTS = {Part.CONTEXT: 0.1, Part.EARLIER: 1.0, Part.ANSWER: 2.0}


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as generated: its tokens are ids[start:stop]."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered conversation: ids and loss weights [tokens], and the assistant turns of the last exchange."""

    ids: list[int]
    weights: list[float]
    turns: list[Turn]


@dataclass(frozen=True, slots=True)
class Batch:
    """ids int64 and weights fp32, both [batch, length]; padding has weight 0."""

    ids: torch.Tensor
    weights: torch.Tensor
    turns: list[list[Turn]]

    def to(self, device: str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(self.ids.to(device), self.weights.to(device), self.turns)


def example(seed: int, tokenizer: Tokenizer, length: int) -> Example:
    """The conversation of `seed` with as many exchanges as fit `length` tokens, at least one.

    It is rendered as at inference: only the last exchange shows think blocks.
    """
    generator = Generator(seed)
    thinking = generator.conversation.thinking
    earlier = _encode(render_head(generator.conversation), tokenizer)
    used = sum(len(ids) for _, ids in earlier)
    last: list[tuple[Piece, list[int]]] = []
    shortened: list[tuple[Piece, list[int]]] = []
    while True:
        exchange = generator.next_exchange()
        candidate = _encode(render_exchange(exchange, thinking, last=True), tokenizer)
        grown = used + sum(len(ids) for _, ids in shortened)
        if last and grown + sum(len(ids) for _, ids in candidate) > length:
            break
        earlier, used, last = earlier + shortened, grown, candidate
        shortened = _encode(render_exchange(exchange, thinking, last=False), tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    turns: list[Turn] = []
    for piece, tokens in earlier + last:
        if piece.part is Part.ANSWER:
            turns.append(Turn(piece.kind, len(ids), len(ids) + len(tokens)))
        ids += tokens
        weights += [LOSS_WEIGHTS[piece.part]] * len(tokens)
    return Example(ids, weights, turns)


def batch(seeds: range, tokenizer: Tokenizer, length: int, padding: int) -> Batch:
    """The conversations of `seeds`, each filled, padded or (a single long exchange) cut to `length` tokens."""
    ids = torch.full((len(seeds), length), padding)
    weights = torch.zeros(len(seeds), length)
    turns = []
    for row, seed in enumerate(seeds):
        one = example(seed, tokenizer, length)
        kept = min(length, len(one.ids))
        ids[row, :kept] = torch.tensor(one.ids[:kept])
        weights[row, :kept] = torch.tensor(one.weights[:kept])
        turns.append([turn for turn in one.turns if turn.stop <= length])
    return Batch(ids, weights, turns)


def _encode(pieces: list[Piece], tokenizer: Tokenizer) -> list[tuple[Piece, list[int]]]:
    return [(piece, tokenizer.encode(piece.text, add_special_tokens=False).ids) for piece in pieces]
