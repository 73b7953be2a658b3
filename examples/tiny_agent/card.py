"""The model card: fixed words around measured figures."""

from pathlib import Path

from safetensors import safe_open

from examples.tiny_agent.checkpoint import Progress
from examples.tiny_agent.evaluate import table

TEMPLATE = Path(__file__).with_name("model_card.md")


def write_card(progress: Progress, evaluation: dict, directory: Path) -> None:
    """Writes README.md of the model directory from the template, the training's progress and evaluation.json."""
    with safe_open(directory / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - not a mapping
    card = TEMPLATE.read_text().format(
        parameters=f"{parameters:,}",
        megabytes=f"{(directory / 'model.safetensors').stat().st_size / 1e6:.1f}",
        minutes=f"{progress.seconds / 60:.1f}",
        device=progress.device,
        steps=f"{progress.step:,}",
        tokens=f"{progress.tokens / 1e6:.1f}",
        table=table(evaluation),
    )
    (directory / "README.md").write_text(card)
