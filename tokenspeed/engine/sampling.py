"""Choosing ids on the device: what each sequence asked for, applied to a Step's logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .batch import to_device
from .parallel import sampling as split_sampling
from .parallel.comm import ONE_RANK, Communicator
from .request import TokenScores
from .step import Begin, Edit, Sample

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
        self.width, self.first = width, width * communicator.mesh.index("tp")
        self._ranks, self._communicator = communicator.mesh.size("tp"), communicator
        self.size = width * self._ranks

    def holds(self, id: int) -> bool:
        return self.first <= id < self.first + self.width

    def sample(self, logits: Tensor, *arguments: Tensor) -> Tensor:
        """`ops.sample` of whole rows, [S] int64. logits: [S, width]."""
        if self._ranks == 1:
            return ops.sample(logits, *arguments)
        return split_sampling.sample(logits, *arguments, self._communicator)

    def scores(self, logits: Tensor, chosen: Tensor, alternatives: int) -> Scores:
        """logits: [S, width]; chosen: [S] int64, of the whole vocabulary."""
        logits = logits.float()
        if self._ranks == 1:
            logprobs = logits.log_softmax(-1)
            own = logprobs.gather(1, chosen[:, None])
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


class _Prepared(NamedTuple):
    """What choosing for some samples takes on the host, kept while the same are chosen for.

    outputs: int64; in_order: sample i chooses from row i of the logits; adjusted: whether `Sampler._adjust` may have
    something to do; penalised: places of those whose ids are counted; most: alternatives, -1 for no log-probabilities.
    """

    samples: Sequence[Sample]
    outputs: np.ndarray
    in_order: bool
    adjusted: bool
    penalised: list[int]
    most: int


class Sampler:
    """Sampling parameters, penalty counts and the last id of every sequence index.

    The order of what is done to logits is vLLM's: log-probabilities are taken first; then ids are allowed and
    forbidden, biases added, penalties taken off, and last temperature, top-k, top-p and min-p.
    """

    def __init__(self, indices: int, vocabulary: Vocabulary, last_ids: Tensor):
        """last_ids: [indices] int64, written at every choice. V below: the vocabulary's width."""
        self._vocabulary, self._last_ids, self._device = vocabulary, last_ids, last_ids.device
        self._begins: dict[int, Begin] = {}
        self._shape = (indices, vocabulary.width)
        self._counts: Tensor | None = None  # [indices, V] int32: of ids in the output, where a penalty asks for them
        self._seen: Tensor | None = None  # [indices, V] bool: ids in prompt or output
        self._columns: tuple[tuple[int, ...], list[Tensor]] = ((), [])  # of the last choice, by its indices
        self._prepared: _Prepared | None = None  # the last choice

    def begin(self, begins: Sequence[Begin]) -> None:
        """Sequences take their indices. Mutates the tables."""
        for begin in begins:
            self._begins[begin.index] = begin
            self._columns = ((), [])
            self._prepared = None
            if begin.penalised:
                self._count_from_start(begin)

    def choose(
        self, samples: Sequence[Sample], logits: Tensor, edits: Sequence[Edit], ahead: int = 0
    ) -> tuple[Tensor, Scores | None]:
        """An id for each sample, [S] int64, and log-probabilities where one asks for them. logits: [L, V], not changed.
        ahead: by how many each sample's output is later than it says. Mutates the last ids and the counts."""
        if self._prepared is None or self._prepared.samples is not samples:
            self._prepared = self._prepare(samples)
        prepared = self._prepared
        if not prepared.in_order or len(samples) != len(logits):
            logits = logits[self._integers([sample.logits for sample in samples])]
        index, *columns = self._columns[1]
        x = self._adjust(samples, index, logits, edits, ahead) if prepared.adjusted or edits else logits
        ids = self._vocabulary.sample(x, *columns, to_device(prepared.outputs + ahead, self._device))
        self._last_ids[index] = ids
        if prepared.penalised:
            rows = self._integers(prepared.penalised)
            local = ids[rows] - self._vocabulary.first
            here = ((local >= 0) & (local < self._vocabulary.width)).int()
            local.clamp_(0, self._vocabulary.width - 1)
            self._counts[index[rows], local] += here
            self._seen[index[rows], local] |= here.bool()
        most = prepared.most
        return ids, self._vocabulary.scores(logits, ids, most) if most >= 0 else None

    def _prepare(self, samples: Sequence[Sample]) -> "_Prepared":
        indices = tuple(sample.index for sample in samples)
        if indices != self._columns[0]:
            self._columns = (indices, self._gather(indices))
        begins = [self._begins[index] for index in indices]
        return _Prepared(
            samples,
            np.array([sample.output for sample in samples], dtype=np.int64),
            [sample.logits for sample in samples] == list(range(len(samples))),
            any(b.bias or b.allowed or b.penalised or b.min_tokens for b in begins),
            [i for i, begin in enumerate(begins) if begin.penalised],
            max(sample.logprobs for sample in samples),
        )

    def _gather(self, indices: tuple[int, ...]) -> list[Tensor]:
        """The index and the arguments of `ops.sample` for these sequences, in its order."""
        begins = [self._begins[index] for index in indices]
        # Beyond the vocabulary top-k cuts nothing, and an integer of any size would not fit the tensor.
        integers = [[*indices], [b.seed for b in begins], [min(max(b.top_k, 0), self._vocabulary.size) for b in begins]]
        index, seed, top_k = to_device(np.array(integers, dtype=np.int64), self._device)
        floats = [[_temperature(b) for b in begins], [b.top_p for b in begins], [b.min_p for b in begins]]
        temperature, top_p, min_p = to_device(np.array(floats, dtype=np.float32), self._device)
        return [index, temperature, top_k.int(), top_p, min_p, seed]

    def _adjust(
        self, samples: Sequence[Sample], index: Tensor, logits: Tensor, edits: Sequence[Edit], ahead: int
    ) -> Tensor:
        """Logits with what is allowed, forbidden, biased and penalised; the same tensor where nothing is."""
        places: list[tuple[int, int]] = []  # (sample, id)
        values: list[float] = []
        allowed: list[tuple[int, tuple[int, ...]]] = []
        penalised: list[int] = []
        for i, sample in enumerate(samples):
            begin = self._begins[sample.index]
            if sample.output + ahead < begin.min_tokens:
                places += [(i, id) for id in begin.banned]
                values += [-torch.inf] * len(begin.banned)
            places += [(i, id) for id, _ in begin.bias]
            values += [value for _, value in begin.bias]
            if begin.allowed:
                allowed.append((i, begin.allowed))
            if begin.penalised:
                penalised.append(i)
        for edit in edits:
            places += [(edit.sample, id) for id in edit.banned]
            values += [-torch.inf] * len(edit.banned)
        masked = [edit for edit in edits if edit.allowed]
        if not (places or allowed or penalised or masked):
            return logits
        x, vocabulary = logits.float().clone(), self._vocabulary
        values = [value for value, (_, id) in zip(values, places, strict=True) if vocabulary.holds(id)]
        places = [(i, id - vocabulary.first) for i, id in places if vocabulary.holds(id)]
        for i, ids in allowed:
            ids = self._local(ids)
            kept = x[i, ids]
            x[i].fill_(-torch.inf)[ids] = kept
        if masked:
            x = self._mask(x, masked)
        if places:
            rows, ids = to_device(np.array(places, dtype=np.int64).T.copy(), self._device)
            x.index_put_((rows, ids), to_device(np.array(values, dtype=np.float32), self._device), accumulate=True)
        if penalised:
            rows = self._integers(penalised)
            x[rows] = self._penalise(x[rows], index[rows], [self._begins[samples[i].index] for i in penalised])
        return x

    def _mask(self, x: Tensor, edits: Sequence[Edit]) -> Tensor:
        words = np.stack([np.frombuffer(edit.allowed, dtype=np.int32) for edit in edits])
        bits = to_device(words, self._device)[..., None] >> torch.arange(32, dtype=torch.int32, device=self._device) & 1
        rows = self._integers([edit.sample for edit in edits])
        first, width = self._vocabulary.first, self._vocabulary.width
        allowed = bits.bool().flatten(1)[:, first : first + width]
        x[rows] = x[rows].masked_fill(~allowed, -torch.inf)
        return x

    def _penalise(self, x: Tensor, index: Tensor, begins: Sequence[Begin]) -> Tensor:
        values = [(b.repetition_penalty, b.frequency_penalty, b.presence_penalty) for b in begins]
        repetition, frequency, presence = to_device(np.array(values, dtype=np.float32).T.copy(), self._device)[
            ..., None
        ]
        counts = self._counts[index]
        x = torch.where(self._seen[index], torch.where(x > 0, x / repetition, x * repetition), x)
        return x - frequency * counts - presence * (counts > 0)

    def _count_from_start(self, begin: Begin) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        counts, seen = self._counts[begin.index].zero_(), self._seen[begin.index].zero_()
        output = self._local(begin.output)
        counts.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        seen[output] = True
        seen[self._local(begin.prompt)] = True

    def _local(self, ids: Sequence[int]) -> Tensor:
        """Those of the ids that this rank holds, counted from its first."""
        return self._integers([id - self._vocabulary.first for id in ids if self._vocabulary.holds(id)])

    def _integers(self, values: Sequence[int]) -> Tensor:
        return to_device(np.array(values, dtype=np.int64), self._device)
