"""What drafts cost: captured decode steps with and without them, timed at start."""

from collections.abc import Callable

import torch

from ..config import PAGE_TOKENS
from ..parallel.costs import microseconds
from ..schedule.step import DecodeRow, Step
from .runner import Runner

_WARM_UP, _ROUNDS, _CALLS = 1, 3, 2
_GRID = 20  # costs are rounded to a twentieth, so that two starts seldom differ


@torch.inference_mode()
def draft_costs(runner: Runner, depths: Callable[[int], int]) -> tuple[tuple[int, float], ...]:
    """As `Limits.draft_costs`, where decode steps were captured and some draft; depths: drafts by the number of
    sequences. Of sequences of a token, which say random ids: text shares more experts. Every rank calls it alike,
    before any sequence begins. Mutates pages and slots."""
    graphs, tables, memory, costs = runner.graphs, runner.tables, runner.memory, []
    generator = torch.Generator(runner.device)
    for size in graphs.sizes if graphs else ():
        if not depths(size) or size > min(len(memory.pages), len(memory.slots)):
            break
        rows, us = tuple(DecodeRow(i, i, i) for i in range(size)), []
        for drafts in (0, depths(size)):
            tables.clear()
            tables.pages[:size, 0] = torch.arange(size)
            tables.capacity[:size], tables.length[:size], tables.left[:size] = PAGE_TOKENS, 1, 1 << 20
            tables.ids.random_(0, runner.model.config.vocab, generator=generator.manual_seed(0))
            step = Step(decode=rows, width=1 + drafts, drafts=drafts)
            us.append(microseconds(lambda step=step: graphs.replay(step), runner.device, _WARM_UP, _ROUNDS, _CALLS))
        costs.append((size, round(_GRID * us[1] / us[0]) / _GRID))
    tables.clear()
    return tuple(costs)
