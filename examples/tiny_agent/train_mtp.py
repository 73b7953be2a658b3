"""Trains the MTP head on the frozen trunk of a model directory, and puts it there."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.dataset import Batch
from examples.tiny_agent.model import TinyAgent
from examples.tiny_agent.mtp import MtpHead
from examples.tiny_agent.optimizer import build_optimizers
from examples.tiny_agent.schedule import BatchStream, Clock, learning_rate
from examples.tiny_agent.tokenizer import END_OF_TEXT
from examples.tiny_agent.train import BALANCE_WEIGHT, GRADIENT_NORM, LEARNING_RATE, PACES

DRAFTS = 3  # of a chain: each is trained, and counted in the evaluation
DRAFT_WEIGHTS = (1.0, 0.8, 0.64)  # of their losses: a draft counts only where those before it are accepted
MINUTES = {"cpu": 20.0, "cuda": 3.0}
PREFIX = "mtp."


@dataclass(slots=True)
class HeadTraining:
    """How the head was made: minutes of training, on what, in words; steps, and tokens they had."""

    minutes: float
    device: str
    steps: int
    tokens: int


def load_trunk(directory: Path) -> TinyAgent:
    """The network of a model directory without its head, fp32, frozen."""
    weights = load_file(directory / "model.safetensors")
    trunk = TinyAgent(ModelConfig())
    trunk.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)})
    return trunk.requires_grad_(False)


def load_head(directory: Path) -> MtpHead:
    """The head of a model directory, fp32."""
    weights = load_file(directory / "model.safetensors")
    head = MtpHead(ModelConfig())
    head.load_state_dict({name.removeprefix(PREFIX): weights[name] for name in weights if name.startswith(PREFIX)})
    return head


def draft_states(trunk: TinyAgent, head: MtpHead, ids: torch.Tensor, drafts: int) -> tuple[torch.Tensor, ...]:
    """ids int64 [batch, T] -> states of the trunk [batch, T, hidden], then of each draft [batch, T - 1, hidden]."""
    with torch.no_grad():
        hidden, embedded = trunk.hidden(ids), trunk.model.embed_tokens(ids)
    return hidden, *head(embedded[:, 1:], hidden[:, :-1], drafts)


def head_loss(trunk: TinyAgent, head: MtpHead, data: Batch) -> torch.Tensor:
    """The drafts' losses against the token after the next, and the experts' balance."""
    _, *states = draft_states(trunk, head, data.ids, DRAFTS)
    loss = BALANCE_WEIGHT * head.layers[0].mlp.balance_loss
    for before, (state, weight) in enumerate(zip(states, DRAFT_WEIGHTS, strict=True)):
        logits, targets = trunk.lm_head(state[:, before:-1]), data.ids[:, before + 2 :]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        weights = data.weights[:, before + 2 :].flatten()
        loss = loss + weight * (losses * weights).sum() / weights.sum() / sum(DRAFT_WEIGHTS)
    return loss


def train_head(
    directory: Path, tokenizer: Tokenizer, minutes: float, device: str, tokens_per_step: int
) -> tuple[MtpHead, HeadTraining]:
    """Trains a head for the trunk of `directory` for so many minutes, on the conversations the trunk learnt from."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    trunk = load_trunk(directory).to(device)
    head = MtpHead(trunk.config).to(device)
    head.start_from(trunk)
    optimizers = build_optimizers(head, LEARNING_RATE)
    clock = Clock(minutes * 60, 0.0, time.monotonic())
    stream = BatchStream(tokenizer, clock, 0, 0, tokens_per_step, tokenizer.token_to_id(END_OF_TEXT))
    batches = iter(DataLoader(stream, batch_size=None, num_workers=PACES[device].workers))
    done = HeadTraining(minutes, f"one {torch.cuda.get_device_name()}" if device == "cuda" else "one CPU core", 0, 0)
    bar = tqdm(total=round(clock.total), desc="MTP head", unit="s", mininterval=5, bar_format=_BAR)
    while (share := clock.share()) < 1:
        data = next(batches).to(device)
        loss = head_loss(trunk, head, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_NORM)
        rate = learning_rate(share, done.steps, LEARNING_RATE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        done.steps += 1
        done.tokens += data.ids.numel()
        if done.steps % 20 == 0:
            bar.set_postfix_str(f"step {done.steps}, loss {loss.item():.4f}, lr {rate:.1e}", refresh=False)
        bar.n = min(round(clock.seconds()), bar.total)
        bar.update(0)
    bar.close()
    return head.cpu(), done


_BAR = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed} of training, {remaining} left, {postfix}"


def add_head(directory: Path, head: MtpHead) -> None:
    """Puts the head into the model directory, in bf16 below `mtp.`, and names it in config.json. No other tensor
    changes by a bit; both files are replaced at once."""
    file = directory / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(PREFIX)}
    weights |= {PREFIX + name: tensor.to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    save_file(weights, file.with_suffix(".partial"), metadata={"format": "pt"})
    file.with_suffix(".partial").chmod(0o644)  # written for its owner alone, but installed for every user
    os.replace(file.with_suffix(".partial"), file)
    config = json.loads((directory / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
