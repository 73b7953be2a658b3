"""Claims about the copy kernel: boxes and their tails, many pairs, strided arenas."""

import pytest
import torch

from tests.kernels.launches import emulator, torch_served

pytest_plugins = ["tests.kernels.schedules"]


@pytest.mark.parametrize("size", [16, 4096, 32768 - 16, 32768, 32768 + 16, 3 * 32768 + 4112])
def test_slots_of_any_number_of_vectors(scheduled, size):
    wide = torch.randint(0, 256, (5, size + 32), dtype=torch.uint8).to(scheduled.device)
    slots, expected = wide[:, 16 : 16 + size], wide.clone()
    expected[3, 16 : 16 + size], expected[0, 16 : 16 + size] = wide[1, 16 : 16 + size], wide[4, 16 : 16 + size]
    columns = [scheduled.tensor(values) for values in ([1, -1, 4], [3, 2, 0])]
    assert torch_served(lambda: scheduled.op("copy_states")(slots, *columns)) == []
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("rows", [0, 1, 33, 64])
def test_leading_rows_of_every_box(scheduled, rows, dtype):
    pages = torch.randint(0, 256, (4, 3, 2, 2, 64, 256 * dtype.itemsize), dtype=torch.uint8).to(scheduled.device)
    expected = pages.clone()
    expected[2, ..., :rows, :] = pages[0, ..., :rows, :]
    columns = [scheduled.tensor(values) for values in ([0], [2], [rows])]
    assert torch_served(lambda: scheduled.op("copy_pages")(pages.view(dtype), *columns)) == []
    assert torch.equal(pages, expected)


def test_many_pairs_and_none(backend):
    slots = torch.randint(0, 256, (600, 64), dtype=torch.uint8).to(backend.device)
    numbers, expected = torch.randperm(600), slots.clone()
    expected[numbers[300:]] = slots[numbers[:300]]
    columns = [backend.tensor(part.tolist()) for part in (numbers[:300], numbers[300:])]
    backend.op("copy_states")(slots, *columns)
    assert torch.equal(slots, expected)
    backend.op("copy_states")(slots, backend.tensor([]), backend.tensor([]))
    assert torch.equal(slots, expected)


def test_one_block_walks_more_parts_than_its_ring_holds(backend):
    if backend.emulated is not None:
        emulator().emulator_multiprocessors(1)
    slots = torch.randint(0, 256, (4, 20 * 16384 + 48), dtype=torch.uint8).to(backend.device)
    expected = slots.clone()
    expected[2], expected[3] = slots[1], slots[0]
    columns = [backend.tensor(values) for values in ([1, 0, -1], [2, 3, 0])]
    backend.op("copy_states")(slots, *columns)
    if backend.emulated is not None:
        emulator().emulator_multiprocessors(4)
    assert torch.equal(slots, expected)
