"""From a flat program of stages, each with its placements, to one with the collectives in it. Done once, at loading.

A collective stands before the stage that needs it, never after the one that caused it: sums wait as long as they can,
pass through stages that act alike on every term, and end inside the norm that consumes them.

A sum of tokens that ends in a norm has a second form: a reduce-scatter along the tokens, the norm of this rank's part,
and an all-gather of the norms. The residual stream then stays in parts between the norms. `link` makes a program of
either form; which is faster depends on the number of tokens (`costs.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..errors import PlacementError
from .comm import Communicator
from .mesh import Mesh
from .placement import Keep, Partial, Placement, Replicate, Shard

Call = Callable[[Tensor | None, Tensor | None, object], tuple[Tensor, Tensor | None]]


class Stage(Protocol):
    """What the pass needs of a stage; see `model.layers.Stage`."""

    input: Placement
    output: Placement
    absorbs_reduce: bool
    picks_rows: bool
    forward: Call

    def reduce_into(self, x, residual, batch, communicator: Communicator, group: str):
        """`forward` behind the sum of x over a group, of a stage that absorbs it."""

    def reduce_in_parts(self, x, residual, batch, communicator: Communicator, group: str):
        """The same with the residual stream in parts, before and behind it."""


@dataclass(frozen=True, slots=True)
class Collective:
    """kind: all-reduce, all-gather or reduce-scatter; dim: of the two latter; rows: what x has a row of, "token" or
    "logit row"."""

    kind: str
    group: str
    dim: int | None
    rows: str

    def __str__(self) -> str:
        return f"{self.kind}({self.group})" if self.dim is None else f"{self.kind}({self.dim}, {self.group})"


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage of a compiled program (None: its end), the collective it needs first, and whether the two are one
    callable; before, input, output: placement of x as it arrives, as the stage takes it and as it gives it."""

    name: str
    stage: Stage | None
    collective: Collective | None
    fused: bool
    before: Placement
    input: Placement
    output: Placement


def compile_program(program: Sequence[tuple[str, Stage]], mesh: Mesh, output: Placement) -> list[Entry]:
    """The program with its collectives; `output`: the placement in which its last x is wanted.

    With one rank it is the stages and nothing else. Raises PlacementError, naming both stages, where one stage gives
    what no single collective turns into what the next one takes.
    """
    placement: Placement = Replicate()
    producer, rows = "the program's input", "token"
    entries = []
    for name, stage in program:
        collective, taken = _move(placement, stage.input, mesh, producer, name, rows)
        fused = stage.absorbs_reduce and collective is not None and collective.kind == "all-reduce"
        given = taken if isinstance(stage.output, Keep) else _canonical(stage.output, mesh)
        entries.append(Entry(name, stage, collective, fused, placement, taken, given))
        producer, placement = name, given
        rows = "logit row" if stage.picks_rows else rows
    collective, taken = _move(placement, output, mesh, producer, "the program's output", rows)
    if collective:
        entries.append(Entry("output", None, collective, False, placement, taken, taken))
    return entries


def group_of_parts(compiled: Sequence[Entry]) -> str | None:
    """The group over which the program's sums can be made in parts; None where it has none: every norm of tokens must
    end a sum, and all of them sums over the same ranks, or the residual stream would have to be cut anew."""
    groups = {
        entry.collective.group if entry.fused else None
        for entry in compiled
        if entry.stage and entry.stage.absorbs_reduce and not (entry.fused and entry.collective.rows != "token")
    }
    return groups.pop() if len(groups) == 1 else None


def link(compiled: Sequence[Entry], communicator: Communicator, in_parts: bool = False) -> list[Call]:
    """A compiled program as callables, to be run one after the other. in_parts: sums of tokens in their second form,
    for one that has a `group_of_parts`."""
    calls: list[Call] = []
    for entry in compiled:
        if in_parts and entry.stage and entry.stage.picks_rows and isinstance(entry.stage.input, Keep):
            calls.append(JoinParts(communicator, group_of_parts(compiled)))
        if entry.fused:
            made = ReduceInParts if in_parts and entry.collective.rows == "token" else ReduceInto
            calls.append(made(entry.stage, communicator, entry.collective.group))
            continue
        if entry.collective:
            calls.append(Collect(entry.collective, communicator))
        if entry.stage:
            calls.append(entry.stage.forward)
    return calls


@dataclass(frozen=True, slots=True)
class ReduceInto:
    """All-reduce and the stage that consumes it, as one callable."""

    stage: Stage
    communicator: Communicator
    group: str

    def __call__(self, x, residual, batch):
        return self.stage.reduce_into(x, residual, batch, self.communicator, self.group)


@dataclass(frozen=True, slots=True)
class ReduceInParts:
    """`ReduceInto` whose residual stream lies in parts over the ranks of the group."""

    stage: Stage
    communicator: Communicator
    group: str

    def __call__(self, x, residual, batch):
        return self.stage.reduce_in_parts(x, residual, batch, self.communicator, self.group)


@dataclass(frozen=True, slots=True)
class JoinParts:
    """Makes the residual stream whole, for a stage that picks rows of it. x: a row for each of the stream."""

    communicator: Communicator
    group: str

    def __call__(self, x, residual, batch):
        return x, self.communicator.all_gather(residual, 0, self.group)[: len(x)]


@dataclass(frozen=True, slots=True)
class Collect:
    """A collective on its own."""

    collective: Collective
    communicator: Communicator

    def __call__(self, x, residual, batch):
        kind, group, dim = self.collective.kind, self.collective.group, self.collective.dim
        if kind == "all-reduce":
            return self.communicator.all_reduce(x, group), residual
        if kind == "all-gather":
            return self.communicator.all_gather(x, dim, group), residual
        return self.communicator.reduce_scatter(x, dim, group), residual


def _move(
    have: Placement, want: Placement, mesh: Mesh, producer: str, consumer: str, rows: str
) -> tuple[Collective | None, Placement]:
    """The collective that turns one placement into another, if one is needed, and what x is then."""
    want = _canonical(want, mesh)
    match have, want:
        case (Replicate() | Partial(), Keep()):
            return None, have
        case _ if have == want:
            return None, have
        case Partial(group), Replicate():
            return Collective("all-reduce", group, None, rows), want
        case Shard(dim, group), Replicate() | Keep():
            return Collective("all-gather", group, dim, rows), Replicate()
        case Partial(group), Shard(dim, same) if same == group:
            return Collective("reduce-scatter", group, dim, rows), want
    raise PlacementError(f"{producer} gives {have} and {consumer} takes {want}: no single collective leads there.")


def _canonical(placement: Placement, mesh: Mesh) -> Placement:
    """The same placement over the first name of its ranks; over a group of one rank, Replicate."""
    match placement:
        case Shard(_, group) | Partial(group) if mesh.size(group) == 1:
            return Replicate()
        case Shard(dim, group):
            return Shard(dim, mesh.canonical(group))
        case Partial(group):
            return Partial(mesh.canonical(group))
    return placement
