"""Training against the clock: the schedule is a share of the minutes given, whatever the machine."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.tiny_agent import checkpoint
from examples.tiny_agent.checkpoint import Progress
from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.data import HELD_OUT_SEEDS
from examples.tiny_agent.dataset import Batch, batch
from examples.tiny_agent.model import TinyAgent
from examples.tiny_agent.optimizer import build_optimizers
from examples.tiny_agent.schedule import BatchStream, Clock, learning_rate
from examples.tiny_agent.tokenizer import END_OF_TEXT

LEARNING_RATE = 3e-3  # the peak, for both optimizers
BALANCE_WEIGHT = 0.01
GRADIENT_NORM = 1.0
STEPS_PER_RECORD = 20
WATCHED = {512: 32, 2048: 8}  # held-out conversations to watch training by: tokens -> how many


@dataclass(frozen=True, slots=True)
class Pace:
    """How a device is used. minutes: the default training time; workers: processes that generate data beside it."""

    minutes: float
    tokens_per_step: int
    workers: int
    seconds_between_checks: float


# On one core more steps teach more than larger ones; a GPU is fast enough to have both, and data must keep up with it.
PACES = {"cpu": Pace(120.0, 2048, 0, 300.0), "cuda": Pace(7.5, 32768, 12, 30.0)}


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """minutes: total training time, that of a resumed run included; device: "cpu" or "cuda".

    tokens_per_step is a multiple of the longest sequence.
    """

    minutes: float
    tokens_per_step: int
    device: str = "cpu"
    resume: bool = False


def loss_of(model: TinyAgent, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss with the experts' balance term, and the plain mean over the answers' tokens, detached."""
    logits = model(data.ids)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten(), reduction="none")
    weights = data.weights[:, 1:].flatten()
    loss = (losses * weights).sum() / weights.sum() + BALANCE_WEIGHT * model.balance_loss()
    return loss, losses.detach()[weights >= 1].mean()


@torch.no_grad()
def exact_turns(model: TinyAgent, batches: list[Batch]) -> float:
    """Share of the assistant turns whose every token is the argmax, given the true tokens before it."""
    exact = []
    for data in batches:
        correct = (model(data.ids)[:, :-1].argmax(-1) == data.ids[:, 1:]).cpu()
        for row, turns in zip(correct, data.turns, strict=True):
            exact += [bool(row[turn.start - 1 : turn.stop - 1].all()) for turn in turns]
    return sum(exact) / len(exact)


def held_out(tokenizer: Tokenizer, length: int, padding: int, device: str) -> list[Batch]:
    """The held-out conversations of this length in WATCHED, not those of the final evaluation."""
    size = max(1, 2048 // length)
    seeds = HELD_OUT_SEEDS[-WATCHED[length] :]
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    return [batch(part, tokenizer, length, padding).to(device) for part in batches]


def train(tokenizer: Tokenizer, path: Path, options: TrainingOptions) -> Progress:
    """Trains until options.minutes have passed, with a checkpoint in `path` at each check and at the end."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = TinyAgent(ModelConfig()).to(options.device)
    optimizers = build_optimizers(model, LEARNING_RATE)
    progress = checkpoint.load(path, model, optimizers) if options.resume else Progress()
    progress.device = f"one {torch.cuda.get_device_name()}" if options.device == "cuda" else "one CPU core"
    padding, pace = tokenizer.token_to_id(END_OF_TEXT), PACES[options.device]
    watched = {length: held_out(tokenizer, length, padding, options.device) for length in WATCHED}
    clock = Clock(options.minutes * 60, progress.seconds, time.monotonic())
    stream = BatchStream(tokenizer, clock, progress.step, progress.next_seed, options.tokens_per_step, padding)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=pace.workers))
    bar = tqdm(total=round(clock.total), initial=round(clock.before), unit="s", mininterval=5, bar_format=_BAR)
    checked, recent = clock.before, []
    while (share := clock.share()) < 1:
        data = next(batches).to(options.device)
        loss, answer_loss = loss_of(model, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        rate = learning_rate(share, progress.step, LEARNING_RATE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        recent.append(answer_loss)
        progress.step += 1
        progress.tokens += data.ids.numel()
        progress.next_seed += stream.seeds_per_step()
        progress.seconds = clock.seconds()
        if len(recent) == STEPS_PER_RECORD:
            progress.losses.append((progress.seconds / 60, torch.stack(recent).mean().item()))
            recent.clear()
            postfix = f"step {progress.step}, loss {progress.losses[-1][1]:.4f}, lr {rate:.1e}"
            bar.set_postfix_str(postfix, refresh=False)
        bar.n = min(round(progress.seconds), bar.total)
        bar.update(0)
        if progress.seconds - checked >= pace.seconds_between_checks or clock.share() >= 1:
            checked = progress.seconds
            _check(model, watched, progress, bar)
            checkpoint.save(path, model, optimizers, progress)
    bar.close()
    return progress


_BAR = "{desc}{percentage:3.0f}%|{bar:20}| {elapsed} of training, {remaining} left, {postfix}"


def _check(model: TinyAgent, watched: dict[int, list[Batch]], progress: Progress, bar: tqdm) -> None:
    minutes, line = progress.seconds / 60, []
    for length, batches in watched.items():
        progress.accuracies.append((minutes, length, exact_turns(model, batches)))
        line.append(f"{progress.accuracies[-1][2]:.1%} at {length} tokens")
    loss = f"{progress.losses[-1][1]:.4f}" if progress.losses else "-"
    bar.write(f"{minutes:.1f} min, step {progress.step}, loss {loss}: held-out turns exact {', '.join(line)}")
