"""An engine with FP8 weights and pages: equal to its simulation, as accurate as before, replayable."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import CPU
from fp8_checkpoints import load, release, wide
from tokenizers import Tokenizer

from examples.tiny_agent import evaluate
from examples.tiny_agent.data import HELD_OUT_SEEDS
from examples.tiny_agent.dataset import example
from tests.driving import Move, logits_of
from tokenspeed import ops
from tokenspeed.engine.__main__ import main
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import PAGE_TOKENS
from tokenspeed.engine.debug.step_log import StepLog, read_log, replay
from tokenspeed.engine.errors import ConfigError
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.sizes import PUBLISHED, RELEASES, published
from tokenspeed.ops.fp8 import FP8

EVALUATION = Path(evaluate.__file__).parent / "evaluation.json"


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_pages_in_fp8_give_the_logits_of_pages_whose_numbers_are_rounded_to_fp8(moe, tmp_path, monkeypatch):
    made = release(tmp_path, moe, **wide(moe))
    model, prologue = load(made.directory), ops.attention_prologue
    logits, unrounded = made.run(model, kv_dtype=FP8), made.run(model)

    def simulated(*args):
        q, kv = prologue(*args), args[4]
        kv.copy_(kv.clamp(-448, 448).to(FP8).float())
        return q

    monkeypatch.setattr(ops, "attention_prologue", simulated)
    assert torch.equal(logits, made.run(model))
    assert not torch.equal(logits, unrounded)


class Engine:
    """The shipped model as `score_turns` calls one: logits of a whole conversation."""

    def __init__(self):
        model = load(SHIPPED, "fp8")
        pages = 2048 // PAGE_TOKENS
        layout = MemoryLayout(model.config, torch.float32, kv_dtype=FP8)
        self._runner, self._pages = Runner(model, Memory(layout, pages, 1, CPU)), tuple(range(pages))

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        tokens = tuple(ids[0].tolist())
        move = Move(tokens, 0, self._pages, 0, 0, logits=len(tokens))
        return SimpleNamespace(logits=logits_of(self._runner, prefill=(move,))[None])


def exact_turns(conversations: int, length: int) -> list[bool]:
    """Of held-out conversations, which turns the model with FP8 weights and pages would write exactly right."""
    tokenizer, engine = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")), Engine()
    seeds = HELD_OUT_SEEDS[:conversations]
    return [right for seed in seeds for _, right in evaluate.score_turns(engine, example(seed, tokenizer, length))]


def test_the_shipped_model_in_fp8_is_as_accurate_within_a_point():
    """On the first of the conversations that its own evaluation, in fp32, scores."""
    whole, right = json.loads(EVALUATION.read_text())["lengths"]["512"]["exact_share"], exact_turns(30, 512)
    assert len(right) > 40
    assert sum(right) / len(right) >= whole - 0.01


def test_a_log_of_an_engine_in_fp8_replays_bit_for_bit(tmp_path):
    settings = {"quantization": "fp8", "kv_cache_dtype": "fp8", "validate": True, "threads": 1}
    llm = LLM(progress=False, max_num_seqs=3, max_num_batched_tokens=64, kv_pages=9, state_slots=6, **settings)
    log = StepLog(tmp_path / "steps.jsonl", llm.engine, "tiny_agent")
    params = SamplingParams(n=2, max_tokens=20, temperature=1.0, ignore_eos=True)
    prompts = [list(range(5, 5 + n)) for n in (100, 60)]
    first = llm.generate(prompts, params, progress=False)
    log.close()
    header = next(read_log(tmp_path / "steps.jsonl"))[1]
    assert (header.dtype, header.kv_dtype) == ("float32", "fp8") and "mlp.experts.down_proj" in header.fp8
    assert replay(tmp_path / "steps.jsonl", SHIPPED).difference is None
    again = LLM(progress=False, enable_prefix_caching=False, **settings).generate(prompts, params, progress=False)
    texts = [[output.token_ids for output in result.outputs] for result in (*first, *again)]
    assert texts[:2] == texts[2:], "what is cached in FP8 is what was computed with it"


def test_info_plans_weights_and_pages_in_fp8(capsys):
    def report(*options: str) -> str:
        assert main(["info", "--size", "Qwen3.6-27B", "--dtype", "bfloat16", "--memory-gib", "80", *options]) == 0
        return capsys.readouterr().out

    plain, eight = report(), report("--quantization", "fp8", "--kv-cache-dtype", "fp8", "--program")
    # 24.33 G of 26.90 G parameters at one byte and 4 / 16384 of scale, the others at two.
    assert "26.896 G parameters, 50.10 GiB in bfloat16" in plain and "KV per token       64.00 KiB\n" in plain
    assert "27.45 GiB (24.327 G in FP8 blocks, the rest in bfloat16)" in eight
    assert "KV per token       32.00 KiB in FP8" in eight
    # Two in each mixer and feed-forward, of either kind of layer and of the MTP head, and the head that drafts.
    assert eight.count("fp8_block128") == 2 * 4 + 4 + 1
    assert main(["info", "--quantization", "fp8"]) == 0
    assert "G in FP8 blocks" in capsys.readouterr().out


def test_later_releases_are_known_by_name():
    for name, size in RELEASES.items():
        assert published(name) == PUBLISHED[size]
    with pytest.raises(ConfigError, match=r"'Qwen4-1B'.*27B.*Qwen3\.8-27B"):
        published("Qwen4-1B")


def test_a_rank_whose_part_would_cut_a_block_names_the_dimension(capsys):
    assert main(["info", "--size", "0.8B", "--quantization", "fp8", "--tp", "4"]) == 0
    capsys.readouterr()
    for size, options, expected in (
        ("0.8B", ("--tp", "8"), ("intermediate_size 3584", "448", "'tp'", "128")),
        ("35B-A3B", ("--tp", "8"), ("shared_expert_intermediate_size 512", "64", "'world'")),
        ("35B-A3B", ("--tp", "8", "--ep", "8"), ("shared_expert_intermediate_size 512", "64")),
    ):
        assert main(["info", "--size", size, "--quantization", "fp8", *options]) == 1
        error = capsys.readouterr().err
        assert all(word in error for word in (*expected, "--quantization none")), error
        assert main(["info", "--size", size, *options]) == 0
        capsys.readouterr()
