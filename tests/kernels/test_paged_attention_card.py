"""Paged attention on a card, at sizes that the emulated device is too slow for."""

import pytest
import torch
from torch import Tensor

from tests.ops.backends import Backend, make_backend, same_bits
from tests.ops.gdn import cu_seqlens
from tests.ops.paging import PUBLISHED, KvHeads, Pages
from tests.ops.test_paged_attention import decode, prefill
from tokenspeed.ops.fp8 import FP8

of_both_types = pytest.mark.parametrize("dtype", [None, FP8], ids=["bf16", "e4m3"])  # of the pages


@pytest.fixture(params=["cuda"])  # whose name `-k cuda`, and so `make gpu-check`, selects
def card(request) -> Backend:
    return make_backend(request.param)


def filled(card: Backend, heads: KvHeads, tokens: int, dtype=None) -> tuple[Pages, list[int], Tensor, Tensor]:
    """Pages of random keys and values in random order, all rows in use: the sequence's pages, k and v."""
    pages = Pages(card, heads, -(-tokens // heads.page) + 1, dtype)
    row = pages.free
    pages.kv[row] = torch.randn(len(row), *pages.kv.shape[1:], device="cuda").to(pages.kv.dtype)
    k, v = (pages.kv[row, part].transpose(1, 2).reshape(-1, heads.kv, heads.dim)[:tokens] for part in range(2))
    return pages, row, k, v


def exact_rows(q: Tensor, gate: Tensor, k: Tensor, v: Tensor, rows: Tensor, context: int) -> Tensor:
    """The output of some tokens of a sequence in double precision on the card, one query head at a time."""
    group, position = q.shape[1] // k.shape[1], torch.arange(len(k), device="cuda")
    future = position > (context + rows)[:, None]
    out = torch.empty(len(rows), *q.shape[1:], dtype=torch.float64, device="cuda")
    for head in range(q.shape[1]):
        scores = q[rows, head].double() @ k[:, head // group].double().T / 16
        out[:, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, head // group].double()
    return (out * gate[rows].double().sigmoid()).flatten(1)


@of_both_types
@pytest.mark.parametrize(("group", "tokens"), [(4, 4096), (6, 4096), (8, 4096), (16, 4096), (6, 65536), (16, 65536)])
def test_long_contexts_on_a_card(card, group, tokens, dtype):
    pages, row, k, v = filled(card, PUBLISHED[group], tokens, dtype)
    for new in (1, 4):
        q, gate = pages.queries(new)
        wanted = exact_rows(q, gate, k, v, torch.arange(new, device="cuda"), tokens - new)
        card.assert_close(decode(pages, q, gate, [row], [tokens - new]), wanted)
    chunk = 4096 if tokens == 65536 else 3000
    q, gate = pages.queries(chunk)
    out = prefill(pages, q, gate, [row], [tokens - chunk], [chunk])
    rows = torch.cat([torch.arange(40), torch.randint(chunk, (60,)), torch.arange(chunk - 40, chunk)]).cuda()
    card.assert_close(out[rows], exact_rows(q, gate, k, v, rows, tokens - chunk))


@pytest.mark.parametrize(
    ("group", "context", "tokens"), [(8, 30720, 128), (8, 30720, 768), (6, 30011, 77), (16, 60001, 3)]
)
@of_both_types
def test_a_turn_behind_a_long_prefix_on_a_card(card, group, context, tokens, dtype):
    pages, row, k, v = filled(card, PUBLISHED[group], context + tokens, dtype)
    q, gate = pages.queries(tokens)
    out = prefill(pages, q, gate, [row], [context], [tokens])
    rows = torch.cat([torch.arange(min(40, tokens)), torch.arange(max(tokens - 40, 0), tokens)]).cuda()
    card.assert_close(out[rows], exact_rows(q, gate, k, v, rows, context))


def test_turns_of_a_batch_behind_long_prefixes_on_a_card(card):
    lengths, contexts = [128, 1, 60, 0, 200], [16384, 9000, 0, 50, 30011]
    pages, row, k, v = filled(card, PUBLISHED[8], 30211)
    q, gate = pages.queries(sum(lengths))
    out = prefill(pages, q, gate, [row] * len(lengths), contexts, lengths)
    for rows, context in zip(torch.arange(sum(lengths)).split(lengths), contexts, strict=True):
        if len(rows) == 0:
            continue
        one, own = slice(rows[0], rows[-1] + 1), torch.arange(len(rows), device="cuda")
        length = context + len(rows)
        card.assert_close(out[one], exact_rows(q[one], gate[one], k[:length], v[:length], own, context))


def test_a_long_prompt_in_one_prefill_on_a_card(card):
    pages, row, k, v = filled(card, PUBLISHED[8], 16385)
    q, gate = pages.queries(16385)
    out = prefill(pages, q, gate, [row], [0], [16385])
    rows = torch.cat([torch.arange(130), torch.randint(16385, (200,)), torch.tensor([16383, 16384])]).cuda()
    card.assert_close(out[rows], exact_rows(q, gate, k, v, rows, 0))


def test_a_million_tokens_on_a_card(card):
    """Every page of the table is the same one, so the answer is that of one page."""
    pages, row, k, v = filled(card, PUBLISHED[16], 64)
    q, gate = pages.queries(1)
    wanted = exact_rows(q, gate, k, v, torch.zeros(1, dtype=torch.int64, device="cuda"), 63)
    card.assert_close(decode(pages, q, gate, [row * 16384], [2**20 - 1]), wanted)
    card.assert_close(prefill(pages, q, gate, [row * 16384], [2**20 - 1], [1]), wanted)


@of_both_types
def test_a_thousand_repeats_give_the_same_bits_on_a_card(card, dtype):
    pages, row, _, _ = filled(card, PUBLISHED[8], 1000, dtype)
    q, gate = pages.queries(40)
    table, scale = pages.table([row]), 1 / 16
    starts, context = cu_seqlens(card, [40]), card.tensor([960])
    one, two = torch.ops.tokenspeed.paged_attention_decode, torch.ops.tokenspeed.paged_attention_prefill
    first = one(q, gate, pages.kv, table, context, scale), two(q, gate, pages.kv, table, starts, context, 40, scale)
    for _ in range(1000):
        assert torch.equal(one(q, gate, pages.kv, table, context, scale), first[0])
        assert torch.equal(two(q, gate, pages.kv, table, starts, context, 40, scale), first[1])


def test_a_captured_graph_follows_the_lengths_on_a_card(card):
    """The lengths change between replays, in place: another split each time, padding included."""
    heads = PUBLISHED[8]
    pages = Pages(card, heads, 200)
    pages.kv[1:] = torch.randn(199, *pages.kv.shape[1:], device="cuda").to(pages.kv.dtype)
    q, gate = pages.queries(3)
    table = card.tensor(torch.randperm(198)[: 3 * 64].add(1).view(3, 64).tolist())
    contexts = card.tensor([0, 0, 0])
    operator, graph = torch.ops.tokenspeed.paged_attention_decode, torch.cuda.CUDAGraph()
    operator(q, gate, pages.kv, table, contexts, 1 / 16)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = operator(q, gate, pages.kv, table, contexts, 1 / 16)
    for lengths in ([4000, 3, 700], [-1, 4095, 64], [0, 0, 0], [-1, -1, -1], [63, 64, 65]):
        contexts.copy_(card.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(replayed, operator(q, gate, pages.kv, table, contexts, 1 / 16))
        for i, context in enumerate(lengths):
            if context < 0:
                assert not replayed[i].any()
                continue
            length = context + 1
            k, v = (pages.kv[table[i].long(), part].transpose(1, 2).flatten(0, 1)[:length] for part in range(2))
            wanted = exact_rows(q[i : i + 1], gate[i : i + 1], k, v, torch.tensor([0]).cuda(), context)
            card.assert_close(replayed[i : i + 1], wanted)
