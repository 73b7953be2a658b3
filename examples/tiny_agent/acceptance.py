"""How many tokens a step the MTP head is worth: its drafts against what the model says, on held-out conversations."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.tiny_agent.data import HELD_OUT_SEEDS
from examples.tiny_agent.dataset import Example, Turn, example
from examples.tiny_agent.model import TinyAgent
from examples.tiny_agent.mtp import MtpHead
from examples.tiny_agent.train_mtp import DRAFTS, HeadTraining, draft_states, load_head, load_trunk

CONVERSATIONS = {512: 200, 2048: 40}  # tokens a conversation fills -> how many are counted


@dataclass(slots=True)
class Acceptance:
    """Steps of greedy decoding with drafts, each verifying up to DRAFTS of them; tokens: what the steps gave.

    accepted, offered: by draft, the steps in which it was accepted, and in which the turn was long enough for it.
    """

    turns: int = 0
    steps: int = 0
    tokens: int = 0
    accepted: list[int] = field(default_factory=lambda: [0] * DRAFTS)
    offered: list[int] = field(default_factory=lambda: [0] * DRAFTS)


@torch.no_grad()
def right_drafts(trunk: TinyAgent, head: MtpHead, ids: list[int]) -> tuple[list[bool], list[list[bool]]]:
    """Whether the trunk's own choice after each position is the text's next token; and by position, how the drafts of a
    chain that begins there compare with the tokens from the one after the next on, as far as the text goes."""
    text = torch.tensor(ids)
    hidden, *states = draft_states(trunk, head, text[None], DRAFTS)
    follows = (trunk.lm_head(hidden[0, :-1]).argmax(-1) == text[1:]).tolist()
    by_draft = [
        (trunk.lm_head(state[0, before:-1]).argmax(-1) == text[before + 2 :]).tolist()
        for before, state in enumerate(states)
    ]
    return follows, [[right[t] for right in by_draft if t < len(right)] for t in range(len(ids) - 2)]


def steps_of(turn: Turn, drafts: list[list[bool]]) -> Iterator[tuple[int, int]]:
    """(offered, accepted) drafts of each step that greedy decoding takes for a turn, behind the prompt's own token."""
    at = turn.start  # the last token that is there
    while at < turn.stop - 1:
        offered = drafts[at - 1][: turn.stop - 1 - at]
        accepted = next((i for i, right in enumerate(offered) if not right), len(offered))
        yield len(offered), accepted
        at += accepted + 1


def count(trunk: TinyAgent, head: MtpHead, scored: Example, into: Acceptance) -> None:
    """Adds the turns of a conversation's last exchange that the trunk says as they stand."""
    follows, drafts = right_drafts(trunk, head, scored.ids)
    for turn in scored.turns:
        if not all(follows[turn.start - 1 : turn.stop - 1]):
            continue
        into.turns += 1
        into.tokens += turn.stop - 1 - turn.start
        for offered, accepted in steps_of(turn, drafts):
            into.steps += 1
            for draft in range(offered):
                into.offered[draft] += 1
                into.accepted[draft] += draft < accepted


def measure_acceptance(directory: Path) -> dict[int, Acceptance]:
    """By conversation length; weights are those of the model directory, arithmetic is fp32."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    trunk, head = load_trunk(directory), load_head(directory)
    results = {}
    for length, conversations in CONVERSATIONS.items():
        results[length] = Acceptance()
        for seed in tqdm(HELD_OUT_SEEDS[:conversations], desc=f"drafts, {length} tokens", mininterval=2):
            count(trunk, head, example(seed, tokenizer, length), results[length])
    return results


def to_json(results: dict[int, Acceptance], training: HeadTraining) -> dict:
    """The part of evaluation.json about the head."""
    lengths = {
        str(length): asdict(result) | {"tokens_a_step": round(result.tokens / result.steps, 2)}
        for length, result in results.items()
    }
    return {"drafts": DRAFTS, "training": asdict(training), "lengths": lengths}


def table(acceptance: dict) -> str:
    """The same as a Markdown table: drafts down, conversation lengths across."""
    lengths = acceptance["lengths"]
    rows = [["drafts accepted", *(f"{length} tokens" for length in lengths)], ["---"] * (1 + len(lengths))]
    for draft in range(acceptance["drafts"]):
        counts = [(one["accepted"][draft], one["offered"][draft]) for one in lengths.values()]
        rows.append([f"draft {draft + 1}", *(f"{part / whole:.1%} ({part}/{whole})" for part, whole in counts)])
    rows.append(["tokens a step", *(f"{one['tokens_a_step']:.2f}" for one in lengths.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
