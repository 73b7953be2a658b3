"""The model card: fixed words around measured figures."""

from pathlib import Path

from safetensors import safe_open

from examples.tiny_agent import acceptance
from examples.tiny_agent.checkpoint import Progress
from examples.tiny_agent.evaluate import table
from examples.tiny_agent.train_mtp import PREFIX

TEMPLATE = Path(__file__).with_name("model_card.md")


def training_figures(progress: Progress) -> dict:
    """The part of evaluation.json about the training."""
    minutes = round(progress.seconds / 60, 1)
    return {"minutes": minutes, "device": progress.device, "steps": progress.step, "tokens": progress.tokens}


def write_card(evaluation: dict, directory: Path) -> None:
    """Writes README.md of the model directory from the template and evaluation.json."""
    with safe_open(directory / "model.safetensors", "pt") as weights:
        sizes = {name: weights.get_tensor(name).numel() for name in weights.keys()}  # noqa: SIM118 - not a mapping
    card = TEMPLATE.read_text().format(
        parameters=f"{sum(size for name, size in sizes.items() if not name.startswith(PREFIX)):,}",
        mtp_parameters=f"{sum(size for name, size in sizes.items() if name.startswith(PREFIX)):,}",
        megabytes=f"{(directory / 'model.safetensors').stat().st_size / 1e6:.1f}",
        training=_in_words(evaluation["training"]),
        mtp_training=_in_words(evaluation["mtp"]["training"]),
        table=table(evaluation),
        mtp_table=acceptance.table(evaluation["mtp"]),
    )
    (directory / "README.md").write_text(card)


def _in_words(training: dict) -> str:
    return (
        f"{training['minutes']:.1f} minutes on {training['device']},\n"
        f"{training['steps']:,} steps of Muon and AdamW, {training['tokens'] / 1e6:.1f} million tokens"
    )
