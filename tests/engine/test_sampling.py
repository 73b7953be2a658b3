"""Sampling against exact distributions, computed apart in numpy from the published definitions; noise that depends on
nothing but its counter; log-probabilities that are the model's own."""

from random import Random

import numpy as np
import pytest
import torch

from tokenspeed.engine.executor.sampling import Choices, Sampler, Vocabulary
from tokenspeed.engine.schedule.step import Begin, Edit, Sample

VOCAB = 24
DRAWS = 3000
LOGITS = torch.linspace(-2.5, 2.5, VOCAB, dtype=torch.float64)[torch.randperm(VOCAB, generator=torch.manual_seed(5))]
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
FIRST, SECOND, THIRD = LOGITS.topk(3).indices.tolist()  # penalties of rare ids would not show
PROMPT, OUTPUT = (FIRST, 2, 2, SECOND), (SECOND, THIRD, THIRD, THIRD, 5)


def adjusted(begin: Begin, output: int = 0, edit: Edit | None = None) -> np.ndarray:
    """Logits after everything but the cut and the temperature: allowed and forbidden ids, biases, then penalties."""
    x = LOGITS.numpy().copy()
    if begin.allowed:
        x[[i for i in range(VOCAB) if i not in begin.allowed]] = -np.inf
    for id in (*(begin.banned if output < begin.min_tokens else ()), *(edit.banned if edit else ())):
        x[id] = -np.inf
    if edit and edit.allowed:
        mask = int.from_bytes(edit.allowed, "little")
        x[[i for i in range(VOCAB) if not mask >> i & 1]] = -np.inf
    for id, value in begin.bias:
        x[id] += value
    for id in {*begin.prompt, *begin.output}:
        x[id] = x[id] / begin.repetition_penalty if x[id] > 0 else x[id] * begin.repetition_penalty
    for id in set(begin.output):
        x[id] -= begin.frequency_penalty * begin.output.count(id) + begin.presence_penalty
    return x


def distribution(begin: Begin, output: int = 0, edit: Edit | None = None) -> np.ndarray:
    """Exact probabilities. LOGITS have no ties, so every cut is unambiguous."""
    x = adjusted(begin, output, edit)
    if begin.temperature == 0:
        return np.eye(VOCAB)[x.argmax()]
    p = np.exp((x - x.max()) / begin.temperature)
    p /= p.sum()
    order, kept = np.argsort(-p), np.ones(VOCAB, dtype=bool)
    if begin.top_k > 0:
        kept[order[begin.top_k :]] = False
    if begin.top_p < 1:
        nucleus = np.where(kept, p, 0)[order]
        reached = np.cumsum(nucleus) - nucleus >= begin.top_p * nucleus.sum()
        kept[order[reached]] = False
    kept &= p >= begin.min_p * p.max()
    return np.where(kept, p, 0) / p[kept].sum()


def new_sampler(indices: int) -> Sampler:
    return Sampler(indices, Vocabulary(VOCAB), torch.device("cpu"))


def choose(sampler: Sampler, index, output, logits, edits=(), logprobs=None, drafts=None, accepted=None):
    """Ids and log-probabilities of sequences `index` for outputs `output`, a row of logits each; of which all count.

    drafts: [B, T - 1], where each sequence has T rows; accepted: how many ids of each count."""
    wanted = logprobs or [-1] * len(index)
    samples = [Sample(i, at, k, edited=bool(edits)) for i, (at, k) in enumerate(zip(index, wanted, strict=True))]
    drafts = torch.zeros(0, 0, dtype=torch.int64) if drafts is None else drafts
    width = drafts.shape[1] + 1
    rows = torch.tensor(list(index)).repeat_interleave(width)
    choices = Choices(rows, torch.tensor(list(output)), drafts)
    ids, scores = sampler.choose(samples, choices, logits, edits)
    sampler.count(samples, choices, ids, torch.tensor(accepted or [width] * len(index)))
    return ids, scores


def draw(begin: Begin, output: int = 0, edit: Edit | None = None, draws: int = DRAWS) -> np.ndarray:
    """One id for each of as many seeds, as sequences that are sampled side by side."""
    sampler = new_sampler(draws)
    sampler.begin([begin._replace(index=i, seed=1000 + i) for i in range(draws)])
    edits = [edit._replace(sample=i) for i in range(draws)] if edit else []
    return choose(sampler, range(draws), [output] * draws, LOGITS.float().expand(draws, -1), edits)[0].numpy()


def agree(ids: np.ndarray, p: np.ndarray) -> None:
    """Pearson's chi-square, five standard deviations wide. Ids of no probability must not occur; rare ones count
    together."""
    counts = np.bincount(ids, minlength=VOCAB)
    assert not counts[p == 0].any(), f"forbidden ids were drawn: {np.flatnonzero(counts * (p == 0))}"
    expected = p * len(ids)
    rare = (expected < 5) & (p > 0)
    seen = np.append(counts[~rare & (p > 0)], counts[rare].sum())
    wanted = np.append(expected[~rare & (p > 0)], expected[rare].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(seen) - 1
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5, f"chi-square {statistic:.1f} of {freedom} degrees"


PENALISED = {"prompt": PROMPT, "output": OUTPUT}
ASKED = {
    "temperature 1": {},
    "temperature .3": {"temperature": 0.3},
    "temperature 4": {"temperature": 4.0},
    "greedy": {"temperature": 0.0},
    "almost greedy": {"temperature": 1e-40},
    "top-k 1": {"top_k": 1},
    "top-k 5": {"top_k": 5},
    "top-k beyond the vocabulary": {"top_k": 2**70},
    "top-p .5": {"top_p": 0.5},
    "top-p of the likeliest alone": {"top_p": 1e-6},
    "min-p .2": {"min_p": 0.2},
    "min-p 1": {"min_p": 1.0},
    "top-k, then top-p of what is left": {"top_k": 6, "top_p": 0.6},
    "top-p of the scaled logits": {"temperature": 0.5, "top_p": 0.8},
    "everything at once": {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
    "presence": {"presence_penalty": 1.5, **PENALISED},
    "frequency": {"frequency_penalty": 0.7, **PENALISED},
    "negative penalties": {"frequency_penalty": -0.5, "presence_penalty": -0.4, **PENALISED},
    "repetition": {"repetition_penalty": 1.8, **PENALISED},
    "repetition below 1": {"repetition_penalty": 0.6, **PENALISED},
    "all penalties": {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.5,
        "temperature": 0.8,
        **PENALISED,
    },
    "penalties come after biases": {"repetition_penalty": 2.0, "bias": ((SECOND, 4.0), (THIRD, -3.0)), **PENALISED},
    "bias": {"bias": ((0, 2.0), (7, -100.0), (7, 3.0))},
    "allowed": {"allowed": (2, 9, 17)},
    "a bias allows nothing": {"allowed": (2, 9), "bias": ((5, 100.0),)},
    "end ids before min_tokens": {"min_tokens": 1, "banned": (11, 12)},
    "end ids from min_tokens on": {"min_tokens": 0, "banned": (11, 12)},
}


@pytest.mark.parametrize("name", ASKED)
def test_ids_follow_the_exact_distribution(name):
    begin = Begin(0, **PLAIN | ASKED[name])
    exact = begin._replace(temperature=0.0) if name == "almost greedy" else begin
    agree(draw(begin), distribution(exact))


BITS = (0b1011 << 4).to_bytes(4, "little")


@pytest.mark.parametrize("edit", [Edit(0, banned=(3, 20)), Edit(0, BITS), Edit(0, BITS, (5,))])
def test_what_the_host_decides_is_kept(edit):
    begin = Begin(0, **PLAIN)
    agree(draw(begin, edit=edit), distribution(begin, edit=edit))


def test_what_the_host_decides_behind_drafts_is_kept_at_each_place():
    sampler, places = new_sampler(2), 3
    sampler.begin([Begin(i, **PLAIN | {"temperature": 0.0}) for i in range(2)])
    edits = [Edit(1, BITS, place=1), Edit(0, banned=(9,), place=2), Edit(1, banned=(9,))]
    likes = torch.zeros(2 * places, VOCAB)
    likes[:, 9], likes[:, 8], likes[:, 5] = 3.0, 2.0, 1.0
    drafts = torch.zeros(2, places - 1, dtype=torch.int64)
    ids, _ = choose(sampler, [0, 1], [0, 1, 2, 0, 1, 2], likes, edits, drafts=drafts)
    assert ids.view(2, places).tolist() == [[9, 9, 8], [8, 5, 9]]


@pytest.mark.parametrize("output", [0, 1, 2, 7])
def test_end_ids_are_forbidden_for_as_many_outputs_as_asked_and_then_no_more(output):
    begin = Begin(0, **PLAIN, min_tokens=2, banned=(FIRST, SECOND))
    agree(draw(begin, output), distribution(begin, output))


def test_the_noise_of_one_output_says_nothing_about_the_next():
    begin = Begin(0, **PLAIN)
    first, second = draw(begin, 0), draw(begin, 1)
    for id in np.flatnonzero(np.bincount(first, minlength=VOCAB) > 300):
        agree(second[first == id], distribution(begin))


def test_neighbouring_seeds_are_independent():
    begin = Begin(0, **PLAIN)
    ids = draw(begin)
    for id in np.flatnonzero(np.bincount(ids[:-1], minlength=VOCAB) > 300):
        agree(ids[1:][ids[:-1] == id], distribution(begin))


# ---- a sequence among others


def random_begin(random: Random) -> Begin:
    asked = {
        "temperature": [0.0, 0.7, 1.0, 2.0],
        "top_k": [-1, 0, 3],
        "top_p": [1.0, 0.6],
        "min_p": [0.0, 0.1],
        "presence_penalty": [0.0, 1.0],
        "frequency_penalty": [0.0, 0.5],
        "repetition_penalty": [1.0, 1.5],
        "min_tokens": [0, 4],
        "bias": [(), ((2, 3.0),)],
        "allowed": [(), (1, 2, 3, 4, 5, 6, 7)],
    }
    chosen = {name: random.choice(values) for name, values in asked.items()}
    return Begin(0, seed=random.randrange(2**63), banned=(4, 5), prompt=PROMPT, **chosen)


def sequence_alone(begin: Begin, logits: torch.Tensor) -> list[int]:
    """The ids that a sequence gets when it always has the device for itself. logits: [T, V], of its steps."""
    sampler = new_sampler(1)
    sampler.begin([begin])
    return [choose(sampler, [0], [i], row[None])[0].item() for i, row in enumerate(logits)]


@pytest.mark.parametrize("seed", range(15))
def test_a_sequence_gets_its_ids_in_any_batch_at_any_row_and_after_any_preemption(seed):
    random, steps = Random(seed), 8
    begins = [random_begin(random) for _ in range(5)]
    logits = torch.randn(len(begins), steps, VOCAB, generator=torch.manual_seed(seed))
    free = list(range(len(begins) + 3))
    random.shuffle(free)
    sampler = new_sampler(len(free))
    at, outputs = {}, [[] for _ in begins]
    while any(len(ids) < steps for ids in outputs):
        unfinished = [i for i, ids in enumerate(outputs) if len(ids) < steps]
        batch = random.sample(unfinished, random.randint(1, len(unfinished)))
        for i in batch:
            if i in at and random.random() < 0.2:  # gives way, and comes back at another index
                free.append(at.pop(i))
            if i not in at:
                at[i] = free.pop(random.randrange(len(free)))
                sampler.begin([begins[i]._replace(index=at[i], output=tuple(outputs[i]))])
        rows = torch.stack([logits[i, len(outputs[i])] for i in batch])
        ids, _ = choose(sampler, [at[i] for i in batch], [len(outputs[i]) for i in batch], rows)
        for i, id in zip(batch, ids.tolist(), strict=True):
            outputs[i].append(id)
    for begin, ids, rows in zip(begins, outputs, logits, strict=True):
        assert ids == sequence_alone(begin, rows)


def test_a_new_sequence_at_an_index_brings_its_own_parameters():
    hot, logits = Begin(0, **PLAIN), LOGITS.float().repeat(8, 1)
    sampler = new_sampler(1)
    sampler.begin([hot._replace(temperature=0.0)])
    choose(sampler, [0], [0], logits[:1])
    sampler.begin([hot])
    ids = [choose(sampler, [0], [i], logits[:1])[0].item() for i in range(8)]
    assert ids == sequence_alone(hot, logits) and len(set(ids)) > 1


@pytest.mark.parametrize("seed", range(12))
def test_ids_behind_drafts_that_are_right_are_those_of_one_step_after_the_other(seed):
    """Whatever a sequence asks for: penalties count the drafts before a row, min_tokens ends between two of them."""
    random, width = Random(seed), 4
    begins = [random_begin(random)._replace(index=i) for i in range(4)]
    logits = torch.randn(len(begins), 3 * width, VOCAB, generator=torch.manual_seed(seed))
    alone = [sequence_alone(begin._replace(index=0), rows) for begin, rows in zip(begins, logits, strict=True)]
    sampler, done = new_sampler(len(begins)), [0] * len(begins)
    sampler.begin(begins)
    while active := [i for i, count in enumerate(done) if count + width <= 3 * width]:
        drafts, accepted = [], []
        for i in active:
            right = random.randint(0, width - 1)
            wrong = [(id + 1) % VOCAB for id in alone[i][done[i] + right : done[i] + width - 1]]
            drafts.append(alone[i][done[i] : done[i] + right] + wrong)
            accepted.append(right + 1)
        rows = torch.cat([logits[i, done[i] : done[i] + width] for i in active])
        output = [done[i] + k for i in active for k in range(width)]
        ids, _ = choose(sampler, active, output, rows, drafts=torch.tensor(drafts), accepted=accepted)
        for row, i in enumerate(active):
            found = ids[row * width : row * width + accepted[row]].tolist()
            assert found == alone[i][done[i] : done[i] + accepted[row]]
            done[i] += accepted[row]


def test_log_probabilities_come_for_every_row_of_drafts():
    sampler, logits = new_sampler(2), torch.randn(6, VOCAB, generator=torch.manual_seed(2))
    sampler.begin([Begin(i, **PLAIN) for i in range(2)])
    drafts = torch.zeros(2, 2, dtype=torch.int64)
    ids, scores = choose(sampler, [0, 1], [0, 1, 2, 0, 1, 2], logits, logprobs=[2, -1], drafts=drafts)
    for row, found in enumerate(scores.rows([2] * 6)):
        exact = logits[row].double().log_softmax(-1)
        assert found.ids[0] == ids[row] and np.allclose(found.logprobs, exact[list(found.ids)], atol=1e-6)


def test_penalties_count_what_was_generated_since():
    begin = Begin(0, **PLAIN | {"temperature": 0.0}, frequency_penalty=2.0, prompt=PROMPT)
    assert sequence_alone(begin, LOGITS.float().repeat(4, 1)) == greedy_with_frequency(2.0, 4)


def greedy_with_frequency(penalty: float, steps: int) -> list[int]:
    x, ids = LOGITS.numpy().copy(), []
    for _ in range(steps):
        ids.append(int(x.argmax()))
        x[ids[-1]] -= penalty
    return ids


# ---- log-probabilities


def test_log_probabilities_are_those_of_the_models_own_logits():
    begin = Begin(0, **PLAIN | {"temperature": 0.3, "top_k": 2}, bias=((7, 50.0),), repetition_penalty=2.0, prompt=(7,))
    sampler = new_sampler(2)
    sampler.begin([begin, begin._replace(index=1, seed=4)])
    logits = torch.stack([LOGITS, LOGITS.flip(0)]).float()
    ids, scores = choose(sampler, [0, 1], [0, 0], logits, logprobs=[3, 0])
    assert ids.tolist() == [7, 7]
    first, second = scores.rows([3, 0])
    for row, found in ((0, first), (1, second)):
        exact = logits[row].double().log_softmax(-1)
        assert np.allclose(found.logprobs, exact[list(found.ids)], atol=1e-6)
        assert found.ids[0] == 7
        assert found.ranks == (1 + int((exact > exact[7]).sum()), *range(1, len(found.ids)))
    assert first.ids[1:] == tuple(LOGITS.topk(3).indices.tolist()) and len(second.ids) == 1


def test_scores_of_given_tokens_are_log_softmax_in_bf16_too():
    logits = torch.randn(5, VOCAB, generator=torch.manual_seed(1)).bfloat16()
    chosen = torch.tensor([3, 0, 23, 7, 7])
    for row, found in enumerate(Vocabulary(VOCAB).scores(logits, chosen, 2).rows([2] * 5)):
        exact = logits[row].double().log_softmax(-1)
        assert np.allclose(found.logprobs, exact[list(found.ids)], atol=1e-6)
        assert found.ids[0] == chosen[row] and found.logprobs[1] >= found.logprobs[2]


def test_sampling_leaves_the_logits_as_they_are():
    logits = LOGITS[None].float()
    before = logits.clone()
    sampler = new_sampler(1)
    sampler.begin([Begin(0, **PLAIN, repetition_penalty=2.0, bias=((1, 2.0),), allowed=(1, 2), prompt=PROMPT)])
    choose(sampler, [0], [0], logits, [Edit(0, BITS)])
    assert torch.equal(logits, before)
