"""Choosing tokens from logits that are split over ranks by vocabulary, without gathering them.

Every rank works on its slice. Where ranks share memory one kernel does it all (csrc/kernels/step/sample_ranks.cu);
elsewhere only maxima, histograms and one key a row are reduced. What is exchanged are maxima, integers and the few
likeliest ids, so every rank gets the same id, and it is the one `ops.sample` draws from the whole row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.sampling import gumbel_scores, id_or_reason, masses
from .comm import Communicator

_LOW = 0xFFFFFFFF
_LEVELS = ((20, 11), (10, 10), (0, 10))  # lowest bit and count of bits: the 31 bits of a distance, from the top


def greedy(logits: Tensor, communicator: Communicator) -> Tensor:
    """The largest logit of a row, the lowest id of equals. One launch, or one reduction.

    logits: [B, V / tp], the rank's slice. Returns ids of the whole vocabulary, [B] int64, the same on every rank; as
    `ops.sample` says, a reason where there is none.
    """
    if draws := communicator.draws(logits):
        return draws.greedy(logits)
    return id_or_reason(*_winner(logits.float(), communicator))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    output: Tensor,
    communicator: Communicator,
) -> Tensor:
    """`ops.sample` of rows whose vocabulary is split over the tp group, id for id. One launch, or eight
    reductions; no host reads.

    logits: [B, V / tp], the rank's slice in order of rank, -inf for what is forbidden; the other tensors as in
    `ops.sample`, alike on every rank. Returns ids of the whole vocabulary, [B] int64, the same on every rank.
    """
    if draws := communicator.draws(logits):
        return draws.sample(logits, temperature, top_k, top_p, min_p, seed, output)
    mesh, width = communicator.mesh, logits.shape[1]
    logits = logits.float()
    greedy_rows = temperature <= 0
    scaled = logits / torch.where(greedy_rows, 1, temperature)[:, None]
    largest = _largest(scaled, communicator)
    distance = largest[:, None] - scaled
    limit = torch.minimum(-torch.log(min_p), _limit(distance, top_k, top_p, communicator))
    score = gumbel_scores(distance, seed, output, mesh.place("tp") * width)
    score.masked_fill_(distance > limit[:, None], -torch.inf)
    ids, _ = _winner(torch.where(greedy_rows[:, None], logits, score), communicator)
    return id_or_reason(ids, largest)


def _largest(logits: Tensor, communicator: Communicator) -> Tensor:
    """The largest logit of each row, [B]; infinity for NaN, of which a maximum over ranks need not tell."""
    return communicator.all_reduce(logits.amax(-1).nan_to_num_(torch.inf, torch.inf, -torch.inf), "tp", largest=True)


def _winner(values: Tensor, communicator: Communicator) -> tuple[Tensor, Tensor]:
    """The id of the largest value of each row, the lowest of equals, and that value, infinity for NaN: one maximum of
    (value, -id) as an integer."""
    best, id = values.max(-1)
    best.nan_to_num_(torch.inf, torch.inf, -torch.inf)
    first = communicator.mesh.place("tp") * values.shape[1]
    # Floats order as integers once the bits below the sign of a negative are flipped; adding 0.0 makes -0.0 equal 0.0.
    bits = (best + 0.0).view(torch.int32)
    ordered = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()
    key = communicator.all_reduce((ordered << 32) | (_LOW - (first + id)), "tp", largest=True)
    ordered = key >> 32
    return _LOW - (key & _LOW), (ordered ^ (ordered >> 31 & 0x7FFFFFFF)).int().view(torch.float32)


def _limit(distance: Tensor, top_k: Tensor, top_p: Tensor, communicator: Communicator) -> Tensor:
    """The largest distance from the likeliest token that top-k and then top-p keep, [B]; see `ops.sample`."""
    vocabulary = distance.shape[1] * communicator.mesh.size("tp")
    bits = distance.view(torch.int32)  # not negative: the integers order as the distances do
    count = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).double()
    kth = _reach(bits, torch.ones_like(bits, dtype=torch.int64), lambda total: count, communicator)
    kept = masses(distance).masked_fill_(bits > kth[:, None], 0)
    nucleus = _reach(bits, kept, lambda total: (top_p.double() * total.double()).clamp(min=1), communicator)
    return torch.minimum(kth, torch.where(top_p < 1, nucleus, kth)).view(torch.float32)


def _reach(bits: Tensor, amount: Tensor, target: Callable[[Tensor], Tensor], communicator: Communicator) -> Tensor:
    """The smallest value of `bits` up to which the amounts of all ranks reach a target, [B] int32.

    bits: [B, V / tp] int32, not negative; amount: the same shape, int64; target: from the total amount of a row to what
    is to be reached, both [B]. Histograms narrow the value down from its highest bits, one reduction a level.
    """
    found = torch.zeros_like(bits[:, :1])  # the bits above the level
    below = torch.zeros_like(amount[:, :1])  # the amount of smaller values
    wanted = None
    for low, width in _LEVELS:
        inside = (bits >> (low + width)) == found
        histogram = amount.new_zeros(len(bits), 1 << width)
        histogram.scatter_add_(1, (bits >> low & (1 << width) - 1).long(), amount * inside)
        histogram = communicator.all_reduce(histogram, "tp").cumsum_(-1).add_(below)
        if wanted is None:
            wanted = target(histogram[:, -1])[:, None]
        reached = (histogram < wanted).sum(-1, keepdim=True).clamp_(max=(1 << width) - 1)
        below = torch.where(reached > 0, histogram.gather(1, (reached - 1).clamp(min=0)), below)
        found = found << width | reached.int()
    return found[:, 0]
