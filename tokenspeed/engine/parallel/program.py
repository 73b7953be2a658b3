"""A compiled program as text, and what a rank holds and sends."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .compile import Entry
from .mesh import GROUPS, Mesh
from .sharding import Split


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a rank puts into the collectives of a forward pass. collectives: how many; token, logit_row: payload bytes
    for each of them; sent: bytes that leave the rank for a token which is also a logit row, as a ring sends them."""

    collectives: int
    token: int
    logit_row: int
    sent: float


def traffic(compiled: Sequence[Entry], mesh: Mesh, row_bytes: int, last_row_bytes: int) -> Traffic:
    """row_bytes: of one row of x between stages; last_row_bytes: of what the last stage gives."""
    count, payload, sent = 0, {"token": 0, "logit row": 0}, 0.0
    for entry in compiled:
        if entry.collective is None:
            continue
        size = last_row_bytes if entry.stage is None else row_bytes
        ranks = mesh.size(entry.collective.group)
        share = {"all-reduce": 2 * (ranks - 1) / ranks, "reduce-scatter": (ranks - 1) / ranks, "all-gather": ranks - 1}
        count += 1
        payload[entry.collective.rows] += size
        sent += share[entry.collective.kind] * size
    return Traffic(count, payload["token"], payload["logit row"], sent)


def describe_program(compiled: Sequence[Entry], mesh: Mesh) -> Iterator[str]:
    """Its lines: what runs in which order, with what each weight of a rank is. Equal layers are written once."""
    yield f"groups   {'; '.join(_groups(mesh))}"
    blocks: dict[tuple[str, ...], list[int]] = {}
    pending: list[Entry] = []
    for entry in (*compiled, None):
        layer, _, _ = _place(entry)
        if pending and _place(pending[0])[0] != layer:
            lines = tuple(line for e in pending for line in _entry_lines(e, mesh))
            blocks.setdefault(lines, []).append(_place(pending[0])[1])
            pending = []
        pending += [entry] if entry else []
    for lines, layers in blocks.items():
        if layers[0] >= 0:
            yield f"{len(layers)} x layer {_ranges(layers)}"
        yield from lines


def _place(entry: Entry | None) -> tuple[str, int, str]:
    """What groups entries (a layer, or the entry alone), the layer's number (or -1), the name below it."""
    if entry is None:
        return "", -1, ""
    if not entry.name.startswith("layers."):
        return entry.name, -1, entry.name
    _, number, name = entry.name.split(".", 2)
    return number, int(number), name


def _entry_lines(entry: Entry, mesh: Mesh) -> Iterator[str]:
    _, layer, name = _place(entry)
    indent = "  " if layer >= 0 else ""
    flow = f"{entry.input} -> {entry.output}"
    if entry.fused:
        name, flow = f"{entry.collective} + {name}", f"{entry.before} -> {entry.output}"
    elif entry.collective:
        yield _line(f"{indent}{entry.collective}", f"{entry.before} -> {entry.input}")
    if entry.stage:
        yield _line(indent + name, flow)
        for parameter, value in entry.stage.named_parameters():
            if value.dims:  # the scale of a weight has none of its own
                # A weight's data, and the first of several, go by its name.
                shown = parameter.removesuffix(".data").removesuffix(".0")
                yield _line(f"{indent}    {shown}", _weight(value, mesh))


def _line(left: str, right: str) -> str:
    return f"{left:<44}{right}"


def _weight(parameter: nn.Parameter, mesh: Mesh) -> str:
    shape, whole, placements, notes = list(parameter.shape), [], [], []
    for i, dim in enumerate(parameter.dims):
        sections = dim if isinstance(dim, tuple) else (dim,)
        whole.append(sum(section if isinstance(section, int) else section.size for section in sections))
        splits = [section for section in sections if isinstance(section, Split)]
        groups = {mesh.canonical(split.group) for split in splits if mesh.size(split.group) > 1}
        placements += [f"Shard({i}, {group})" for group in groups]
        notes += _copies(splits, mesh)
    notes += [f", {parameter.padding} rows of padding"] if parameter.padding else []
    notes += [", fp8_block128"] if parameter.dtype.itemsize == 1 else []
    of = f"of {whole}, " if placements else ""
    return f"{shape} {of}{' '.join(placements) or 'Replicate'}{''.join(dict.fromkeys(notes))}"


def _copies(splits: Iterable[Split], mesh: Mesh) -> list[str]:
    return [
        f", each of {split.name} {split.count} on {mesh.size(split.group) // split.count} ranks"
        for split in splits
        if mesh.size(split.group) > split.count
    ]


def _groups(mesh: Mesh) -> Iterator[str]:
    for canonical in dict.fromkeys(mesh.canonical(name) for name in GROUPS):
        same = [name for name in GROUPS if mesh.canonical(name) == canonical]
        yield f"{' = '.join(same)}: {mesh.size(canonical)} rank{'s' if mesh.size(canonical) > 1 else ''}"


def _ranges(numbers: list[int]) -> str:
    """0-2 4 6-8"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
