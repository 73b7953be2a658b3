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


def panels(names: Sequence[str], over: str, title: str) -> tuple[Any, Sequence[Any]]:
    """A figure and its axes, side by side. title: what was measured, and where. Raises ConfigError without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(3.7 * len(names), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, wrap=True)
    axes = figure.subplots(1, len(names))
    for axis, name in zip(axes, names, strict=True):
        axis.set(xlabel=over, ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def save(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    for axis in axes:
        low, high = axis.get_ylim()
        axis.set_ylim(0, high + 0.05 * (high - low))  # markers at the top are whole, too
        axis.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path} cannot be written: {error}") from None
