"""Choosing ids on the device: what each sequence asked for, applied to a Step's logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..parallel import sampling as split_sampling
from ..parallel.comm import ONE_RANK, Communicator
from ..request import TokenScores
from ..schedule.step import Begin, Edit, Sample
from .batch import to_device

_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of S tokens on the device: the chosen id first, then `alternatives` likeliest ones."""

    ids: Tensor  # [S, 1 + K] int64
    logprobs: Tensor  # [S, 1 + K] fp32
    rank: Tensor  # [S] int64: of the chosen id, from 1

    def to(self, device: str) -> "Scores":
        return Scores(*(x.to(device, non_blocking=True) for x in (self.ids, self.logprobs, self.rank)))

    def rows(self, alternatives: Sequence[int]) -> list[TokenScores]:
        """One entry a token, with as many alternatives as each asked for. Reads the tensors on the host."""
        columns = (self.ids.tolist(), self.logprobs.tolist(), self.rank.tolist())
        return [
            TokenScores(tuple(ids[: 1 + k]), tuple(logprobs[: 1 + k]), (rank, *range(1, 1 + k)))
            for k, ids, logprobs, rank in zip(alternatives, *columns, strict=True)
        ]


class Vocabulary:
    """The ids whose logits a rank holds: all of them, or a slice of the vocabulary that is split over the tp group.

    first, width: of the slice; size: of the whole. Whole logits are never gathered: sums, maxima and a few alternatives
    of each row are.
    """

    def __init__(self, width: int, communicator: Communicator = ONE_RANK):
        self.width, self.first = width, width * communicator.mesh.place("tp")
        self._ranks, self._communicator = communicator.mesh.size("tp"), communicator
        self.size = width * self._ranks

    def holds(self, id: int) -> bool:
        return self.first <= id < self.first + self.width

    @property
    def split(self) -> bool:
        return self._ranks > 1

    @property
    def tells_greedy(self) -> bool:
        """Whether `likeliest` is worth telling apart from `sample` at temperature 0: kernels find that themselves."""
        return self.split and not self._communicator.draws(torch.empty(1, self.width, device="meta"))

    def likeliest(self, logits: Tensor) -> Tensor:
        """`sample` at temperature 0. One launch, or one reduction in place of eight, where the vocabulary is split."""
        return split_sampling.greedy(logits, self._communicator)

    def sample(self, logits: Tensor, parameters: "Parameters", output: Tensor) -> Tensor:
        """`ops.sample` of whole rows, [S] int64. logits: [S, width]."""
        *values, index = parameters
        if self._ranks == 1:
            return ops.sample(logits, *values, output, index)
        return split_sampling.sample(logits, *values, output, self._communicator)

    def scores(self, logits: Tensor, chosen: Tensor, alternatives: int) -> Scores:
        """logits: [S, width]; chosen: [S] int64, of the whole vocabulary; scores of a negative "id" mean nothing."""
        logits = logits.float()
        if self._ranks == 1:
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, chosen[:, None].clamp(min=0))
            top, ids = logprobs.topk(alternatives, dim=-1)
        else:
            reduce = self._communicator.all_reduce
            largest = reduce(logits.amax(-1, keepdim=True), "tp", largest=True)
            logprobs = logits - largest - reduce((logits - largest).exp().sum(-1, keepdim=True), "tp").log()
            local = chosen[:, None] - self.first
            here = (local >= 0) & (local < self.width)
            own = logprobs.gather(1, local.clamp(0, self.width - 1)).masked_fill(~here, -torch.inf)
            own = reduce(own.contiguous(), "tp", largest=True)
            top, ids = (self._communicator.all_gather(x, 1, "tp") for x in self._likeliest(logprobs, alternatives))
            top, order = top.sort(dim=-1, descending=True, stable=True)
            top, ids = top[:, :alternatives], ids.gather(1, order)[:, :alternatives]
        rank = (logprobs > own).sum(-1) + 1
        if self._ranks > 1:
            rank = self._communicator.all_reduce(rank - 1, "tp") + 1
        return Scores(torch.cat([chosen[:, None], ids], 1), torch.cat([own, top], 1), rank)

    def _likeliest(self, logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        top, ids = logprobs.topk(min(count, self.width), dim=-1)
        return top, ids + self.first


def _temperature(begin: Begin) -> float:
    """Below the least temperature the likeliest id is as good as certain, and scaled logits leave fp32's range."""
    return begin.temperature if begin.temperature >= _LEAST_TEMPERATURE else 0.0


class Choices(NamedTuple):
    """What ids are chosen from: the rows of a Step's samples, the T of each decode row first, then one of each other.

    index, output: [L] int64, of each row the sequence and the number of the output; drafts: [B, T - 1] int64, the ids
    that a decode row's later rows take for certain.
    """

    index: Tensor
    output: Tensor
    drafts: Tensor

    @property
    def width(self) -> int:
        return self.drafts.shape[1] + 1

    def rows(self, sample: int) -> range:
        """Of a sample, by its place among the Step's."""
        decoding, width = len(self.drafts), self.width
        if sample < decoding:
            return range(sample * width, (sample + 1) * width)
        return range(decoding * width + sample - decoding, decoding * width + sample - decoding + 1)


class Parameters(NamedTuple):
    """What `ops.sample` takes of each row beside its logits and the number of its output: [L] each, or, with an `index`
    [L], tables that it points into, which saves the launches that would gather from them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor | None


class Sampler:
    """Sampling parameters and penalty counts of every sequence index.

    The order of what is done to logits is vLLM's: log-probabilities are taken first; then ids are allowed and
    forbidden, biases added, penalties taken off, and last temperature, top-k, top-p and min-p.
    """

    def __init__(self, indices: int, vocabulary: Vocabulary, device: torch.device):
        """V below: the vocabulary's width."""
        self._vocabulary, self._device = vocabulary, device
        self._tells_greedy = vocabulary.tells_greedy
        self._begins: dict[int, Begin] = {}
        self._shape = (indices, vocabulary.width)
        self._floats = torch.zeros(3, indices + 1, device=device)  # temperature, top_p, min_p of each index
        self._top_k = torch.zeros(indices + 1, dtype=torch.int32, device=device)
        self._seed = torch.zeros(indices + 1, dtype=torch.int64, device=device)
        self._counts: Tensor | None = None  # [indices, V] int32: of ids in the output, where a penalty asks for them
        self._seen: Tensor | None = None  # [indices, V] bool: ids in the prompt

    def begin(self, begins: Sequence[Begin]) -> None:
        """Sequences take their indices. Mutates the tables."""
        if not begins:
            return
        index = self._integers([begin.index for begin in begins])
        floats = [[_temperature(b) for b in begins], [b.top_p for b in begins], [b.min_p for b in begins]]
        self._floats[:, index] = to_device(np.array(floats, dtype=np.float32), self._device)
        # Beyond the vocabulary top-k cuts nothing, and an integer of any size would not fit the tensor.
        integers = [[min(max(b.top_k, 0), self._vocabulary.size) for b in begins], [b.seed for b in begins]]
        top_k, self._seed[index] = to_device(np.array(integers, dtype=np.int64), self._device)
        self._top_k[index] = top_k.int()
        for begin in begins:
            self._begins[begin.index] = begin
            if begin.penalised:
                self._count_from_start(begin)

    def plain(self, samples: Sequence[Sample]) -> bool:
        """Whether `draw` alone chooses the ids of these samples: nobody wants more than that."""
        return not any(s.edited or s.logprobs >= 0 or self._begins[s.index].adjusted for s in samples)

    def greedy(self, samples: Sequence[Sample]) -> bool:
        """Whether to tell `draw` that all of these have temperature 0."""
        return self._tells_greedy and all(_temperature(self._begins[s.index]) == 0 for s in samples)

    def draw(self, logits: Tensor, index: Tensor, output: Tensor, greedy: bool = False) -> Tensor:
        """An id from each row of logits [L, V], for output number `output` of sequence `index`, both [L] int64: [L]
        int64, negative where there is none (`ops.sample`). greedy: every row has temperature 0. Reads nothing on the
        host."""
        return self.draw_by(None if greedy else self.parameters(index), logits, output)

    def parameters(self, index: Tensor) -> Parameters:
        """Of sequences `index` [L] int64, for `draw_by`: whoever draws several times behind the same asks once."""
        if self._vocabulary.split:
            temperature, top_p, min_p = self._floats[:, index]
            return Parameters(temperature, self._top_k[index], top_p, min_p, self._seed[index], None)
        temperature, top_p, min_p = self._floats
        return Parameters(temperature, self._top_k, top_p, min_p, self._seed, index)

    def draw_by(self, parameters: Parameters | None, logits: Tensor, output: Tensor) -> Tensor:
        """`draw` by the parameters of the rows; None: every row has temperature 0."""
        if parameters is None:
            return self._vocabulary.likeliest(logits)
        return self._vocabulary.sample(logits, parameters, output)

    def choose(
        self, samples: Sequence[Sample], choices: Choices, logits: Tensor, edits: Sequence[Edit]
    ) -> tuple[Tensor, Scores | None]:
        """An id from each row, [L] int64, and log-probabilities where a sample asks for them. logits: [L, V], not
        changed."""
        x = self._adjust(samples, choices, logits, edits)
        ids = self.draw(x, choices.index, choices.output)
        logprobs = max((sample.logprobs for sample in samples), default=-1)
        return ids, self._vocabulary.scores(logits, ids, logprobs) if logprobs >= 0 else None

    def count(self, samples: Sequence[Sample], choices: Choices, ids: Tensor, accepted: Tensor) -> None:
        """Take note of the ids that count, where penalties do. ids: [L] int64; accepted: [S], how many of each
        sample's. Mutates the counts."""
        penalised = [i for i, sample in enumerate(samples) if self._begins[sample.index].penalised]
        if not penalised:
            return
        rows = self._integers([row for i in penalised for row in choices.rows(i)])
        place = self._integers([at for i in penalised for at in range(len(choices.rows(i)))])
        sample = self._integers([i for i in penalised for _ in choices.rows(i)])
        local, here = self._local_ids(ids[rows])
        here &= place < accepted[sample]
        self._counts.index_put_((choices.index[rows], local), here.int(), accumulate=True)

    def _local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids counted from the rank's first, and whether the rank holds them."""
        local = ids - self._vocabulary.first
        here = (local >= 0) & (local < self._vocabulary.width)
        return local.clamp_(0, self._vocabulary.width - 1), here

    def _adjust(self, samples: Sequence[Sample], choices: Choices, logits: Tensor, edits: Sequence[Edit]) -> Tensor:
        """Logits with what is allowed, forbidden, biased and penalised; the same tensor where nothing is."""
        places: list[tuple[int, int]] = []  # (row, id)
        values: list[float] = []
        early: list[tuple[int, int, int]] = []  # (row, id, outputs before which it is forbidden)
        allowed: list[tuple[int, tuple[int, ...]]] = []
        penalised: list[int] = []
        for i, sample in enumerate(samples):
            begin = self._begins[sample.index]
            if not begin.adjusted:
                continue
            for row in choices.rows(i):
                early += [(row, id, begin.min_tokens) for id in begin.banned]
                places += [(row, id) for id, _ in begin.bias]
                values += [value for _, value in begin.bias]
                if begin.allowed:
                    allowed.append((row, begin.allowed))
            if begin.penalised:
                penalised.append(i)
        for edit in edits:
            places += [(choices.rows(edit.sample)[edit.place], id) for id in edit.banned]
            values += [-torch.inf] * len(edit.banned)
        masked = [edit for edit in edits if edit.allowed]
        if not (places or early or allowed or penalised or masked):
            return logits
        x, vocabulary = logits.float().clone(), self._vocabulary
        values = [value for value, (_, id) in zip(values, places, strict=True) if vocabulary.holds(id)]
        places = [(row, id - vocabulary.first) for row, id in places if vocabulary.holds(id)]
        early = [(row, id - vocabulary.first, end) for row, id, end in early if vocabulary.holds(id)]
        for row, ids in allowed:
            ids = self._local(ids)
            kept = x[row, ids]
            x[row].fill_(-torch.inf)[ids] = kept
        if masked:
            x = self._mask(x, choices, masked)
        if early:
            rows, ids, end = to_device(np.array(early, dtype=np.int64).T.copy(), self._device)
            forbidden = torch.where(choices.output[rows] < end, -torch.inf, 0.0)
            x.index_put_((rows, ids), forbidden, accumulate=True)
        if places:
            rows, ids = to_device(np.array(places, dtype=np.int64).T.copy(), self._device)
            x.index_put_((rows, ids), to_device(np.array(values, dtype=np.float32), self._device), accumulate=True)
        if penalised:
            self._penalise(x, choices, penalised, [self._begins[samples[i].index] for i in penalised])
        return x

    def _mask(self, x: Tensor, choices: Choices, edits: Sequence[Edit]) -> Tensor:
        masks = np.stack([np.frombuffer(edit.allowed, dtype=np.int32) for edit in edits])
        bits = to_device(masks, self._device)[..., None] >> torch.arange(32, dtype=torch.int32, device=self._device) & 1
        rows = self._integers([choices.rows(edit.sample)[edit.place] for edit in edits])
        first, width = self._vocabulary.first, self._vocabulary.width
        allowed = bits.bool().flatten(1)[:, first : first + width]
        x[rows] = x[rows].masked_fill(~allowed, -torch.inf)
        return x

    def _penalise(self, x: Tensor, choices: Choices, samples: Sequence[int], begins: Sequence[Begin]) -> None:
        """Mutates x. A decode row's later rows count its drafts before them, which they take for certain."""
        rows = self._integers([row for i in samples for row in choices.rows(i)])
        values = [
            (b.repetition_penalty, b.frequency_penalty, b.presence_penalty)
            for i, b in zip(samples, begins, strict=True)
            for _ in choices.rows(i)
        ]
        repetition, frequency, presence = to_device(np.array(values, dtype=np.float32).T.copy(), self._device)[
            ..., None
        ]
        counts = self._counts[choices.index[rows]]
        drafted = [
            (at, i, k)
            for at, (i, place) in enumerate((i, place) for i in samples for place in range(len(choices.rows(i))))
            for k in range(place)
        ]
        if drafted:
            at, sample, k = to_device(np.array(drafted, dtype=np.int64).T.copy(), self._device)
            local, here = self._local_ids(choices.drafts[sample, k])
            counts.index_put_((at, local), here.int(), accumulate=True)
        seen = self._seen[choices.index[rows]] | (counts > 0)
        before = x[rows]
        after = torch.where(seen, torch.where(before > 0, before / repetition, before * repetition), before)
        x[rows] = after - frequency * counts - presence * (counts > 0)

    def _count_from_start(self, begin: Begin) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        counts, seen = self._counts[begin.index].zero_(), self._seen[begin.index].zero_()
        output = self._local(begin.output)
        counts.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        seen[self._local(begin.prompt)] = True

    def _local(self, ids: Sequence[int]) -> Tensor:
        """Those of the ids that this rank holds, counted from its first."""
        return self._integers([id - self._vocabulary.first for id in ids if self._vocabulary.holds(id)])

    def _integers(self, values: Sequence[int]) -> Tensor:
        return to_device(np.array(values, dtype=np.int64), self._device)
