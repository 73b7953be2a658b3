"""Claims about the kernels of paged attention beyond their operators' contracts: tiles, splits, addresses."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.launches import behind_a_copy, emulator, queued, torch_served
from tests.ops import reference
from tests.ops.backends import Backend, bounded, make_backend, relative_error, same_bits
from tests.ops.gdn import cu_seqlens
from tests.ops.paging import PUBLISHED, KvHeads, Pages
from tests.ops.test_paged_attention import check_decode, check_prefill, decode, expected, prefill
from tokenspeed.ops.fp8 import FP8

pytest_plugins = ["tests.kernels.schedules"]

GROUPS = [4, 6, 8, 16]
BORDERS = [0, 62, 63, -1, 128]
of_both_types = pytest.mark.parametrize("dtype", [None, FP8], ids=["bf16", "e4m3"])  # of the pages


@pytest.fixture(autouse=True)
def three_multiprocessors(request):
    """So few that a block has several tiles."""
    names = [name for name in ("backend", "scheduled") if name in request.fixturenames]
    if not names or request.getfixturevalue(names[0]).emulated is None:
        yield
        return
    emulator().emulator_multiprocessors(3)
    yield
    emulator().emulator_multiprocessors(4)


@pytest.fixture
def blocks():
    """Sets how many blocks a decode is cut into, at most: the emulated device's multiprocessors."""
    make_backend("emulated")
    library = emulator()
    yield library.emulator_multiprocessors
    library.emulator_multiprocessors(4)


def prefill_in_a_batch(pages: Pages, q: Tensor, gate: Tensor, row: list[int], context: int) -> Tensor:
    """Beside a sequence without tokens: a lone sequence of few rows goes to the decode kernel."""
    return prefill(pages, q, gate, [row, []], [context, 0], [len(q), 0])


# One, two and four tiles of 16 rows, and two row groups: (group, tokens).
@pytest.mark.thinned(2, "scheduled", "group", "dtype")
@of_both_types
@pytest.mark.parametrize(("group", "tokens"), [(4, 1), (6, 3), (8, 4), (16, 3), (16, 5)])
def test_decode_of_every_number_of_rows_at_page_borders_under_every_schedule(scheduled, group, tokens, dtype):
    check_decode(scheduled, KvHeads(1, group), BORDERS, tokens, dtype=dtype)


# With fewer blocks than pairs of a sequence and a row group, the merge goes by the borders between blocks; (16, 5) are
# two row groups.
@pytest.mark.thinned(2, "count", "group", "dtype")
@pytest.mark.parametrize(("group", "tokens"), [(8, 4), (16, 5)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 64])
@of_both_types
def test_every_way_to_cut_the_pages_among_blocks(blocks, count, group, tokens, dtype):
    """Up to one page a block, and blocks without any; at 64 a block may hold a page that some tokens do not see."""
    blocks(count)
    check_decode(make_backend("emulated"), KvHeads(2, group), [200, -1, 5, 62], tokens, dtype=dtype)


# One, two and four tiles of 16 rows; 63 leaves one key of the first page, 16 hides all that a warp scores.
@pytest.mark.thinned(3, "count", "first_key", "group")
@pytest.mark.parametrize(("group", "tokens"), [(4, 1), (8, 4), (16, 4)])
@pytest.mark.parametrize("first_key", [1, 16, 63])
@pytest.mark.parametrize("count", [1, 3, 8])
@of_both_types
def test_a_first_key_however_the_pages_are_cut(blocks, count, first_key, group, tokens, dtype):
    blocks(count)
    check_decode(make_backend("emulated"), KvHeads(2, group), [200, -1, 64, 127], tokens, first_key, dtype)


@of_both_types
def test_a_batch_of_more_sequences_than_a_warp_has_lanes(backend, dtype):
    contexts = [(7 * i) % 70 - 5 for i in range(40)]
    check_decode(backend, KvHeads(1, 4), contexts, 1, dtype=dtype)
    batch = [(max(context, 0), i % 3) for i, context in enumerate(contexts)]
    check_prefill(backend, KvHeads(1, 4), batch, dtype=dtype)


@of_both_types
def test_many_rows_of_a_batch_are_decoded_by_the_prefill_kernel(backend, dtype):
    check_decode(backend, KvHeads(1, 16), [0, 62, 63, -1, 128], 3, dtype=dtype)


def test_tiles_of_a_decode_with_padding_are_claimed(blocks):
    """More tiles than two rounds of the device's blocks, as in the test above they are not."""
    blocks(2)
    check_decode(make_backend("emulated"), KvHeads(1, 16), [0, 62, 63, -1, 128, 70], 3)


# Rows that fill a tile of 128 exactly, miss it by a token, and leave a token for the next: (group, tokens).
@pytest.mark.thinned(2, "scheduled", "tokens", "dtype")
@of_both_types
@pytest.mark.parametrize(("group", "tokens"), [(4, 33), (6, 21), (6, 22), (8, 16), (16, 9)])
def test_prefill_at_tile_borders_under_every_schedule(scheduled, group, tokens, dtype):
    check_prefill(scheduled, KvHeads(1, group), [(40, tokens), (0, 1), (64, tokens)], dtype=dtype)


@of_both_types
@pytest.mark.parametrize("seed", range(8))
def test_one_block_runs_through_all_tiles(blocks, seed, dtype):
    """Queries of the next tile arrive where outputs of the last are staged."""
    blocks(1)
    emulator().emulator_seed(seed)
    try:
        check_prefill(make_backend("emulated"), KvHeads(1, 16), [(3, 9), (0, 20)], dtype=dtype)
    finally:
        emulator().emulator_seed(0)


@pytest.mark.parametrize("seed", range(8))
def test_a_group_leaves_the_last_keys_until_the_other_has_read_them(blocks, seed):
    """Its output goes through their box. In tiles of one whole page nothing else keeps the groups together."""
    blocks(1)
    emulator().emulator_seed(seed)
    try:
        check_prefill(make_backend("emulated"), KvHeads(2, 4), [(0, 64), (0, 64)])
    finally:
        emulator().emulator_seed(0)


@of_both_types
@pytest.mark.parametrize("context", [0, 1, 40, 62, 63, 64, 127])
def test_prefill_whose_diagonal_crosses_pages_anywhere(backend, context, dtype):
    check_prefill(backend, KvHeads(1, 4), [(context, 66)], dtype=dtype)


@of_both_types
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_short_prefill_equals_the_same_in_a_batch(backend, tokens, dtype):
    """It goes to the decode kernel when it is alone."""
    heads = KvHeads(1, 8)
    check_prefill(backend, heads, [(100, tokens)], dtype=dtype)
    pages = Pages(backend, heads, 6, dtype)
    row, _, _ = pages.store(100 + tokens)
    q, gate = pages.queries(tokens)
    alone = prefill(pages, q, gate, [row], [100], [tokens])
    backend.assert_close(alone, prefill_in_a_batch(pages, q, gate, row, 100).double())


# ---- tiles that blocks claim: more than two rounds of them, so nothing is cut


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 3])
def test_claimed_tiles_of_sequences_of_any_length(blocks, count, seed):
    """The one that ends last is neither first nor last; two end in the same page, one has no tokens."""
    blocks(count)
    emulator().emulator_seed(seed)
    try:
        check_prefill(make_backend("emulated"), KvHeads(2, 8), [(0, 70), (200, 50), (190, 3), (0, 0), (3, 33)])
    finally:
        emulator().emulator_seed(0)


def test_each_call_claims_all_tiles_behind_whatever_was_claimed_before(blocks):
    """Launches queue up, and a call's counter holds any number at first: emulated memory is filled with a large one."""
    blocks(1)
    backend = make_backend("emulated")
    pages = Pages(backend, KvHeads(1, 16), 4)
    row, k, v = pages.store(130)
    q, gate = pages.queries(40)
    starts, contexts, table = cu_seqlens(backend, [40]), backend.tensor([90]), pages.table([row])
    operator = backend.op("paged_attention_prefill")
    wanted = operator(q, gate, pages.kv, table, starts, contexts, 40, 1 / 16)
    backend.assert_close(wanted, expected(pages, q, gate, k, v))
    assert same_bits(operator(q, gate, pages.kv, table, starts, contexts, 40, 1 / 16), wanted)
    for seed in range(4):
        outs = queued(
            emulator(),
            seed,
            lambda: [operator(q, gate, pages.kv, table, starts, contexts, 40, 1 / 16) for _ in range(2)],
        )
        assert all(same_bits(out, wanted) for out in outs)


# ---- decode of settled pages


@of_both_types
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("count", [1, 5])
def test_with_settled_pages_a_decode_waits_for_its_prologue_alone(blocks, count, tokens, dtype):
    """Queued launches: what stands before the context is read before the prologue has begun, and what it stores behind
    it; new tokens fill a page up, begin one, cross into one. Padding stays zero."""
    blocks(count)
    backend, heads, contexts = make_backend("emulated"), KvHeads(1, 6), [63, 128, -1, 126, 2]
    pages = Pages(backend, heads, 12, dtype)
    stored = [pages.store(context + tokens) if context >= 0 else ([], None, None) for context in contexts]
    table, lengths = pages.table([row for row, _, _ in stored]), backend.tensor(contexts)
    places = [
        pages.slot(row, context + i) if row else -1
        for (row, _, _), context in zip(stored, contexts, strict=True)
        for i in range(tokens)
    ]
    slots, total = backend.tensor(places, torch.int64), len(places)
    qkv = backend.randn(total, 2 * (heads.query + heads.kv) * heads.dim)
    norm, angles = backend.randn(heads.dim), backend.randn(total, 64, dtype=torch.float32)
    gate = qkv[:, : 2 * heads.query * heads.dim].unflatten(1, (-1, 2, heads.dim))[:, :, 1]
    before = pages.kv.clone()

    def run(settled: bool) -> Tensor:
        q = backend.op("attention_prologue")(qkv, norm, norm, angles, pages.kv, slots, 1e-6)
        out = backend.op("paged_attention_decode")(q, gate, pages.kv, table, lengths, 1 / 16, 0, settled)
        alive.append(q)
        return out

    alive: list[Tensor] = []  # for launches that run later
    wanted, after = run(False), pages.kv.clone()
    assert wanted[0].any() and not wanted[2 * tokens : 3 * tokens].any()
    for seed in range(4):
        pages.kv.copy_(before)
        assert same_bits(queued(emulator(), seed, lambda: run(True)), wanted)
        assert same_bits(pages.kv, after)


def test_only_settled_pages_are_read_while_the_launch_ahead_still_runs(blocks):
    """Behind a copy of the pages, which breaks the promise, NaN is read in their place."""
    blocks(2)
    backend = make_backend("emulated")
    pages = Pages(backend, KvHeads(1, 8), 4)
    row, _, _ = pages.store(130)
    (q, gate), table, lengths = pages.queries(1), pages.table([row]), backend.tensor([129])
    wanted = backend.op("paged_attention_decode")(q, gate, pages.kv, table, lengths, 1 / 16)
    from_slot, to_slot = backend.tensor([0]), backend.tensor([1])

    def run(settled: bool) -> Tensor:
        kv, arena = behind_a_copy(pages.kv)
        alive.append(arena)
        torch.ops.tokenspeed_emulated.copy_states(arena, from_slot, to_slot)
        return torch.ops.tokenspeed_emulated.paged_attention_decode(q, gate, kv, table, lengths, 1 / 16, 0, settled)

    alive: list[Tensor] = []
    assert same_bits(queued(emulator(), 0, lambda: run(False)), wanted)
    assert queued(emulator(), 0, lambda: run(True)).isnan().any()


# ---- prefill whose keys are cut: 13 pages in four ranges, of which the last is a page that half of the rows see


@of_both_types
def test_a_few_tokens_behind_a_long_prefix_are_split_among_the_blocks(blocks, dtype):
    backend, heads, context = make_backend("emulated"), KvHeads(1, 8), 12 * 64 - 8
    pages = Pages(backend, heads, 14, dtype)
    row, k, v = pages.store(context + 16)
    q, gate = pages.queries(16)
    wanted, outs = expected(pages, q, gate, k, v), []
    for count in (1, 4):
        blocks(count)
        outs.append(prefill(pages, q, gate, [row], [context], [16]))
        backend.assert_close(outs[-1], wanted)
    assert not same_bits(*outs)  # sums in another order: the keys were cut


def test_the_merge_of_split_keys_waits_for_the_parts(blocks):
    """Its launch may begin before the one that leaves them."""
    blocks(4)
    backend, library = make_backend("emulated"), emulator()
    pages = Pages(backend, KvHeads(1, 8), 14)
    row, _, _ = pages.store(776)
    q, gate = pages.queries(16)
    arguments = (q, gate, pages.kv, pages.table([row]), cu_seqlens(backend, [16]), backend.tensor([760]), 16, 1 / 16)
    operator = backend.op("paged_attention_prefill")
    wanted = operator(*arguments)
    library.emulator_defer(1)
    try:
        out = operator(*arguments)
        assert library.emulator_synchronize() == 0
    finally:
        library.emulator_defer(0)
    assert same_bits(out, wanted)


@of_both_types
@pytest.mark.parametrize("seed", range(6))
def test_split_turns_of_a_batch_under_every_schedule(blocks, seed, dtype):
    """Cut and whole sequences side by side, more ranges than one round has blocks, one without tokens."""
    blocks(7)
    emulator().emulator_seed(seed)
    try:
        check_prefill(
            make_backend("emulated"), KvHeads(1, 16), [(700, 9), (0, 3), (90, 0), (440, 2), (64, 1)], dtype=dtype
        )
    finally:
        emulator().emulator_seed(0)


@bounded
@given(st.data())
def test_any_split_equals_dense_attention(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    library = emulator()
    library.emulator_multiprocessors(data.draw(st.integers(2, 12), "multiprocessors"))
    try:
        heads = KvHeads(data.draw(st.integers(1, 2), "kv heads"), data.draw(st.sampled_from(GROUPS), "group"))
        sequence = st.tuples(st.integers(0, 900), st.integers(0, 20))
        batch, dtype = data.draw(st.lists(sequence, max_size=3), "batch"), data.draw(st.sampled_from([None, FP8]))
        check_prefill(make_backend("emulated"), heads, batch, dtype=dtype)
    finally:
        library.emulator_multiprocessors(4)


@pytest.mark.parametrize("factor", [-4096.0, 512.0, 2.0**-100])
def test_scores_of_any_size(backend, factor):
    """Thousands below and above zero, where one token takes all the weight, and so small that all weigh the same."""
    pages = Pages(backend, KvHeads(1, 8), 6)
    row, k, v = pages.store(200)
    pages.kv[row, 0] *= factor  # a power of two: exact
    q, gate = pages.queries(2)
    wanted = expected(pages, q, gate, k.double() * factor, v)
    backend.assert_close(decode(pages, q, gate, [row], [198]), wanted)
    backend.assert_close(prefill_in_a_batch(pages, q, gate, row, 198), wanted)


@pytest.mark.parametrize("heads", [KvHeads(1, 8), KvHeads(1, 4)])
def test_maxima_that_grow_from_page_to_page(backend, heads):
    """A little, by more than sums have room for, and by more than a weight has."""
    pages = Pages(backend, heads, 8)
    row, k, v = pages.store(6 * heads.page)
    factors = torch.tensor([1.0, 1.125, 2.0, 4.0, 64.0, 512.0])
    pages.kv[row, 0] *= factors.to(pages.kv.device, pages.kv.dtype)[:, None, None, None]
    k = torch.stack([pages.kv[page, 0] for page in row]).transpose(1, 2).flatten(0, 1)
    q, gate = pages.queries(2 * heads.page)
    wanted = expected(pages, q, gate, k.double(), v)
    backend.assert_close(prefill_in_a_batch(pages, q, gate, row, 4 * heads.page), wanted)


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_queries_of_any_size_meet_keys_in_e4m3(backend, factor):
    """The scale of the scores makes up for them. fp16 would hold none of these queries."""
    pages = Pages(backend, KvHeads(1, 8), 4, FP8)
    row, k, v = pages.store(70)
    q, gate = pages.queries(2)
    q *= torch.tensor([8.0, 0.25]).view(2, 1, 1).to(q)  # each row has a scale of its own
    wanted = expected(pages, q, gate, k, v)
    scale, tables, contexts = 1 / (16 * factor), pages.table([row]), backend.tensor([68])
    grown = q * factor  # a power of two: exact
    out = backend.op("paged_attention_decode")(grown, gate, pages.kv, tables, contexts, scale)
    backend.assert_close(out, wanted)
    ragged = (cu_seqlens(backend, [2, 0]), backend.tensor([68, 0]), 2)  # a lone one would be decoded
    table = pages.table([row, []])
    out = backend.op("paged_attention_prefill")(grown, gate, pages.kv, table, *ragged, scale)
    backend.assert_close(out, wanted)


def test_small_weights_of_many_tokens_in_e4m3_are_not_lost(backend):
    """Each of 199 tokens weighs 2^-26 of the first, whose value is zero: fp16 alone would make nothing of them."""
    pages = Pages(backend, KvHeads(1, 8), 5, FP8)
    row, k, v = pages.store(200)
    pages.kv[row, 0] = 0
    pages.kv[row, 1] = 448
    pages.kv[row[0], :, :, 0] = 0
    pages.kv[row[0], 0, :, 0, 0] = 16
    k, v = (pages.kv[row, part].transpose(1, 2).flatten(0, 1)[:200].float() for part in range(2))
    q, gate = torch.zeros(2, 8, 256, dtype=torch.bfloat16), pages.queries(2)[1]
    q[..., 0] = 18  # times 16 / sqrt(256) and log2(e): 2^26
    q = q.to(backend.device)
    wanted = expected(pages, q, gate, k, v)
    assert relative_error(decode(pages, q, gate, [row], [198]), wanted) < 1e-2
    assert relative_error(prefill_in_a_batch(pages, q, gate, row, 198), wanted) < 1e-2


@pytest.mark.parametrize("group", GROUPS)
def test_attention_over_e4m3_is_as_exact_as_its_output_is_wide(backend, group):
    """Keys, values and queries lose nothing, and weights have eleven bits: what is left is the output's rounding."""
    pages = Pages(backend, KvHeads(1, group), 6, FP8)
    row, k, v = pages.store(200)
    q, gate = pages.queries(3)
    wanted = expected(pages, q, gate, k, v)
    assert relative_error(decode(pages, q, gate, [row], [197]), wanted) < 3e-3
    assert relative_error(prefill_in_a_batch(pages, q, gate, row, 197), wanted) < 3e-3


def test_a_token_that_sees_only_itself_returns_its_value(backend):
    pages = Pages(backend, KvHeads(2, 4), 3)
    row, _, v = pages.store(1)
    q, gate = pages.queries(1)
    wanted = (v.repeat_interleave(4, dim=1).double() * reference.sigmoid(gate).to(v.device)).flatten(1)
    for out in (decode(pages, q, gate, [row], [0]), prefill_in_a_batch(pages, q, gate, row, 0)):
        assert relative_error(out, wanted) < 4e-3  # one rounding to bf16


def gates(backend: Backend, tokens: int, heads: int) -> dict[str, Tensor]:
    """Gates [tokens, heads, 256] of every kind of stride."""
    return {
        "column first": backend.randn(256, heads, tokens).permute(2, 1, 0),
        "one for all columns": backend.randn(tokens, heads, 1).expand(tokens, heads, 256),
        "one for all": backend.randn(1, 1, 1).expand(tokens, heads, 256),
        "odd address": backend.randn(tokens * heads * 256 + 1)[1:].view(tokens, heads, 256),
    }


def check_gates(pages: Pages, q, gate, stored) -> None:
    """Three tokens behind 67, by decode and by prefill."""
    row, k, v = stored
    wanted = expected(pages, q, gate, k, v)
    pages.backend.assert_close(decode(pages, q, gate, [row], [67]), wanted)
    pages.backend.assert_close(prefill_in_a_batch(pages, q, gate, row, 67), wanted)


@pytest.mark.parametrize("kind", ["column first", "one for all columns", "one for all", "odd address"])
def test_gates_of_any_stride(backend, kind):
    pages = Pages(backend, KvHeads(1, 6), 4)
    stored = pages.store(70)
    check_gates(pages, pages.queries(3)[0], gates(backend, 3, 6)[kind], stored)


def test_gates_of_any_size(backend):
    """Neighbours share a reciprocal: a product of their two denominators may be infinite, a result not."""
    pages = Pages(backend, KvHeads(1, 8), 4)
    stored = pages.store(70)
    q, gate = pages.queries(3)
    sizes = torch.tensor([1, 50, -50, 100, 0, -100, 1e30, 3], dtype=gate.dtype, device=gate.device)
    check_gates(pages, q, gate * sizes.roll(1).repeat_interleave(4).repeat(8) + sizes.repeat(32), stored)


def test_a_gate_that_is_no_number_leaves_a_trace(backend):
    pages = Pages(backend, KvHeads(1, 8), 4)
    row, _, _ = pages.store(70)
    q, gate = pages.queries(3)
    gate = gate.clone()
    gate[1, 2, 100] = torch.nan
    for out in (decode(pages, q, gate, [row], [67]), prefill_in_a_batch(pages, q, gate, row, 67)):
        assert out.view(3, 8, 256)[1, 2, 100].isnan()


def test_queries_and_page_tables_may_be_views_of_wider_tensors(backend):
    pages = Pages(backend, KvHeads(1, 8), 6)
    row, k, v = pages.store(130)
    wide, gate = backend.randn(2, 12, 256), pages.queries(2)[1]
    q, table = wide[:, 4:], pages.table([row], spare=9)[:, : len(row)]
    contexts, scale = backend.tensor([128]), 1 / 16
    wanted = expected(pages, q, gate, k, v)
    out = backend.op("paged_attention_decode")(q, gate, pages.kv, table, contexts, scale)
    backend.assert_close(out, wanted)
    ragged = (cu_seqlens(backend, [2, 0]), backend.tensor([128, 0]), 2)  # a lone one would be decoded
    table = pages.table([row, []], spare=9)[:, : len(row)]
    backend.assert_close(backend.op("paged_attention_prefill")(q, gate, pages.kv, table, *ragged, scale), wanted)


def test_pages_further_apart_than_32_bits_count(backend):
    """Three pages, 2^31 + 8 elements apart, in memory that is mapped where it is touched."""
    stride, heads = 2**31 + 8, KvHeads(1, 4)
    shape, page_elements = (3, 2, 1, 64, 256), 2 * 64 * 256
    if backend.device == "cuda":
        arena = torch.empty(2 * stride + page_elements, dtype=torch.bfloat16, device="cuda")
    else:
        memory = mmap.mmap(-1, 2 * (2 * stride + page_elements), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        arena = torch.frombuffer(memory, dtype=torch.bfloat16)
    kv = arena.as_strided(shape, (stride, 64 * 256, 64 * 256, 256, 1))
    kv.copy_(backend.randn(*shape))
    pages = Pages(backend, heads, 2)
    pages.kv = kv
    q, gate = pages.queries(2)
    k, v = kv[[2, 0], :, 0].transpose(0, 1).reshape(2, 128, 1, 256)
    wanted = expected(pages, q, gate, k, v)
    backend.assert_close(decode(pages, q, gate, [[2, 0]], [126]), wanted)
    backend.assert_close(prefill_in_a_batch(pages, q, gate, [2, 0], 126), wanted)


def test_no_order_of_threads_changes_a_bit(blocks):
    backend, library = make_backend("emulated"), emulator()
    blocks(6)
    pages = Pages(backend, KvHeads(1, 8), 14)
    row, _, _ = pages.store(810)
    q, gate = pages.queries(18)
    results = []
    try:
        for seed in range(6):
            library.emulator_seed(seed)
            decoded = decode(pages, q[:2], gate[:2], [row], [808])
            results.append(torch.cat([decoded, prefill(pages, q, gate, [row], [792], [18])]))
    finally:
        library.emulator_seed(0)
    assert all(same_bits(result, results[0]) for result in results)


@of_both_types
@pytest.mark.parametrize("group", GROUPS)
def test_the_kernels_serve_every_published_head_count_and_draft_length(backend, group, dtype):
    pages = Pages(backend, PUBLISHED[group], 4, dtype)
    row, _, _ = pages.store(70)
    for tokens in (1, 4):
        q, gate = pages.queries(tokens)
        assert torch_served(lambda q=q, gate=gate, t=tokens: decode(pages, q, gate, [row], [70 - t])) == []
        assert torch_served(lambda q=q, gate=gate, t=tokens: prefill(pages, q, gate, [row], [70 - t], [t])) == []


def test_other_head_sizes_pages_and_types_go_to_torch(backend):
    for heads in (KvHeads(2, 4, dim=128), KvHeads(2, 4, page=16)):
        check_decode(backend, heads, [20, -1, 40], 2)
        check_prefill(backend, heads, [(20, 5), (0, 3)])
    pages = Pages(backend, KvHeads(1, 4, dim=32), 3)
    row, _, _ = pages.store(3)
    q, gate = pages.queries(1)
    assert torch_served(lambda: decode(pages, q, gate, [row], [2])) == ["tokenspeed_torch::paged_attention_decode"]
