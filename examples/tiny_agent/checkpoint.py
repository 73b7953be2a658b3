"""What training needs to go on after a stop: one file, replaced atomically."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass(slots=True)
class Progress:
    """How far training is; `next_seed` is the first training seed not yet given out, `device` what trained, in words.

    losses: (minutes, mean loss per answer token); accuracies: (minutes, sequence length, share of exact turns).
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    device: str = ""
    next_seed: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    accuracies: list[tuple[float, int, float]] = field(default_factory=list)


def save(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Writes the checkpoint beside `path` and renames it: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    content = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    torch.save(content, partial)
    os.replace(partial, path)


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restores model and optimizers in place."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(content["model"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return Progress(**content["progress"])


def read_progress(path: Path) -> Progress:
    """Only how far training is."""
    return Progress(**torch.load(path, weights_only=True, map_location="cpu")["progress"])
