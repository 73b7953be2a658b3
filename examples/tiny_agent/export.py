"""The trained network as a checkpoint directory that `transformers` and this package load."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.tokenizer import END_OF_TEXT, END_OF_TURN, tokenizer_config

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def export(checkpoint: Path, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes all but the model card into the existing `directory`; weights are rounded to bf16, experts stay fused.

    As in the published checkpoints config.json names the end of text, and generation_config.json adds the end of turn.
    """
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["model"]
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # written for its owner alone, but installed for every user
    end_of_text, end_of_turn = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END_OF_TURN)
    _write_json(directory / "config.json", ModelConfig().to_json(eos_token_id=end_of_text, pad_token_id=end_of_text))
    generation = {"eos_token_id": [end_of_turn, end_of_text], "pad_token_id": end_of_text, "do_sample": False}
    _write_json(directory / "generation_config.json", generation)
    _write_json(directory / "tokenizer_config.json", tokenizer_config())
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    shutil.copyfile(CHAT_TEMPLATE, directory / "chat_template.jinja")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
