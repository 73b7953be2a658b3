"""The tiny agent's MTP head: its training, its place in the checkpoint, and what is counted of its drafts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from examples.tiny_agent.acceptance import Acceptance, count, right_drafts, steps_of
from examples.tiny_agent.data import HELD_OUT_SEEDS, TRAINING_SEEDS
from examples.tiny_agent.dataset import Turn, batch, example
from examples.tiny_agent.mtp import MtpHead
from examples.tiny_agent.optimizer import build_optimizers
from examples.tiny_agent.train_mtp import PREFIX, add_head, draft_states, head_loss, load_head, load_trunk

SHIPPED = Path(__file__).parents[1] / "tokenspeed" / "models" / "tiny_agent"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="module")
def trunk():
    return load_trunk(SHIPPED)


def random_head(trunk) -> MtpHead:
    torch.manual_seed(0)
    head = MtpHead(trunk.config)
    with torch.no_grad():
        for parameter in head.parameters():  # norms away from their start, everything exact in bf16
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.dim() == 1 else None
            parameter.copy_(parameter.bfloat16())
    return head


def test_adding_a_head_leaves_every_other_tensor_as_it_was_and_transformers_loads_the_rest(trunk, tmp_path):
    from transformers import Qwen3_5MoeForCausalLM

    directory, before = tmp_path / "model", load_file(SHIPPED / "model.safetensors")
    shutil.copytree(SHIPPED, directory)
    head = random_head(trunk)
    add_head(directory, head)
    after = load_file(directory / "model.safetensors")
    kept = {name for name in before if not name.startswith(PREFIX)}
    assert {name for name in after if not name.startswith(PREFIX)} == kept
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    assert len(after) - len(kept) == 19, "the published layout of a head with fused experts"
    again = load_head(directory).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in head.state_dict().items())
    assert json.loads((directory / "config.json").read_text())["mtp_num_hidden_layers"] == 1
    model, report = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, trunk.config.vocab_size, (1, 40))
    with torch.no_grad():
        assert (model(ids).logits - trunk(ids)).abs().max() < 1e-3


def test_a_chain_of_drafts_at_every_position_is_that_of_each_position_alone(trunk):
    """Draft d of the chain that begins at t, found with all others at once, is what a pass over the text up to there
    gives, the states before it being those of the chain."""
    head = random_head(trunk)
    ids = torch.randint(0, trunk.config.vocab_size, (1, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, *states = draft_states(trunk, head, ids, 3)
        following = trunk.model.embed_tokens(ids)[:, 1:]
        for start in (0, 5, 19):
            fed = hidden[:, : start + 1]
            for draft in range(3):
                end = start + draft + 1
                alone = head(following[:, :end], fed, 1)[0][:, -1:]
                assert (alone[0, 0] - states[draft][0, end - 1]).abs().max() < 1e-4
                fed = torch.cat([fed, alone], 1)


def test_a_few_steps_lower_the_loss_and_leave_the_trunk_alone(trunk, tokenizer):
    torch.manual_seed(0)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    head = MtpHead(trunk.config)
    head.start_from(trunk)
    optimizers = build_optimizers(head, lr=3e-3)
    data, losses = batch(TRAINING_SEEDS[:2], tokenizer, 256, padding=0), []
    for _ in range(4):
        loss = head_loss(trunk, head, data)
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_the_steps_of_a_turn_are_those_of_greedy_decoding():
    right, wrong = [True] * 3, [False] * 3
    turn = Turn("recall", 4, 12)
    assert list(steps_of(turn, [right] * 12)) == [(3, 3), (3, 3)], "8 tokens: one of the prompt's step, then 4 and 3"
    assert list(steps_of(turn, [wrong] * 12)) == [(3, 0)] * 5 + [(2, 0), (1, 0)]
    assert list(steps_of(turn, [[True, False, True]] * 12)) == [(3, 1), (3, 1), (3, 1), (1, 1)]
    assert list(steps_of(Turn("small talk", 4, 5), [right] * 12)) == []


def test_the_shipped_head_gives_more_than_two_tokens_a_step_on_held_out_conversations(trunk, tokenizer):
    head, counted = load_head(SHIPPED), Acceptance()
    for seed in HELD_OUT_SEEDS[:16]:
        count(trunk, head, example(seed, tokenizer, 512), counted)
    assert counted.turns > 16 and counted.tokens / counted.steps > 2
    one = example(HELD_OUT_SEEDS[0], tokenizer, 512).ids
    follows, drafts = right_drafts(trunk, head, one)
    assert len(follows) == len(one) - 1 and len(drafts) == len(one) - 2 and len(drafts[0]) == 3 and len(drafts[-1]) == 1
