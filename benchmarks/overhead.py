"""What a decode step costs the host: the engine's own Python, with the network and the choice of ids canned.

As on a GPU, where decode steps replay graphs: the input of one is filled, no tensor of a batch is built, and what the
sampling operator does is not the host's work.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable

import torch

from tokenspeed.engine.executor.batch import Forwarded, pack_rows, to_device
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.model.mtp import Output
from tokenspeed.engine.request import SamplingParams

SEQUENCES, WARM_UP, STEPS = 64, 40, 200


class CannedModel:
    """Stands in for the network: the same logits whatever the batch."""

    def __init__(self, config):
        self.config = self.share = config
        self._logits = torch.randn(SEQUENCES, config.vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch) -> Output:
        return Output(self._logits[: len(batch.tokens if batch.logit_rows is None else batch.logit_rows)], None)


class CannedGraphs:
    """Stands in for captured decode graphs: fills the input of one where it changes, and has the model's logits and
    ids."""

    def __init__(self, model: CannedModel):
        self._logits, self._rows = model._logits, ()
        self._packed = torch.empty(3, SEQUENCES, dtype=torch.int32)
        self._news = torch.stack([torch.ones(SEQUENCES, dtype=torch.int64), torch.arange(SEQUENCES)], 1)

    def forward(self, step) -> Forwarded:
        if step.decode != self._rows:
            self._packed.copy_(to_device(pack_rows(step.decode, SEQUENCES, SEQUENCES), self._packed.device))
            self._rows = step.decode
        return Forwarded(None, self._logits[: step.tokens], None)

    def choose(self, step, greedy) -> torch.Tensor:
        return self._news[: len(step.decode)]


class Phases:
    """CPU seconds of this thread in each phase, without the phases inside it: what others run does not count."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def within(self, name: str, call: Callable) -> Callable:
        def timed(*arguments, **named):
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                took = time.thread_time() - start
                self.seconds[name] += took - self._inner.pop()
                self._inner[-1] += took

        return timed


def overhead() -> dict[str, float]:
    """Microseconds of a decode step of 64 sequences, by phase."""
    llm = LLM(progress=False, device="cpu", threads=1, max_num_seqs=SEQUENCES, draft_tokens=0)
    engine, runner, phases = llm.engine, llm.engine.runner, Phases()
    runner.model = CannedModel(runner.model.config)
    runner.graphs = CannedGraphs(runner.model)
    engine.step = phases.within("rest", engine.step)
    engine.scheduler.plan = phases.within("plan", engine.scheduler.plan)
    engine.scheduler.reconcile = phases.within("reconcile", engine.scheduler.reconcile)
    runner.forward = phases.within("batch", runner.forward)
    runner.choose = phases.within("sampling", runner.choose)
    params = SamplingParams(temperature=1.0, top_p=0.9, ignore_eos=True, max_tokens=WARM_UP + STEPS + 20)
    for i in range(SEQUENCES):
        engine.submit(llm.frontend.request(str(i), [i, i + 1, i + 2], params), lambda update: None)
    for _ in range(WARM_UP):
        engine.step()
    phases.seconds.clear()
    gc.collect()
    for _ in range(STEPS):
        engine.step()
    return {name: 1e6 * seconds / STEPS for name, seconds in phases.seconds.items()}


def report_overhead() -> None:
    figures = overhead()
    for name in ("plan", "batch", "sampling", "reconcile", "rest"):
        print(f"{name:10} {figures[name]:8.1f} us a step")
    print(f"{'in all':10} {sum(figures.values()):8.1f} us a step of {SEQUENCES} sequences")
