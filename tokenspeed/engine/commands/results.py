"""The files a measurement leaves: JSON, and a PNG."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}.") from None


def panels(names: Sequence[str], over: str) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, side by side. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(3.7 * len(names), 3.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names))
    for axis, name in zip(axes, names, strict=True):
        axis.set(xlabel=over, ylabel=name)
    return figure, axes


def save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    for axis in axes:
        axis.set_ylim(0, None)
        axis.legend(fontsize=7)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error}") from None
