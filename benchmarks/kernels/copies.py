"""Copies of state slots and KV pages."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case, Inputs, Sizes, operator_case

SLOT_BYTES = 63 << 20  # 35B-A3B: 60 MiB of state, with its update ring and windows
PAGE_SHAPE = (10, 2, 2, 64, 256)  # 35B-A3B: ten layers of two kv heads


def _memcpy_slots(slots: Tensor, source: Tensor, destination: Tensor) -> None:
    half = slots.shape[0] // 2
    for i in range(half):  # one driver copy a slot: what an engine without the operator would do
        slots[half + i].copy_(slots[i])


def _index_pages(pages: Tensor, source: Tensor, destination: Tensor, rows: Tensor) -> None:
    pages.index_copy_(0, destination.long(), pages.index_select(0, source))


def cases(sizes: Sizes) -> Iterator[Case]:
    """One to many slots of 35B-A3B; one to many of its pages, whole."""
    for count in sizes.copies:

        def states(draw: Inputs, count=count) -> tuple:
            slots = draw.bytes(2 * count, SLOT_BYTES)
            return slots, draw.integers(range(count)), draw.integers(range(count, 2 * count))

        peers = {"one driver copy a slot": _memcpy_slots}
        yield operator_case("copy_states", f"{count} slots of 63 MiB", 2 * count * SLOT_BYTES, states, peers=peers)
    for count in (1, 16, 256) if len(sizes.copies) > 1 else (1,):

        def pages(draw: Inputs, count=count) -> tuple:
            arena = draw.randn(2 * count, *PAGE_SHAPE)
            numbers = torch.randperm(2 * count)
            return (
                arena,
                draw.integers(numbers[:count].tolist()),
                draw.integers(numbers[count:].tolist()),
                draw.integers([PAGE_SHAPE[3]] * count),
            )

        size = 2 * count * 2 * torch.Size(PAGE_SHAPE).numel()
        peers = {"index_copy": _index_pages}
        yield operator_case("copy_pages", f"{count} pages of 1.25 MiB", size, pages, peers=peers)
