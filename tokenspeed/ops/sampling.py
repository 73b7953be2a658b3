"""Choosing the next token: temperature, top-k, top-p and min-p, with noise that depends on nothing but its counter."""

import math

import torch
from torch import Tensor

from .library import operator

_WORD = 0xFFFFFFFF
NONE_ALLOWED, NOT_FINITE = -1, -2  # in place of an id
MASS = 2.0**40  # of the likeliest token: probability masses are integers, so their sums have no order


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four words from four counter words and two key words, all in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        if i:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32 & _WORD) ^ c1 ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
    return [c0, c1, c2, c3]


def noise_bits(seed: Tensor, output: Tensor, vocabulary: int, first: int = 0) -> Tensor:
    """The 32 random bits of every vocabulary id: word id % 4 of Philox at counter (id // 4, output), under key seed.

    seed, output: [B] int64. Returns [B, vocabulary] int64, values 0 .. 2^32 - 1, of the ids from `first` on.
    """
    quads = torch.arange(first // 4, -(-(first + vocabulary) // 4), device=seed.device)
    counter = [quads[None], (output & _WORD)[:, None], (output >> 32 & _WORD)[:, None], torch.zeros_like(quads)[None]]
    bits = _philox(counter, [(seed & _WORD)[:, None], (seed >> 32 & _WORD)[:, None]])
    return torch.stack(torch.broadcast_tensors(*bits), dim=-1).flatten(1)[:, first % 4 : first % 4 + vocabulary]


def gumbel_scores(distance: Tensor, seed: Tensor, output: Tensor, first: int = 0) -> Tensor:
    """What the drawn id has the most of: Gumbel noise - distance, [B, V] fp32, for the ids from `first` on."""
    # -log1p(-u) of a small u keeps all its bits, and small is what wins.
    bits = noise_bits(seed, output, distance.shape[1], first)
    uniform = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -distance - torch.log(-torch.log1p(-uniform))


def masses(distance: Tensor) -> Tensor:
    """Probability of ids at this distance from the likeliest, which has MASS: int64, so that sums have no order."""
    return (torch.exp(-distance) * MASS).long()


def _limit(distance: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The largest distance from the likeliest token that top-k and then top-p keep, [B]; ties with it are kept."""
    vocabulary = distance.shape[1]
    ordered = distance.sort(dim=-1).values
    count = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary).long()
    kth = ordered.gather(1, count[:, None] - 1)
    mass = masses(ordered).masked_fill_(ordered > kth, 0).cumsum(-1).double()
    target = (top_p.double()[:, None] * mass[:, -1:]).clamp(min=1)
    reached = (mass < target).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
    nucleus = ordered.gather(1, reached).masked_fill_((top_p >= 1)[:, None], torch.inf)
    return torch.minimum(kth, nucleus)[:, 0]


def id_or_reason(ids: Tensor, largest: Tensor) -> Tensor:
    """The ids, or why there is none, by the largest logit of each row, NaN where one is: all [B]."""
    ids = torch.where(largest > -torch.inf, ids, NONE_ALLOWED)
    return torch.where(largest < torch.inf, ids, NOT_FINITE)


@operator(
    fake=lambda logits, temperature, top_k, top_p, min_p, seed, output, index=None: logits.new_empty(
        logits.shape[0], dtype=torch.int64
    )
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    output: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """Draw one id a row from `softmax(logits / temperature)` cut to its top-k, then to its top-p, and by min-p.

    logits: [B, V], any float type, -inf for what is forbidden; temperature, top_p, min_p: [B] fp32; top_k: [B] int32;
    seed, output (its number): [B] int64. Temperature 0 takes the largest logit, the lowest id of equals. top_k 0, top_p
    1 and min_p 0 cut nothing. With d = max(x) - x of the scaled logits x in fp32, top-k keeps the k smallest d and what
    ties with the k-th, top-p those with `mass(smaller d) < top_p mass(all kept)` and always the first, min-p those with
    `d <= -log(min_p)`. Returns ids, [B] int64: the argmax of Gumbel noise - d (Gumbel 1954) over what is left. The
    noise is a function of (seed, output, id) alone, so a row draws the same id in every batch and at every place.
    In place of an id: NOT_FINITE for a row that holds NaN or +inf, as it is or scaled; NONE_ALLOWED for one of -inf.
    index: [B] int64; where it is given, all before `output` but the logits are tables, [I], of which row b takes what
    stands at index[b].
    """
    if index is not None:
        temperature, top_k, top_p, min_p, seed = (x[index] for x in (temperature, top_k, top_p, min_p, seed))
    logits = logits.float()
    largest, best = logits.max(-1)
    if logits.is_cpu and max(temperature.tolist(), default=0) <= 0 and all(map(math.isfinite, largest.tolist())):
        return best  # the commonest call, by what costs nothing to read
    greedy = temperature <= 0
    if bool(greedy.all()):
        return id_or_reason(best, largest)
    scaled = logits / torch.where(greedy, 1, temperature)[:, None]
    largest = scaled.amax(-1)
    distance = largest[:, None] - scaled
    limit = -torch.log(min_p)
    if bool(((top_k > 0) | (top_p < 1)).any()):
        limit = torch.minimum(limit, _limit(distance, top_k, top_p))
    drawn = gumbel_scores(distance, seed, output).masked_fill_(distance > limit[:, None], -torch.inf).argmax(-1)
    return id_or_reason(torch.where(greedy, best, drawn), largest)
