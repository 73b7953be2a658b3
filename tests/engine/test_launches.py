"""A decode step starts as many operators for one sequence as for many: the host's work must not grow with the batch."""

import re

import pytest
import torch
from checkpoints import CPU, Shape, load, oracle
from lab import Lab, shipped_model
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.model.layers import DenseFFN
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.schedule.step import Begin, DecodeRow, NewPages, PrefillRow, Sample, Step
from tokenspeed.engine.sizes import PUBLISHED
from tokenspeed.engine.text.grammar import regex

VIEWS = re.compile(r"aten\.(view|resolve_|alias|slice|select|expand|unsqueeze|squeeze|_unsafe_view|detach)")
SAMPLING = {"tokenspeed.sample.default", "aten.argmax.default"}


class Operators(TorchDispatchMode):
    """Names of the operators that are called, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def operators_of_a_decode_step(directory, batch: int, asked: dict) -> list[str]:
    model = load(directory)
    runner = Runner(model, Memory(MemoryLayout(model.config, torch.float32), batch, batch, CPU), batch, 64)
    begins = tuple(Begin(i, top_k=5, top_p=0.9, min_p=0.0, seed=i, **asked) for i in range(batch))
    prefill = tuple(PrefillRow((1 + i % 50, 2, 3), 0, i, i, i) for i in range(batch))
    samples = tuple(Sample(i, i) for i in range(batch))
    pages = tuple(NewPages(i, 0, (i,)) for i in range(batch))
    first = runner.launch(Step(prefill=prefill, begins=begins, samples=samples, pages=pages))
    first.sample()
    first.read()
    decode = tuple(DecodeRow(i, i, i) for i in range(batch))
    second = runner.launch(Step(decode=decode, samples=tuple(Sample(i, i, logprobs=2) for i in range(batch))))
    second.sample()
    with Operators() as operators:
        assert len(second.read().ids) == batch
    return operators.names


def first_apart(names: list[str]) -> list[str]:
    """The names as of more than eight rows: up to eight, the first norm reads a slice of zeros and is one operator with
    its product."""
    place = names.index("tokenspeed.add_rms_norm_linear.default")
    if names[place - 1] != "aten.slice.Tensor":
        return names
    apart = ["tokenspeed.rms_norm.default", "tokenspeed.linear.default"]
    return [*names[: place - 1], *apart, *names[place + 1 :]]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "presence_penalty": 0.5, "prompt": (1, 2), "bias": ((3, 1.0),)},
    ],
    ids=["greedy", "sampled", "penalised"],
)
def test_a_decode_step_calls_as_many_operators_for_one_sequence_as_for_many(moe, asked, tmp_path):
    oracle(Shape(moe=moe)).save_pretrained(tmp_path)
    # From two to eight rows a dense feed-forward is one operator, else two; experts are one up to eight rows on a GPU,
    # always on a CPU.
    steps = (operators_of_a_decode_step(tmp_path, batch, asked) for batch in (1, 2, 8, 9, 64))
    one, two, eight, nine, many = (first_apart(names) for names in steps)
    assert eight == two
    assert many == nine
    assert (many == two) == moe
    assert set(many) & SAMPLING, "the step ends with a choice"
    # A write through an index of one element takes torch another view, which is no work of the device.
    views = ("aten.view.default", "aten.resolve_conj.default", "aten.resolve_neg.default")
    alike = two if moe else many
    assert [name for name in alike if name not in views] == [name for name in one if name not in views]


def test_a_choice_within_a_format_calls_as_many_operators_for_one_sequence_as_for_many():
    found = []
    for sequences in (1, 2, 5):
        lab, counts = Lab(shipped_model(), max_seqs=5, drafts=3), set()
        lab.engine.eos_ids = frozenset([0])
        choose = lab.runner.choose

        def counted(step, *rest, choose=choose, counts=counts):
            with Operators() as operators:
                result = choose(step, *rest)
            if not step.prefill:
                counts.add((step.width, len([name for name in operators.names if not VIEWS.match(name)])))
            return result

        lab.runner.choose = counted
        for _ in range(sequences):
            lab.submit([5, 6, 7], [], grammar=regex("[0-9 ]{20,}"), temperature=0.0, max_tokens=9)
        lab.run()
        found.append(counts)
    assert found[0] == found[1] == found[2] and {width for width, _ in found[0]} == {4}


@pytest.mark.parametrize(("size", "in_one"), [("0.8B", True), ("2B", True), ("9B", False), ("27B", False)])
def test_a_feed_forward_is_one_operator_where_its_weights_are_few(size, in_one):
    model = Qwen3_5.empty(PUBLISHED[size], torch.bfloat16, torch.device("meta"))
    stages = [stage for stage in model.program if isinstance(stage, DenseFFN)]
    assert len(stages) == len(PUBLISHED[size].layer_types)
    assert {stage.in_one for stage in stages} == {in_one}
    assert all(stage.scratch is stages[0].scratch for stage in stages)
