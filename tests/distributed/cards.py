"""The engine on one GPU or several, as a process of its own: `python -m tests.distributed.cards JSON`.

Prints one line of JSON: of each sequence the ids and their log-probabilities, and what ran.
"""

import json
import sys

from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams


def run(model: str | None, settings: dict, prompts: list[list[int]], params: dict, known: list[list[int]]) -> dict:
    """known: ids that were said behind the prompts elsewhere, to be scored here; empty to say some."""
    llm = LLM(model, progress=False, **settings)
    runner = llm.engine.runner
    result = {
        "communicator": runner.model.communicator.describe(),
        "graphs": runner.graphs is not None,
        "drafts": runner._drafter is not None,
    }
    if known:
        texts = [prompt + ids for prompt, ids in zip(prompts, known, strict=True)]
        outputs = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=1), progress=False)
        scored = [o.prompt_logprobs[len(p) :] for o, p in zip(outputs, prompts, strict=True)]
        pairs = [list(zip(ids, entries, strict=True)) for ids, entries in zip(known, scored, strict=True)]
        result["scores"] = [[entries[id].logprob for id, entries in row] for row in pairs]
        result["largest"] = [[max(e.logprob for e in entries.values()) for _, entries in row] for row in pairs]
    else:
        outputs = llm.generate(prompts, SamplingParams(ignore_eos=True, logprobs=0, **params), progress=False)
        said = [output.outputs[0] for output in outputs]
        result["ids"] = [continuation.token_ids for continuation in said]
        result["scores"] = [
            [entry[id].logprob for id, entry in zip(c.token_ids, c.logprobs, strict=True)] for c in said
        ]
        plain = llm.generate(prompts, SamplingParams(ignore_eos=True, **params), progress=False)
        result["plain"] = [output.outputs[0].token_ids for output in plain]  # by graphs alone, where they are
        result["stats"] = {name: value for name, value in llm.engine.stats().items() if "draft" in name}
    return result


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
