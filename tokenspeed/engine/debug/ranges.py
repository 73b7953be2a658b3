"""Named ranges around the phases of the loop and the stages of the network, for a profiler to show.

The callables are replaced once, when ranges are asked for: an engine without them runs no line of this file.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from ..core import Engine

Range = Callable[[str], AbstractContextManager]  # torch.cuda.nvtx.range, torch.profiler.record_function


def add_ranges(engine: Engine, range: Range) -> None:
    """Phases: `plan`, `launch`, `forward`, `sample`, `reconcile`; within `forward` one range a stage, named by its
    checkpoint key. A decode step that replays a CUDA graph runs no stage on the host, so it shows phases alone.

    Mutates the engine: its callables are replaced by ones that open a range first."""
    runner = engine.runner
    for owner, method, name in (
        (engine.scheduler, "plan", "plan"),
        (runner, "launch", "launch"),
        (runner, "forward", "forward"),
        (runner.sampler, "choose", "sample"),
        (engine.scheduler, "reconcile", "reconcile"),
    ):
        setattr(owner, method, _within(range, name, getattr(owner, method)))
    for name, stage in zip(runner.model.names, runner.model.program, strict=True):
        stage.forward = _within(range, name, stage.forward)
    runner.model.link()


def _within(range: Range, name: str, call: Callable) -> Callable:
    def ranged(*arguments, **named):
        with range(name):
            return call(*arguments, **named)

    return ranged
