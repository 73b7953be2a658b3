"""Claims about `copy_states` and `copy_pages`: exact copies, and nothing else moves."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.ops.fp8 import FP8

from .backends import bounded


def pairs(data, places: int) -> list[tuple[int, int]]:
    """Pairs of a source and a destination, some of them padding; no destination occurs twice or is a source."""
    order = data.draw(st.permutations(range(places)), "order")
    split = data.draw(st.integers(1, places - 1), "sources")
    destinations = order[split : split + data.draw(st.integers(0, places - split), "pairs")]
    out = [(data.draw(st.sampled_from(order[:split]), "source"), d) for d in destinations]
    padding = [(-1, order[0]), (order[0], -1), (-1, -1), (-(2**31), order[-1])]
    return data.draw(st.permutations(out + data.draw(st.lists(st.sampled_from(padding), max_size=3))), "pairs")


@bounded
@given(st.data())
def test_copy_states_copies_whole_slots_and_skips_negative_pairs(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    size = 16 * data.draw(st.integers(1, 300), "16-byte units")
    slots = torch.randint(0, 256, (7, size), dtype=torch.uint8).to(backend.device)
    chosen = pairs(data, 7)
    expected = slots.clone()
    for source, destination in chosen:
        if source >= 0 and destination >= 0:
            expected[destination] = slots[source]
    source, destination = ([pair[i] for pair in chosen] for i in (0, 1))
    assert backend.op("copy_states")(slots, backend.tensor(source), backend.tensor(destination)) is None
    assert torch.equal(slots, expected)


@bounded
@given(st.data())
def test_copy_pages_copies_leading_rows_and_skips_negative_pairs(backend, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), "seed"))
    dim = 256 if backend.kernels else data.draw(st.sampled_from([256, 6]), "D")
    pages = backend.randn(6, 2, 2, 1, 64, dim, dtype=data.draw(st.sampled_from([backend.dtype, FP8]), "dtype"))
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[pages.element_size()]
    pages.view(bits)[:, 1, 0].fill_(-1)  # NaN moves like everything else
    chosen = pairs(data, 6)
    rows = [data.draw(st.one_of(st.sampled_from([0, 1, 63, 64]), st.integers(0, 64)), "rows") for _ in chosen]
    expected = pages.clone()
    for (source, destination), count in zip(chosen, rows, strict=True):
        if source >= 0 and destination >= 0:
            expected[destination, ..., :count, :] = pages[source, ..., :count, :]
    source, destination = ([pair[i] for pair in chosen] for i in (0, 1))
    columns = [backend.tensor(values) for values in (source, destination, rows)]
    assert backend.op("copy_pages")(pages, *columns) is None
    assert torch.equal(pages.view(bits), expected.view(bits))
