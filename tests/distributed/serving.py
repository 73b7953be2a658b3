"""A run of the whole engine over some ranks, as a process of its own: `python -m tests.distributed.serving JSON`.

Prints one line of JSON: every request's ids and log-probabilities, and what the scheduler and the cache went through.
"""

import json
import sys

from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams

PROMPTS = [[(7 * i + 13 * j) % 290 for j in range(length)] for i, length in enumerate((5, 70, 131, 64, 90, 33))]
SHARED = [(3 * j) % 290 for j in range(100)]  # of some prompts
PARAMS = [
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1.1, "seed": 5, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.8, "seed": 6, "n": 3, "min_p": 0.02, "logit_bias": {7: 4.0, 200: -3.0}},
    {"temperature": 0, "allowed_token_ids": [3, 80, 160, 240, 299], "logprobs": 4, "prompt_logprobs": 1},
]


def run(model: str | None, settings: dict) -> dict:
    """Two rounds of mixed requests, so that the second finds prefixes; one request is aborted on the way."""
    llm = LLM(model, progress=False, threads=1, validate=True, **settings)
    requests = [
        (
            SHARED + prompt if i % 2 else prompt,
            SamplingParams(max_tokens=24, ignore_eos=True, **PARAMS[i % len(PARAMS)]),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    results = []
    for _ in range(2):
        for _, update in llm.stream([PROMPTS[2]], requests[0][1]):
            if update.ids:
                break  # leaving aborts it
        for output in llm.generate(*zip(*requests, strict=True), progress=False):
            for continuation in output.outputs:
                scores = [round(entry[id].logprob, 3) for id, entry in _pairs(continuation)]
                results.append({"ids": continuation.token_ids, "scores": scores})
    stats = llm.engine.stats()
    events = {
        name: stats[name] for name in ("preemptions", "forks", "cached_tokens", "aborted", "moved_in", "moved_out")
    }
    return {"results": results, "events": events, "memory": llm.engine.cache.check()}


def _pairs(continuation):
    return zip(continuation.token_ids, continuation.logprobs or (), strict=continuation.logprobs is not None)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(run(job["model"], job["settings"])))
