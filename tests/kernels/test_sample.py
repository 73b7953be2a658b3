"""Claims about `sample`: exact distributions and cuts, noise that is a function of its counter; the kernel agrees."""

import math

import pytest
import torch

import tokenspeed.ops.sampling  # declares torch.ops.tokenspeed.sample
from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops.backends import make_backend
from tokenspeed.ops.sampling import NONE_ALLOWED, NOT_FINITE, _philox, noise_bits


def arguments(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, output=0):
    """The operator's arguments, scalars spread over the rows."""

    def spread(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(len(logits)).contiguous()

    return (
        logits,
        spread(temperature, torch.float32),
        spread(top_k, torch.int32),
        spread(top_p, torch.float32),
        spread(min_p, torch.float32),
        spread(seed, torch.int64),
        spread(output, torch.int64),
    )


def sample(*args, **options):
    return torch.ops.tokenspeed.sample(*arguments(*args, **options))


def exact_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Of one row, in double precision, id by id in order of probability."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True, stable=True).tolist()
    kept = order[:top_k] if top_k else order
    mass, total, nucleus = 0.0, sum(float(p[i]) for i in kept), []
    for i in kept:
        if mass >= top_p * total and nucleus:
            break
        nucleus.append(i)
        mass += float(p[i])
    nucleus = [i for i in nucleus if float(p[i]) >= min_p * float(p.max())]
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_gives_the_published_known_answers(counter, key, expected):
    words = _philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in words] == expected


def test_noise_depends_on_every_part_of_its_counter_and_on_nothing_else():
    seed, output = torch.tensor([5, 5, 6, 5 + (1 << 40), -3]), torch.tensor([9, 10, 9, 9, 9 + (1 << 40)])
    words = noise_bits(seed, output, 1001)
    assert words.min() >= 0 and words.max() < 1 << 32
    for i in range(5):
        assert torch.equal(noise_bits(seed[i : i + 1], output[i : i + 1], 17), words[i : i + 1, :17])
        for j in range(i):
            assert (words[i] != words[j]).float().mean() > 0.99
    assert words.unique().numel() > 0.999 * words.numel()


CUTS = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("cut", CUTS)
def test_frequencies_follow_the_exact_distribution(cut):
    draws, vocabulary = 40000, 13
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(7)) * 1.5
    expected = exact_distribution(logits, **cut)
    ids = sample(logits.expand(draws, -1), **cut, seed=11, output=torch.arange(draws))
    counts = ids.bincount(minlength=vocabulary).double()
    assert not counts[expected == 0].any()
    live = expected > 0
    chi = ((counts[live] - draws * expected[live]) ** 2 / (draws * expected[live])).sum().item()
    freedom = int(live.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * max(freedom, 1)) + 10


def test_the_rare_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should():
    """Half of the mass is one id, half is spread over 20,000: the noise must be fine enough to tell them apart."""
    vocabulary, draws = 20001, 1000
    logits = torch.zeros(vocabulary)
    logits[0] = math.log(vocabulary - 1)
    ids = sample(logits.expand(draws, -1), seed=3, output=torch.arange(draws))
    first = int((ids == 0).sum())
    assert abs(first - draws / 2) < 5 * math.sqrt(draws) / 2
    rest = ids[ids > 0]
    assert abs(rest.double().mean() / vocabulary - 0.5) < 0.05
    assert rest.unique().numel() > 0.9 * rest.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 300])
@pytest.mark.parametrize("kind", ["torch-fp32", "emulated", "cuda"])
def test_where_there_is_no_id_the_reason_stands_in_its_place(kind, vocabulary, dtype):
    """Wherever in the row it stands, whatever is asked for."""
    nan, inf = math.nan, math.inf
    logits = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(1)).to(dtype)
    at = torch.randint(vocabulary, (8,), generator=torch.Generator().manual_seed(2)).tolist()
    logits[0, at[0]], logits[1, at[1]], logits[2], logits[3] = nan, inf, nan, -inf
    logits[4], logits[4, at[4]] = -inf, nan
    logits[5], logits[5, at[5]] = -inf, 1.0  # the only one that is allowed
    logits[6, at[6]] = -nan
    sample = make_backend(kind).op("sample")
    for cut in [{"temperature": 0.0}, {}, CUTS[-1], {"top_k": 200, "top_p": 0.9}, {"top_p": 0.6}]:
        ids = sample(*arguments(logits, **cut, seed=3)).tolist()
        assert ids[:5] + ids[6:7] == [NOT_FINITE] * 3 + [NONE_ALLOWED] + [NOT_FINITE] * 2, cut
        assert ids[5] == at[5] and 0 <= ids[7] < vocabulary, cut
    logits = torch.full((2, vocabulary), 3e38)
    assert sample(*arguments(logits, temperature=torch.tensor([0.0, 0.1]))).tolist() == [0, NOT_FINITE]


def test_temperature_zero_takes_the_lowest_id_of_the_largest():
    logits = torch.tensor([[0.0, 3, 1, 3], [5, 5, 5, 5], [-math.inf, -2, -math.inf, -2]])
    assert sample(logits, temperature=0.0).tolist() == [1, 0, 1]


def test_ties_at_a_cut_are_all_kept():
    logits = torch.tensor([3.0, 1, 1, 1, 0]).expand(3000, -1)
    for cut in ({"top_k": 2}, {"top_p": 0.75}):
        assert set(sample(logits, **cut, output=torch.arange(3000)).tolist()) == {0, 1, 2, 3}


def test_a_cut_to_one_is_greedy_whatever_the_noise():
    logits = torch.randn(500, 40)
    for cut in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert torch.equal(sample(logits, **cut, output=torch.arange(500)), logits.argmax(-1))


def test_what_is_forbidden_is_never_drawn():
    logits = torch.full((2000, 30), -math.inf)
    logits[:, 7], logits[:, 21] = -80.0, 0.0
    assert set(sample(logits, temperature=40.0, top_k=20, top_p=0.999, output=torch.arange(2000)).tolist()) == {7, 21}


def test_a_row_draws_the_same_id_alone_and_in_any_batch():
    logits = torch.randn(9, 300)
    options = {"temperature": torch.rand(9), "top_k": torch.arange(9), "seed": torch.arange(9), "output": 5}
    together = sample(logits, **options)
    order = torch.randperm(9)
    options = {name: value if isinstance(value, int) else value[order] for name, value in options.items()}
    assert torch.equal(sample(logits[order], **options), together[order])
    fourth = options["temperature"][order.argsort()[4]]
    assert torch.equal(sample(logits[4:5], temperature=fourth, top_k=4, seed=4, output=5), together[4:5])


# ---- the kernel against the torch implementation


pytest_plugins = ["tests.kernels.schedules"]


def assert_same_draws(backend, args):
    ours = backend.op("sample")(*(x.to(backend.device) for x in args))
    assert torch.equal(ours.cpu(), tokenspeed.ops.sampling.sample.__wrapped__(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.01, 4.0, 30.0])
def test_the_kernel_draws_what_torch_draws(backend, dtype, spread):
    rows = 2 if backend.name == "emulated" else 256
    vocabulary = 3001
    logits = (torch.randn(rows, vocabulary) * spread).to(dtype)
    top_p = torch.rand(rows).masked_fill_(torch.rand(rows) < 0.3, 1)
    options = {
        "temperature": torch.rand(rows) * 2 + 0.05,
        "top_k": torch.randint(0, 80, (rows,)),
        "top_p": top_p,
        "min_p": torch.rand(rows) * 0.1,
        "seed": torch.randint(-(2**62), 2**62, (rows,)),
        "output": torch.randint(0, 2**40, (rows,)),
    }
    assert_same_draws(backend, arguments(logits, **options))


@pytest.mark.parametrize("vocabulary", [1, 5, 33, 257])
def test_vocabularies_smaller_than_a_block(backend, vocabulary):
    options = {"temperature": torch.tensor([1.0, 0.0]), "top_k": 3, "seed": 1, "output": torch.arange(2)}
    assert_same_draws(backend, arguments(torch.randn(2, vocabulary).bfloat16(), **options))


def test_the_published_vocabulary(backend):
    logits = (torch.randn(1, 248320) * 3).bfloat16()
    assert_same_draws(backend, arguments(logits, temperature=0.0))
    if backend.name == "cuda":
        for cut in CUTS:
            assert_same_draws(backend, arguments(logits.expand(7, -1).contiguous(), **cut, output=torch.arange(7)))


def test_equal_logits_and_forbidden_rows(backend):
    logits = torch.zeros(2, 50)
    logits[1] = -math.inf
    assert_same_draws(backend, arguments(logits[:1], temperature=torch.tensor([0.0])))
    assert_same_draws(backend, arguments(logits[:1], temperature=0.7, top_k=3, top_p=0.5, output=4))
    assert backend.op("sample")(*(x.to(backend.device) for x in arguments(logits[1:]))).tolist() == [NONE_ALLOWED]


# Each of the ways in which the kernel comes to an id. Logits of 3,001 ids, 4 wide unless said otherwise.
WAYS = {
    "nothing is cut": {},
    "min-p alone": {"min_p": 0.02},
    "a list within a bound by half the groups": {"top_k": 20, "top_p": 0.95},
    "a list of two of nearly equal chance": {"top_k": 2, "temperature": 30.0},
    "a list within a bound by all groups": {"top_k": 128, "top_p": 0.7, "min_p": 0.001},
    "bins of masses, a narrow nucleus": {"top_p": 0.4},
    "bins of masses, a wide one": {"top_p": 0.97, "temperature": 3.0},
    "bins of masses, and min-p": {"top_p": 0.99, "min_p": 0.05, "temperature": 1.5},
    "bins of counts": {"top_k": 300, "top_p": 0.9, "temperature": 2.0},
    "bins of counts, and no nucleus": {"top_k": 1000, "temperature": 0.02},
    "more than a list of gathered ids": {"top_k": 2500, "top_p": 0.999, "temperature": 5.0},
    "top-k beyond the vocabulary": {"top_k": 5000},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_an_id_is_that_of_torch(scheduled, way):
    rows = 6 if scheduled.emulated is not None else 256
    for dtype in (torch.bfloat16, torch.float32):
        logits = (torch.randn(rows, 3001) * 4).to(dtype)
        assert_same_draws(scheduled, arguments(logits, **WAYS[way], seed=torch.arange(rows), output=5))


def test_what_min_p_keeps_may_lie_behind_what_a_warp_looks_at_first(backend):
    """As many rows as leave one block to each, so that a warp looks at several parts of its row."""
    rows = 24 if backend.name == "emulated" else 512
    logits = torch.randn(rows, 6000)
    logits[:, 4100:] += 40
    assert_same_draws(backend, arguments(logits, min_p=0.05, seed=torch.arange(rows), output=5))


@pytest.mark.parametrize("cut", [{"top_k": 7}, {"top_k": 200}, {"top_p": 0.5}, {"top_k": 40, "top_p": 0.9}])
@pytest.mark.parametrize("levels", [1, 2, 40])
def test_ties_without_number(backend, levels, cut):
    """More ids at the distance of a cut than any list holds."""
    logits = torch.randint(levels, (3, 4999)).float() / 64
    assert_same_draws(backend, arguments(logits, **cut, output=torch.arange(3)))
    assert_same_draws(backend, arguments(logits.bfloat16(), **cut, temperature=0.3, output=torch.arange(3)))


@pytest.mark.parametrize("allowed", [1, 5, 600])
def test_most_ids_are_forbidden(backend, allowed):
    """As by a grammar: fewer groups have an allowed id than top-k asks for."""
    logits = torch.full((4, 5000), -math.inf)
    logits[:, 1000 : 1000 + allowed] = torch.randn(4, allowed)
    for cut in ({}, {"top_k": 20}, {"top_k": 500}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5}, {"min_p": 0.3}):
        assert_same_draws(backend, arguments(logits.bfloat16(), **cut, seed=3, output=torch.arange(4)))


def test_rows_that_do_not_lie_at_whole_vectors(backend):
    memory = torch.randn(3, 1030).bfloat16() * 3
    for logits in (memory[:, 1:1021], memory[:, 8:1019], memory[:, :999]):
        for cut in ({"temperature": 0.0}, {}, {"top_k": 9}, {"top_p": 0.9}):
            assert_same_draws(backend, arguments(logits, **cut, output=torch.arange(3)))


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_a_row_is_split_among_as_many_blocks_as_there_are_multiprocessors_for(backend, multiprocessors):
    if backend.emulated is None:
        pytest.skip("a card has its own count of multiprocessors")
    device = emulator()
    device.emulator_multiprocessors(multiprocessors)
    try:
        for rows, vocabulary in [(1, 40000), (3, 9001), (20, 1500)]:
            logits = (torch.randn(rows, vocabulary) * 3).bfloat16()
            for cut in ({"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"top_k": 200}):
                assert_same_draws(backend, arguments(logits, **cut, seed=torch.arange(rows)))
    finally:
        device.emulator_multiprocessors(4)


def test_more_rows_than_a_launch_takes(backend):
    rows = 1024 + 3
    options = {"top_k": torch.arange(rows) % 3, "top_p": torch.where(torch.arange(rows) % 2 > 0, 0.5, 1.0)}
    options |= {"temperature": torch.rand(rows), "min_p": torch.rand(rows) * 0.1}
    assert_same_draws(backend, arguments(torch.randn(rows, 19), **options, seed=torch.arange(rows), output=9))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", [{"temperature": 0.0}, {}, {"top_k": 20}, {"top_p": 0.9}])
def test_logits_that_the_kernel_ahead_writes(cut, seed):
    """Queued: the second launch may begin as soon as the first has seen that kernel end."""
    make_backend("emulated")
    logits = (torch.randn(2, 2000) * 3).bfloat16()
    late, arena = behind_a_copy(logits)
    from_slot, to_slot = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    given = arguments(late, **cut, output=4)

    def run():
        torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
        return torch.ops.tokenspeed_emulated.sample(*given)

    assert torch.equal(queued(emulator(), seed, run), sample(logits, **cut, output=4))


def test_the_kernel_serves_its_calls_itself():
    make_backend("emulated")
    for logits in (torch.randn(2, 300), torch.randn(2, 300).bfloat16()):
        assert not torch_served(lambda logits=logits: torch.ops.tokenspeed_emulated.sample(*arguments(logits)))


# The index of each row, among nine; the last two are the tokens of one sequence, and more rows than a launch takes.
INDICES = {"each its own": [7, 0, 7, 3, 8], "one": [3] * 4, "many": [i % 9 for i in range(1024 + 3)]}


@pytest.mark.parametrize("rows", INDICES)
def test_rows_find_their_values_in_tables(backend, rows):
    index = torch.tensor(INDICES[rows], device=backend.device)
    if rows == "one":
        index = index[:1].expand(len(index))  # of stride 0, as torch repeats the index of a sequence's tokens
    logits, output = backend.randn(len(index), 300), torch.arange(len(index), device=backend.device)
    tables = arguments(
        torch.empty(9, 1),
        temperature=[0.0, 0.5, 1, 1.5, 0, 1, 1, 2, 0.7],
        top_k=[0, 1, 2, 40, 4, 0, 0, 0, 7],
        top_p=[1, 1, 1, 0.9, 1, 1, 1, 0.5, 1],
        min_p=[0, 0, 0, 0, 0, 0, 0, 0.01, 0],
        seed=range(9),
    )[1:6]
    tables, results = [table.to(backend.device) for table in tables], []
    expected = backend.op("sample")(logits, *(table[index] for table in tables), output)
    served = torch_served(lambda: results.append(backend.op("sample")(logits, *tables, output, index)))
    assert torch.equal(results[0], expected)
    assert not backend.emulated or served == []
