"""What a decode step costs in Python beside the model: its logits are canned, everything else is the engine's own."""

import gc
import time
from collections import Counter
from collections.abc import Callable

import torch

from tokenspeed.engine import sampling
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams

SEQUENCES, WARM_UP, STEPS = 64, 40, 200


class CannedModel:
    """Stands in for the network: the same logits whatever the batch."""

    def __init__(self, config):
        self.config = self.share = config
        self._logits = torch.randn(SEQUENCES, config.vocab, generator=torch.Generator().manual_seed(0))

    def __call__(self, batch) -> torch.Tensor:
        return self._logits[: len(batch.logit_rows)]


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
    """Microseconds of a decode step of 64 sequences, by phase. `operator` is the sampling operator's own work."""
    llm = LLM(progress=False, device="cpu", threads=1, max_num_seqs=SEQUENCES)
    engine, runner, phases = llm.engine, llm.engine.runner, Phases()
    runner.model = CannedModel(runner.model.config)
    operator, choose = sampling.ops.sample, runner.sampler.choose
    engine._accept = phases.within("text", engine._accept)
    engine.step = phases.within("rest", engine.step)
    engine.scheduler.plan = phases.within("plan", engine.scheduler.plan)
    engine.scheduler.reconcile = phases.within("reconcile", engine.scheduler.reconcile)
    runner.forward = phases.within("batch", runner.forward)
    runner.sampler.choose = phases.within("sampling", choose)
    sampling.ops.sample = phases.within("operator", operator)
    params = SamplingParams(temperature=1.0, top_p=0.9, ignore_eos=True, max_tokens=WARM_UP + STEPS + 20)
    try:
        for i in range(SEQUENCES):
            engine.submit(llm.frontend.request(str(i), [i, i + 1, i + 2], params), lambda update: None)
        for _ in range(WARM_UP):
            engine.step()
        phases.seconds.clear()
        gc.collect()
        for _ in range(STEPS):
            engine.step()
        return {name: 1e6 * seconds / STEPS for name, seconds in phases.seconds.items()}
    finally:
        sampling.ops.sample = operator


def report_overhead() -> None:
    figures = overhead()
    for name in ("plan", "batch", "sampling", "reconcile", "text", "rest"):
        print(f"{name:10} {figures[name]:8.1f} us a step")
    print(f"{'in all':10} {sum(figures.values()) - figures['operator']:8.1f} us a step of {SEQUENCES} sequences")
    print(f"{'operator':10} {figures['operator']:8.1f} us more in ops.sample, which a GPU runs beside the host")
