"""Loss and accuracy over training time, as a small PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples.tiny_agent.checkpoint import Progress


def plot(progress: Progress, path: Path) -> None:
    """Loss per answer token (log scale) above, exact held-out turns below, over minutes of training."""
    figure, (losses, accuracies) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    losses.plot(*zip(*progress.losses, strict=True), linewidth=1)
    losses.set(yscale="log", ylabel="loss per answer token, nats")
    for length in sorted({length for _, length, _ in progress.accuracies}):
        points = [(minutes, share) for minutes, at, share in progress.accuracies if at == length]
        accuracies.plot(*zip(*points, strict=True), marker=".", label=f"{length} tokens")
    accuracies.set(xlabel=f"minutes on {progress.device}", ylabel="held-out turns exact", ylim=(0, 1.02))
    accuracies.legend(loc="lower right")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
