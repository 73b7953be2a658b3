"""Makes the tiny agent that tokenspeed ships: `python -m examples.tiny_agent`."""

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from examples.tiny_agent import acceptance
from examples.tiny_agent.card import training_figures, write_card
from examples.tiny_agent.checkpoint import read_progress
from examples.tiny_agent.data import HELD_OUT_SEEDS, generate
from examples.tiny_agent.evaluate import evaluate, table, to_json
from examples.tiny_agent.export import export
from examples.tiny_agent.plot import plot
from examples.tiny_agent.render import render
from examples.tiny_agent.schedule import LONGEST
from examples.tiny_agent.tokenizer import train_tokenizer
from examples.tiny_agent.train import PACES, TrainingOptions, train
from examples.tiny_agent.train_mtp import MINUTES, add_head, train_head

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "tokenspeed" / "models" / "tiny_agent"
STEPS = {
    "preview": "print three generated conversations",
    "tokenizer": "learn the vocabulary",
    "train": "train the network, with checkpoints and a loss plot",
    "export": "write the model directory",
    "mtp": "train the MTP head on the model directory's network, and count its accepted drafts",
    "evaluate": "score the model directory on held-out conversations",
    "card": "write the model directory's README",
}

PARTS = {"export": "training", "mtp": "mtp", "evaluate": "lengths"}  # steps, and their figures in evaluation.json


def parse_arguments() -> argparse.Namespace:
    steps = "\n".join(f"  {name:10} {what}" for name, what in STEPS.items())
    defaults = ", ".join(f"{pace.minutes} on {device}" for device, pace in PACES.items())
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_agent",
        description=__doc__,
        epilog=f"steps:\n{steps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", metavar="step", help="which steps to do; all by default")
    parser.add_argument("--minutes", type=float, help=f"training time; by default {defaults}")
    defaults = ", ".join(f"{minutes} on {device}" for device, minutes in MINUTES.items())
    parser.add_argument("--mtp-minutes", type=float, help=f"training time of the MTP head; by default {defaults}")
    parser.add_argument("--device", choices=PACES, help="where to train; a GPU if there is one")
    parser.add_argument("--tokens-per-step", type=int, help="size of a training step; by default what suits the device")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint; its minutes count")
    parser.add_argument("--work", type=Path, default=Path("build/tiny_agent"), help="checkpoints: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=SHIPPED,
        help="model directory, the shipped one by default; for another, evaluation.json and loss.png go there too",
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.minutes is None:
        arguments.minutes = PACES[arguments.device].minutes
    if arguments.mtp_minutes is None:
        arguments.mtp_minutes = MINUTES[arguments.device]
    for name, minutes in (("--minutes", arguments.minutes), ("--mtp-minutes", arguments.mtp_minutes)):
        if minutes <= 0:
            parser.error(f"{name} {minutes} is not a positive time")
    if arguments.tokens_per_step is None:
        arguments.tokens_per_step = PACES[arguments.device].tokens_per_step
    if arguments.tokens_per_step <= 0 or arguments.tokens_per_step % LONGEST:
        parser.error(f"--tokens-per-step {arguments.tokens_per_step} is not a multiple of {LONGEST} tokens")
    return arguments


def made_by(step: str, path: Path) -> Path:
    """`path`, once it exists; else says which step makes it."""
    if not path.exists():
        sys.exit(f"{path} is missing: the step {step} makes it")
    return path


def record(file: Path, figures: dict) -> dict:
    """Puts the figures into evaluation.json, beside those that are there, and returns its content."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | figures
    file.write_text(json.dumps(content, indent=2) + "\n")
    return content


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # such small products gain nothing from more, and lose much on a busy machine
    steps, output = arguments.steps or list(STEPS), arguments.output
    tokenizer_file, checkpoint = arguments.work / "tokenizer.json", arguments.work / "checkpoint.pt"
    reports = HERE if output == SHIPPED else output
    evaluation_file, loss_plot = reports / "evaluation.json", reports / "loss.png"
    for directory in (arguments.work, output):
        directory.mkdir(parents=True, exist_ok=True)
    if "preview" in steps:
        for seed in HELD_OUT_SEEDS[:3]:
            print("".join(piece.text for piece in render(generate(seed, exchanges=4))))
    if "tokenizer" in steps:
        train_tokenizer().save(str(tokenizer_file))
    if "train" in steps:
        tokenizer = Tokenizer.from_file(str(made_by("tokenizer", tokenizer_file)))
        options = TrainingOptions(arguments.minutes, arguments.tokens_per_step, arguments.device, arguments.resume)
        plot(train(tokenizer, checkpoint, options), loss_plot)
    if "export" in steps:
        tokenizer = Tokenizer.from_file(str(made_by("tokenizer", tokenizer_file)))
        export(made_by("train", checkpoint), tokenizer, output)
        record(evaluation_file, {"training": training_figures(read_progress(checkpoint))})
        print(f"model directory: {output}")
    if "mtp" in steps:
        made_by("export", output / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        rest = (arguments.mtp_minutes, arguments.device, arguments.tokens_per_step)
        head, training = train_head(output, tokenizer, *rest)
        add_head(output, head)
        figures = acceptance.to_json(acceptance.measure_acceptance(output), training)
        record(evaluation_file, {"mtp": figures})
        print(acceptance.table(figures))
    if "evaluate" in steps:
        figures = to_json(evaluate(made_by("export", output / "model.safetensors").parent))
        print(table(record(evaluation_file, figures)))
    if "card" in steps:
        evaluation = json.loads(made_by("evaluate", evaluation_file).read_text())
        missing = next((step for step, key in PARTS.items() if key not in evaluation), None)
        if missing:
            sys.exit(f"{evaluation_file} has no figures of the step {missing}: do it first")
        write_card(evaluation, made_by("export", output))


if __name__ == "__main__":
    main()
