"""Decode graphs where there is no GPU: what would be captured runs again at each replay, and its results take the place
of those of the capture, so that the pieces meet in the same tensors as on a card."""

from contextlib import nullcontext
from dataclasses import fields
from unittest.mock import patch

import torch
from checkpoints import CPU
from torch import Tensor

from tokenspeed import ops
from tokenspeed.engine.executor.batch import Forwarded
from tokenspeed.engine.executor.graphs import DecodeGraphs


class Rerun:
    """In place of a `torch.cuda.CUDAGraph`."""

    def __init__(self, run, result):
        self._run, self._result = run, result

    def replay(self) -> None:
        again = self._run()
        if isinstance(again, Forwarded):
            for kept, new in zip(_tensors(self._result), _tensors(again), strict=True):
                kept.copy_(new)


def _tensors(forwarded: Forwarded) -> list[Tensor]:
    """What a forward pass leaves for what comes behind it."""
    decode = forwarded.batch.decode
    kept = [*(getattr(decode, field.name) for field in fields(decode)), forwarded.logits, forwarded.hidden]
    return [x for x in kept if x is not None]


class RerunGraphs(DecodeGraphs):
    """replayed: of each Step that replayed anything, what."""

    def __init__(self, runner, depths):
        self.replayed: list[list[str]] = []
        self._drafter = runner._drafter
        with patch.object(ops, "strict", nullcontext), torch.inference_mode():
            super().__init__(runner, CPU, runner.tables.nobody, (False,), depths, progress=False)

    def _capture(self, run):
        result = run()
        return Rerun(run, result), result

    def forward(self, step):
        found = super().forward(step)
        self.replayed.append(["forward"] if found else [])
        return found

    def choose(self, step, greedy):
        news = super().choose(step, greedy)
        self.replayed[-1] += ["choose"] if news is not None else []
        return news

    def follow(self, step, news, greedy):
        if self._drafter is None:
            return super().follow(step, news, greedy)
        with patch.object(self._drafter, "follow", wraps=self._drafter.follow) as made:
            done = super().follow(step, news, greedy)
        self.replayed[-1] += [f"follow {call.args[1]}" for call in made.call_args_list]
        return done
