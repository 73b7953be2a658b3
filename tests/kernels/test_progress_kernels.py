"""Claims about the kernels of a sequence's progress: large batches, strided tables, and steps behind one another."""

import pytest
import torch
from torch.nn.functional import pad

from tests.kernels.launches import emulator, queued, torch_served
from tests.ops.backends import same_bits
from tests.ops.test_progress import PAGE

pytest_plugins = ["tests.kernels.schedules"]

SEQUENCES, WIDTH = 256, 8


def columns(rows: int, low: int, high: int, width: int | None = None, dtype=torch.int32) -> torch.Tensor:
    return torch.randint(low, high, (rows,) if width is None else (rows, width), dtype=dtype)


class Progress:
    """Tables of more sequences than a batch has, and a batch with padding."""

    def __init__(self, batch: int, width: int, stops: int = 3):
        rows = batch + 3
        self.width = width
        self.index = torch.randperm(rows)[:batch]
        write_slot = torch.where(torch.rand(batch) < 0.2, -1, columns(batch, 0, 99)).int()
        self.packed = torch.stack([self.index.int(), columns(batch, -1, 99), write_slot])
        self.prompt, self.left = columns(rows, 1, 200), columns(rows, 0, 12)
        self.length = self.prompt + columns(rows, 0, 20)
        self.ids = columns(rows, 0, 3, width, torch.int64)
        self.pages, self.capacity = columns(rows, 0, 50, 5), columns(rows, 0, 5) * PAGE
        self.min_tokens, self.stops = columns(rows, 0, 30), columns(rows, -1, 3, stops, torch.int64)
        self.chosen = self.ids.roll(-1, 1)[self.index] * (torch.rand(batch, width) < 0.8)  # most drafts are right
        self.inv_freq = torch.tensor([1.0, 0.1, 0.003])

    def to(self, device: str) -> "Progress":
        """A copy, in which rows of ids and pages are slices of wider ones."""
        copy = object.__new__(Progress)
        for name, value in vars(self).items():
            setattr(copy, name, value.to(device, copy=True) if isinstance(value, torch.Tensor) else value)
        copy.ids = pad(copy.ids, (1, 2))[:, 1 : self.width + 1]
        copy.pages = pad(copy.pages, (1, 3))[:, 1:6]
        return copy

    def step(self, operators) -> list[torch.Tensor]:
        """What comes next, the rows of a draft head, and the verdict on what is chosen: every output, and the tables as
        they are now."""
        progress = (self.length, self.left, self.prompt, self.ids)
        places = (self.pages, self.capacity, self.inv_freq, self.width, 0.5)
        begun = operators.decode_rows(self.packed, *progress, *places, PAGE)
        _, tokens, outputs, context, *_ = begun
        rows = operators.paged_rows(self.index, context, *places, -1, PAGE)
        drafts = operators.draft_rows(self.index, context, self.capacity, self.prompt, self.ids, 3)
        tables = (self.length, self.left, self.ids)
        verdict = (self.chosen, tokens, outputs, context, self.index, self.min_tokens, self.stops)
        return [*begun, *rows, *drafts, operators.accept_tokens(*verdict, *tables)]

    def tables(self) -> list[torch.Tensor]:
        return [self.length, self.left, self.ids]


class Operators:
    def __init__(self, backend):
        self.decode_rows, self.paged_rows, self.draft_rows, self.accept_tokens = (
            backend.op(name) for name in ("decode_rows", "paged_rows", "draft_rows", "accept_tokens")
        )


def check_equal(results, expected):
    for at, (now, then) in enumerate(zip(results, expected, strict=True)):
        if now.is_floating_point():
            assert (now.cpu() - then).abs().max() < 1e-5
        else:
            assert same_bits(now.cpu(), then), at


@pytest.mark.parametrize(("batch", "width", "stops"), [(SEQUENCES, WIDTH, 3), (5, 1, 0), (3, 32, 9), (33, 5, 1)])
def test_the_kernels_equal_torch(scheduled, batch, width, stops):
    progress = Progress(batch, width, stops)
    expected, results = progress.to("cpu"), []
    wanted = [expected.step(torch.ops.tokenspeed_torch) for _ in range(2)]
    now = progress.to(scheduled.device)
    assert torch_served(lambda: results.extend(now.step(Operators(scheduled)) for _ in range(2))) == []
    for step in range(2):
        check_equal(results[step], wanted[step])
    check_equal(now.tables(), expected.tables())


@pytest.mark.parametrize("seed", range(4))
def test_steps_behind_one_another_wait_for_what_they_read(backend, seed):
    if backend.emulated is None:
        pytest.skip("only the emulated device always starts the successor first")
    progress = Progress(6, 4)
    expected, now = progress.to("cpu"), progress.to("cpu")
    wanted = [expected.step(torch.ops.tokenspeed_torch) for _ in range(3)]
    results = queued(emulator(), seed, lambda: [now.step(torch.ops.tokenspeed_emulated) for _ in range(3)])
    for step in range(3):
        check_equal(results[step], wanted[step])
    check_equal(now.tables(), expected.tables())


def test_more_tokens_than_a_warp_has_lanes_go_to_torch(backend):
    progress = Progress(2, 33).to(backend.device)
    assert torch_served(lambda: progress.step(Operators(backend))) == ["tokenspeed_torch::accept_tokens"]
