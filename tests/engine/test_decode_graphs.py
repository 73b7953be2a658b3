"""On a card: decode steps by CUDA graphs give what the same steps give one by one, with drafts and without, wherever a
sequence's index, slot and pages lie."""

from dataclasses import replace

import pytest
import torch

from tokenspeed import ops
from tokenspeed.engine.config import DenseConfig
from tokenspeed.engine.executor.draft_costs import draft_costs
from tokenspeed.engine.executor.loading import slot_sizes
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.schedule.step import Begin, DecodeRow, NewPages, PrefillRow, Sample, Step
from tokenspeed.engine.sizes import PUBLISHED

CUDA, SEQUENCES, PAGES = torch.device("cuda"), 2, 8

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "accept_tokens" not in ops.compiled_operators(), reason="needs a card and kernels"
)


@pytest.fixture(scope="module", params=["0.8B", "35B-A3B"])
def model(request):
    config = replace(PUBLISHED[request.param], layer_types=PUBLISHED[request.param].layer_types[:4])
    made = Qwen3_5.empty(config, torch.bfloat16, CUDA, mtp=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("a_log", "dt_bias")):
                parameter.uniform_(-4, 0)
            else:
                parameter.normal_(0, 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return made


class Decoding:
    """Two sequences behind prompts of 200 tokens. index, slot, page: the first of each."""

    def __init__(self, model: Qwen3_5, drafts: int, index: int = 1, slot: int = 1, page: int = 1):
        layout = MemoryLayout(model.share, torch.bfloat16, *slot_sizes(model.config, drafts, kernel=True))
        memory = Memory(layout, SEQUENCES * PAGES + 1, SEQUENCES + 1, CUDA)
        self.runner = Runner(model, memory, SEQUENCES + 1, PAGES * 64, drafts)
        self.index, self.drafts = index, drafts
        begins = tuple(Begin(index + i, 0.0, 0, 1.0, 0.0, 0) for i in range(SEQUENCES))
        pages = tuple(
            NewPages(index + i, 0, tuple(range(page + i * PAGES, page + (i + 1) * PAGES))) for i in range(SEQUENCES)
        )
        ids = torch.randint(0, 9999, (SEQUENCES, 200), generator=torch.Generator().manual_seed(5)).tolist()
        rows = tuple(PrefillRow(tuple(ids[i]), 0, slot + i, slot + i, index + i) for i in range(SEQUENCES))
        samples = tuple(Sample(i, index + i) for i in range(SEQUENCES))
        self._prefill = Step(prefill=rows, begins=begins, pages=pages, samples=samples)
        self.begin()
        decode = tuple(DecodeRow(index + i, slot + i, slot + i) for i in range(SEQUENCES))
        self.step = Step(decode=decode, width=1 + drafts, samples=samples, drafts=drafts)

    def begin(self) -> None:
        self.runner.choose(self._prefill, self.runner.forward(self._prefill), ())

    def go_on(self) -> torch.Tensor:
        """Logits behind the first token of each sequence, fp32, after one step."""
        forwarded = self.runner.forward(self.step)
        logits = forwarded.logits[:: 1 + self.drafts][:SEQUENCES].float().clone()
        self.runner.choose(self.step, forwarded, ())
        return logits

    def follow(self, ids: torch.Tensor, wrong: int = 0) -> None:
        """From now on choose and draft what `ids` says, [indices, tokens] by a token's place in its sequence. wrong:
        every so many drafts, one is not what is chosen."""
        last = ids.shape[1] - 1

        sampler, self.wrong = self.runner.sampler, wrong
        sampler.parameters = lambda index: index
        sampler.draw_by = lambda index, logits, output: ids[index, output.clamp(0, last)]

    def walk(self, tokens: int) -> tuple[list[torch.Tensor], int]:
        """Logits behind that many tokens of each sequence, [tokens, V] fp32, and in how many steps."""
        tables, rows = self.runner.tables, slice(self.index, self.index + SEQUENCES)
        found, steps = [[] for _ in range(SEQUENCES)], 0
        while min(map(len, found)) < tokens:
            if self.drafts and self.wrong:
                places = tables.length[rows, None] + torch.arange(1, 1 + self.drafts, device=CUDA)
                tables.ids[rows, 1:] += (places % self.wrong == 0).long()
            forwarded = self.runner.forward(self.step)
            logits = forwarded.logits.float().view(-1, 1 + self.drafts, forwarded.logits.shape[1]).clone()
            news, _ = self.runner.choose(self.step, forwarded, ())
            for own, row, (count, *_) in zip(found, logits, news.tolist(), strict=False):
                own += row[:count]
            steps += 1
        return [torch.stack(own[:tokens]) for own in found], steps


PLACES = [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("drafts", [0, 3])
@torch.inference_mode()
def test_the_next_logits_are_those_of_a_token_alone(model, drafts, graphs, place):
    expected, decoding = Decoding(model, 0).go_on(), Decoding(model, drafts, *place)
    if graphs:
        memory = decoding.runner.memory
        before = memory.kv.view(torch.int16).clone(), memory.slots.clone()
        assert decoding.runner.capture(lambda sequences: drafts, progress=False)
        assert torch.equal(before[0], memory.kv.view(torch.int16)) and torch.equal(before[1], memory.slots)
    found = decoding.go_on()
    distance = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert distance.max() < 0.03, f"of each sequence: {distance.tolist()}"


@pytest.mark.parametrize("place", [(1, 1, 1), (0, 0, 0)], ids=str)
@torch.inference_mode()
def test_logits_behind_drafts_are_those_of_tokens_one_by_one(model, place):
    """Given the same ids, right drafts and wrong ones leave every sequence where tokens one by one would: bf16 rounds
    differently with the number of rows, and of random weights the likeliest ids nearly tie, so ids are not compared."""
    ids = torch.randint(0, 9999, (SEQUENCES + 2, 400), generator=torch.Generator().manual_seed(6)).to(CUDA)
    alone, decoding = Decoding(model, 0, *place), Decoding(model, 3, *place)
    alone.follow(ids)
    decoding.follow(ids, wrong=5)
    assert decoding.runner.capture(lambda sequences: 3, progress=False)
    expected, steps = alone.walk(100)
    assert steps == 100
    found, steps = decoding.walk(100)
    assert steps < 60, "drafts that are right count"
    for ours, theirs in zip(found, expected, strict=True):
        distance = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
        # Where experts nearly tie, rounding decides who is chosen; logits of other tokens would be 1.4 apart.
        assert distance.max() < (0.03 if isinstance(model.config.ffn, DenseConfig) else 0.7), distance.tolist()


@pytest.mark.parametrize("drafts", [0, 3])
@torch.inference_mode()
def test_what_follows_on_ids_does_not_depend_on_how_they_were_chosen(model, drafts):
    """By a graph, or without one where log-probabilities are wanted: what is drafted and kept is the same, bit for
    bit."""
    kept = []
    for logprobs in (-1, 0):
        decoding = Decoding(model, 3)
        runner = decoding.runner
        assert runner.capture(lambda sequences: 3, progress=False)
        samples = tuple(sample._replace(logprobs=logprobs) for sample in decoding.step.samples)
        for depth in (3, 3, drafts):
            decoding.step = replace(decoding.step, samples=samples, drafts=depth)
            decoding.go_on()
        kept.append((runner.tables.ids, runner.memory.hidden[:-1], runner.memory.kv.view(torch.int16)))
    assert all(map(torch.equal, *kept))


@torch.inference_mode()
def test_timing_what_drafts_cost_leaves_nothing_behind(model):
    decoding = Decoding(model, 3)
    assert decoding.runner.capture(lambda sequences: 3, progress=False)
    expected = [decoding.go_on() for _ in range(3)]
    costs = draft_costs(decoding.runner, lambda sequences: 3)
    assert [sequences for sequences, _ in costs] == [1, 2, 3] and min(cost for _, cost in costs) > 0
    decoding.begin()
    assert all(torch.equal(decoding.go_on(), logits) for logits in expected)
