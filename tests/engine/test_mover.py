"""The mover copies whole slots and pages, byte for byte, when it is asked, and to nowhere else."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import CPU
from planting import Bug, must_be_noticed

from tokenspeed.engine.executor.memory import HostMemory, Memory, MemoryLayout
from tokenspeed.engine.executor.mover import Mover, _Started, page_runs
from tokenspeed.engine.schedule.step import Move
from tokenspeed.engine.sizes import PUBLISHED


def arenas(seed: int = 0) -> tuple[Memory, HostMemory, Mover]:
    """Small ones with every part a slot can have, full of random bytes."""
    layout = MemoryLayout(PUBLISHED["0.8B"], torch.bfloat16, ring_rows=2, window_entries=6)
    memory, host = Memory(layout, 6, 3, CPU), HostMemory(layout, 5, 2, CPU)
    random = torch.Generator().manual_seed(seed)
    for arena in (memory.pages, memory.slots, host.pages, host.slots):
        arena.random_(0, 256, generator=random)
    return memory, host, Mover(memory, host)


def round_trip() -> None:
    memory, host, mover = arenas()
    pages, slot = memory.pages[[1, 2, 4]].clone(), memory.slots[2].clone()
    untouched = host.pages[[0, 4]].clone(), host.slots[0].clone(), memory.pages[[0, 1, 2, 4]].clone()
    mover.launch([Move(1, True, (1, 2, 4), (1, 2, 3), 2, 1)])
    assert mover.finished() == [1] and mover.finished() == []
    assert torch.equal(host.pages[[1, 2, 3]], pages) and torch.equal(host.slots[1], slot)
    mover.launch([Move(2, False, (1, 2, 3), (5, 3, 4), 1, 0)])
    assert mover.finished() == [2]
    assert torch.equal(memory.pages[[5, 3, 4]], pages) and torch.equal(memory.slots[0], slot)
    assert torch.equal(host.pages[[0, 4]], untouched[0]) and torch.equal(host.slots[0], untouched[1])
    assert torch.equal(memory.pages[:3], untouched[2][:3])


def test_what_is_moved_there_and_back_is_the_same_and_nothing_else_changes():
    round_trip()


def test_neighbours_on_both_sides_are_one_copy():
    assert list(page_runs((1, 2, 4), (1, 2, 3))) == [(1, 1, 2), (4, 3, 1)]
    assert list(page_runs((1, 2, 3), (7, 9, 10))) == [(1, 7, 1), (2, 9, 2)]
    assert list(page_runs((), ())) == []


def test_nothing_is_copied_before_somebody_asks():
    memory, host, mover = arenas()
    before = host.slots.clone()
    mover.launch([Move(1, True, (), (), 0, 0), Move(2, True, (), (), 1, 1)])
    assert torch.equal(host.slots, before) and mover.rate is None
    mover.settle([2])  # as rank 0 says
    assert torch.equal(host.slots[1], memory.slots[1]) and torch.equal(host.slots[0], before[0])
    assert mover.finished() == [1] and mover.rate > 0
    assert torch.equal(host.slots[0], memory.slots[0])


def test_what_comes_from_host_memory_is_waited_for_and_not_what_goes_there():
    mover, waited = arenas()[2], []

    def started(number: int, out: bool) -> _Started:
        return _Started(Move(number, out, (), (), 0, 0), end=SimpleNamespace(synchronize=lambda: waited.append(number)))

    mover._streams = [None, None]
    mover.wait()
    mover._started.append(started(1, True))
    mover.wait()
    mover._started += [started(2, False), started(3, False)]
    mover.wait()
    assert waited == [1, 2]


SLOT = "copy(source.slots[move.source], target.slots[move.target])"


@pytest.mark.parametrize("part", ["state", "ring", "cursor", "window", "hidden"])
def test_a_part_of_a_slot_that_stays_behind_is_noticed(part):
    layout = arenas()[0].layout
    start = layout.hidden_bytes
    for name, (dtype, shape) in layout.slot_parts().items():
        if name == part:
            break
        start += -(-torch.Size(shape).numel() * dtype.itemsize // 256) * 256
    start = 0 if part == "hidden" else start
    rest = f"copy(source.slots[move.source, {start + 64} :], target.slots[move.target, {start + 64} :])"
    instead = f"copy(source.slots[move.source, :{start}], target.slots[move.target, :{start}]); {rest}"
    must_be_noticed(Bug(f"the {part} stays behind", Mover._copy, SLOT, instead, round_trip))


@pytest.mark.parametrize(
    ("name", "where", "code", "instead"),
    [
        ("the last page of a run stays behind", page_runs, "i - start\n", "max(i - start - 1, 1)\n"),
        ("pages that part on the other side go as one", page_runs, "== targets[i] - targets[i - 1] == 1", "== 1"),
        ("a move is named before its bytes are there", Mover._finish, "self._copy(started.move)", "pass"),
        ("slots are mixed up", Mover._copy, "target.slots[move.target]", "target.slots[move.source]"),
    ],
)
def test_a_planted_bug_is_noticed(name, where, code, instead):
    must_be_noticed(Bug(name, where, code, instead, round_trip))
