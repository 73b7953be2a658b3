"""Accuracy of the exported model, computed by `transformers` on conversations no training seed could give."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.tiny_agent.data import HELD_OUT_SEEDS
from examples.tiny_agent.dataset import Example, example

CONVERSATIONS = {512: 400, 2048: 150}  # tokens a conversation fills -> how many are scored
ALL = "all turns"


@dataclass(slots=True)
class Score:
    """Exactly right assistant turns among all."""

    exact: int = 0
    turns: int = 0


@torch.no_grad()
def score_turns(model: torch.nn.Module, scored: Example) -> list[tuple[str, bool]]:
    """(kind, exact) of each turn of the last exchange.

    The conversation is cut at its last query and rendered as at inference. A turn is exact when each of its tokens, up
    to and with the end of turn, is the argmax given the true ones before it, which is when greedy decoding gives it.
    """
    ids = torch.tensor([scored.ids])
    correct = (model(ids, use_cache=False).logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
    return [(turn.kind, all(correct[turn.start - 1 : turn.stop - 1])) for turn in scored.turns]


def evaluate(directory: Path) -> dict[int, dict[str, Score]]:
    """Scores by conversation length and kind of turn; weights are the exported bf16 ones, arithmetic is fp32."""
    from transformers import Qwen3_5MoeForCausalLM  # takes seconds to import, and only this step needs it

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = Qwen3_5MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    results = {}
    for length, count in CONVERSATIONS.items():
        scores: dict[str, Score] = defaultdict(Score)
        for seed in tqdm(HELD_OUT_SEEDS[:count], desc=f"{length} tokens", unit="conversation", mininterval=2):
            for kind, exact in score_turns(model, example(seed, tokenizer, length)):
                scores[kind].exact += exact
                scores[kind].turns += 1
        results[length] = dict(sorted(scores.items()))
    return results


def to_json(results: dict[int, dict[str, Score]]) -> dict:
    """Content of evaluation.json: what was scored, and [exact, turns] by length and kind of turn."""
    lengths = {}
    for length, scores in results.items():
        exact, turns = sum(score.exact for score in scores.values()), sum(score.turns for score in scores.values())
        lengths[str(length)] = {
            "conversations": CONVERSATIONS[length],
            "exact_share": round(exact / turns, 4),
            "kinds": {kind: [score.exact, score.turns] for kind, score in scores.items()} | {ALL: [exact, turns]},
        }
    return {"first_seed": HELD_OUT_SEEDS.start, "lengths": lengths}


def table(evaluation: dict) -> str:
    """evaluation.json as a Markdown table: kinds of turn down, conversation lengths across."""
    lengths = {length: result["kinds"] for length, result in evaluation["lengths"].items()}
    rows = [["held-out turns exact", *(f"{length} tokens" for length in lengths)], ["---"] * (1 + len(lengths))]
    for kind in sorted({kind for kinds in lengths.values() for kind in kinds}, key=lambda kind: (kind == ALL, kind)):
        counts = (kinds.get(kind) for kinds in lengths.values())
        rows.append(
            [kind, *(f"{count[0] / count[1]:.1%} ({count[0]}/{count[1]})" if count else "-" for count in counts)]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
