"""Claims about `paged_attention_prefill` and `paged_attention_decode`."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed import ops
from tokenspeed.ops.fp8 import FP8

from . import reference
from .backends import bounded, same_bits
from .gdn import cu_seqlens
from .paging import PUBLISHED, KvHeads, Pages, layouts

GROUPS = [4, 6, 8, 16]


def expected(pages, q, gate, k, v):
    out = reference.attention(q, k, v, pages.heads.dim**-0.5)
    return (out * reference.sigmoid(gate)).flatten(1)


def prefill(pages, q, gate, tables, contexts, lengths, spare=0):
    backend, scale = pages.backend, pages.heads.dim**-0.5
    ragged = (cu_seqlens(backend, lengths), backend.tensor(contexts), max(lengths, default=0) + spare)
    return backend.op("paged_attention_prefill")(q, gate, pages.kv, pages.table(tables), *ragged, scale)


def decode(pages, q, gate, tables, contexts, first_key=0):
    scale, contexts = pages.heads.dim**-0.5, pages.backend.tensor(contexts)
    optional = (first_key,) if first_key else ()
    return pages.backend.op("paged_attention_decode")(
        q, gate, pages.kv, pages.table(tables), contexts, scale, *optional
    )


def check_prefill(backend, heads, batch, spare=0, dtype=None):
    """batch: (context, length) of each sequence; dtype: of the pages. Rows past a sequence's end are NaN in them."""
    pages = Pages(backend, heads, 2 + sum((context + length) // heads.page + 1 for context, length in batch), dtype)
    stored = [pages.store(context + length) for context, length in batch]
    lengths = [length for _, length in batch]
    q, gate = pages.queries(sum(lengths))
    out = prefill(pages, q, gate, [row for row, _, _ in stored], [context for context, _ in batch], lengths, spare)
    parts = zip(q.split(lengths), gate.split(lengths), stored, strict=True)
    wanted = [expected(pages, one, its_gate, k, v) for one, its_gate, (_, k, v) in parts]
    backend.assert_close(out, torch.cat(wanted) if wanted else torch.empty(0, heads.query * heads.dim))


def check_decode(backend, heads, contexts, tokens, first_key=0, dtype=None):
    """A negative context marks a padding row, which holds NaN everywhere, as do the rows before first_key; dtype: of
    the pages."""
    pages = Pages(backend, heads, 2 + sum(max(context + tokens, 0) // heads.page + 1 for context in contexts), dtype)
    stored = [pages.store(context + tokens) if context >= 0 else ([], None, None) for context in contexts]
    for row, _, _ in stored:
        pages.kv[row[:1], :, :, :first_key] = torch.nan
    q, gate = pages.queries(len(contexts) * tokens)
    for i, context in enumerate(contexts):
        if context < 0:
            q[i * tokens : (i + 1) * tokens] = torch.nan
            gate[i * tokens : (i + 1) * tokens] = torch.nan
    out = decode(pages, q, gate, [row for row, _, _ in stored], contexts, first_key)
    for i, (_, k, v) in enumerate(stored):
        rows = slice(i * tokens, (i + 1) * tokens)
        if k is None:
            assert not out[rows].any()
        else:
            backend.assert_close(out[rows], expected(pages, q[rows], gate[rows], k[first_key:], v[first_key:]))


@pytest.mark.parametrize("group", GROUPS)
def test_prefill_of_a_ragged_batch_equals_dense_attention(backend, group):
    for heads in layouts(backend, group):
        check_prefill(backend, heads, [(0, 5), (64, 1), (70, 0), (3, 65), (0, 0)])


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("context", [0, 1, 64, 100])
def test_prefill_of_every_length_after_a_cached_prefix(backend, tokens, context):
    check_prefill(backend, PUBLISHED[4], [(context, tokens)])


def test_prefill_with_more_room_than_the_longest_sequence_needs(backend):
    check_prefill(backend, PUBLISHED[4], [(10, 3), (0, 20)], spare=70)


def test_prefill_of_no_sequences_and_of_no_tokens(backend):
    check_prefill(backend, PUBLISHED[4], [])
    check_prefill(backend, PUBLISHED[4], [(5, 0), (0, 0)])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_decode_of_a_batch_equals_dense_attention(backend, group, tokens):
    for heads in layouts(backend, group):
        check_decode(backend, heads, [0, 63, -1, 130, 62], tokens)


@pytest.mark.parametrize("group", GROUPS)
def test_pages_in_e4m3_are_read_as_the_numbers_they_hold(backend, group):
    for heads in layouts(backend, group):
        check_prefill(backend, heads, [(0, 5), (64, 1), (70, 0), (3, 65), (0, 0)], dtype=FP8)
        for tokens in (1, 3):
            check_decode(backend, heads, [0, 63, -1, 130, 62], tokens, dtype=FP8)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("first_key", [0, 1, 5])
def test_decode_sees_no_key_before_the_first(backend, first_key, tokens):
    for heads in [heads for group in (4, 16) for heads in layouts(backend, group)]:
        check_decode(backend, heads, [first_key + 1, 62, -1, 63, 64, 130], tokens, first_key)


def test_decode_of_padding_alone_and_of_an_empty_batch(backend):
    check_decode(backend, PUBLISHED[8], [-1, -7], 2)
    pages = Pages(backend, PUBLISHED[8], 2)
    assert decode(pages, *pages.queries(0), [], []).shape == (0, PUBLISHED[8].query * 256)


@bounded
@given(st.data())
def test_any_batch_equals_dense_attention(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    if backend.kernels:
        heads = PUBLISHED[data.draw(st.sampled_from(GROUPS), "group")]
    else:
        small = st.builds(
            KvHeads, st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.sampled_from([1, 7, 64])
        )
        heads = data.draw(small, "heads")
    context, length = st.integers(0, 130), st.integers(0, 70)
    check_prefill(backend, heads, data.draw(st.lists(st.tuples(context, length), max_size=3), "prefills"))
    first_key = data.draw(st.sampled_from([0, 1, heads.page - 1]), "first key") if heads.page > 1 else 0
    contexts = st.one_of(st.just(-1), st.integers(first_key + 1 if first_key else 0, 130))
    contexts = data.draw(st.lists(contexts, min_size=1, max_size=4), "decodes")
    check_decode(backend, heads, contexts, data.draw(st.integers(1, 4), "T"), first_key)


def test_sequences_share_the_pages_of_a_prefix(backend):
    pages = Pages(backend, PUBLISHED[4], 12)
    prefix, _, _ = pages.store(128)
    stored = [pages.store(128 + own, prefix) for own in (3, 70)]
    q, gate = pages.queries(73)
    out = prefill(pages, q, gate, [row for row, _, _ in stored], [128, 128], [3, 70])
    for rows, (_, k, v) in zip((slice(0, 3), slice(3, 73)), stored, strict=True):
        backend.assert_close(out[rows], expected(pages, q[rows], gate[rows], k, v))


def test_decode_equals_prefill(backend):
    pages = Pages(backend, PUBLISHED[8], 5)
    row, _, _ = pages.store(68)
    q, gate = pages.queries(8)
    whole = prefill(pages, q, gate, [row], [60], [8])
    for tokens in (1, 2, 4):
        steps = [slice(start, start + tokens) for start in range(0, 8, tokens)]
        parts = [decode(pages, q[rows], gate[rows], [row], [60 + rows.start]) for rows in steps]
        backend.assert_close(torch.cat(parts), whole)


def test_where_the_pages_lie_changes_no_bit(backend):
    pages = Pages(backend, PUBLISHED[4], 12)
    row, _, _ = pages.store(150)
    moved = [pages.free.pop() for _ in row]
    pages.kv[moved] = pages.kv[row]
    q, gate = pages.queries(3)
    assert same_bits(prefill(pages, q, gate, [row], [147], [3]), prefill(pages, q, gate, [moved], [147], [3]))
    assert same_bits(decode(pages, q, gate, [row], [147]), decode(pages, q, gate, [moved], [147]))


def test_large_scores_do_not_overflow(backend):
    """Scores of up to a few hundred: exp of one is infinite unless the maximum is taken off first."""
    pages = Pages(backend, PUBLISHED[4], 4)
    row, k, v = pages.store(70)
    pages.kv[row, 0] *= 64  # exact
    q, gate = pages.queries(2)
    wanted = expected(pages, q, gate, k * 64, v)
    backend.assert_close(decode(pages, q, gate, [row], [68]), wanted)
    backend.assert_close(prefill(pages, q, gate, [row], [68], [2]), wanted)


def test_no_token_is_no_part_of_what_was_given():
    """Operators return nothing that shares memory with an argument."""
    q, kv, table = torch.zeros(0, 4, 64), torch.zeros(4, 2, 2, 16, 64), torch.zeros(1, 2, dtype=torch.int32)
    ragged = (torch.zeros(2, dtype=torch.int32), torch.full((1,), 5, dtype=torch.int32), 1)
    torch.library.opcheck(torch.ops.tokenspeed.paged_attention_prefill.default, (q, q, kv, table, *ragged, 0.125))


class Gathers(TorchDispatchMode):
    """How many elements each gather gives."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor:
            self.elements.append(result.numel())
        return result


def test_pages_behind_the_longest_sequence_are_not_gathered():
    kv, table = torch.randn(70, 2, 2, 16, 64), torch.arange(70, dtype=torch.int32)[None]
    q, starts = torch.randn(2, 4, 64), torch.tensor([0, 2], dtype=torch.int32)
    with Gathers() as gathers:
        ops.paged_attention_decode.__wrapped__(q, q, kv, table, torch.tensor([15], dtype=torch.int32), 0.125)
        ops.paged_attention_prefill.__wrapped__(
            q, q, kv, table, starts, torch.tensor([14], dtype=torch.int32), 2, 0.125
        )
    assert gathers.elements == [2 * kv[0].numel(), kv[0].numel()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda"])  # a name that `-k cuda` selects
def test_no_length_costs_the_torch_implementation_memory_of_the_process(device):
    """cuDNN's attention would keep 2 MB for each."""
    q, kv = torch.randn(1, 4, 64, device=device), torch.randn(70, 2, 2, 16, 64, device=device)
    q, kv, table = q.bfloat16(), kv.bfloat16(), torch.arange(70, dtype=torch.int32, device=device)[None]

    def resident_mib(pages: int) -> float:
        context = torch.tensor([pages * 16 - 1], dtype=torch.int32, device=device)
        gate = torch.zeros_like(q)
        ops.paged_attention_decode.__wrapped__(q, gate, kv, table[:, :pages].contiguous(), context, 0.125)
        return int(Path("/proc/self/statm").read_text().split()[1]) / 256

    before = max(resident_mib(pages) for pages in range(1, 10))
    assert resident_mib(10) - before < 30 and max(resident_mib(pages) for pages in range(11, 70)) - before < 30
