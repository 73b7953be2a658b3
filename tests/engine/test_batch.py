"""Batches: padding rows of a decode step, rows that have nothing left to say, and copies to the device."""

import pytest
import torch
from checkpoints import CPU, Shape, load, oracle

from tests.kernels.launches import torch_served
from tests.ops.backends import make_backend
from tokenspeed import ops
from tokenspeed.engine.executor.batch import decode_batch, pack_rows, to_device
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Forwarded, Runner
from tokenspeed.engine.schedule.step import Begin, DecodeRow, NewPages, PrefillRow, Step

PROMPTS = ((5, 9, 11, 2), (7, 7, 3))


def prepared(directory, moe: bool, left: int = 9, drafts: int = 0) -> tuple[Runner, tuple[DecodeRow, ...]]:
    """A runner that has consumed two prompts, and the decode rows that come next."""
    oracle(Shape(moe=moe)).save_pretrained(directory)
    model = load(directory)
    runner = Runner(model, Memory(MemoryLayout(model.share, torch.float32), 4, 4, CPU), 4, 128, drafts)
    prefill = tuple(PrefillRow(tokens, 0, i, i, index=i + 1) for i, tokens in enumerate(PROMPTS))
    begins = tuple(Begin(i + 1, 0.0, 0, 1.0, 0.0, 0, prompt_tokens=len(t), left=left) for i, t in enumerate(PROMPTS))
    pages = tuple(NewPages(i + 1, 0, (i,)) for i in range(2))
    runner.forward(Step(prefill=prefill, begins=begins, pages=pages))
    runner.tables.length[1:3] = torch.tensor([len(tokens) for tokens in PROMPTS])
    runner.tables.ids[1:3, 0] = torch.tensor([17, 23])
    return runner, tuple(DecodeRow(i + 1, i, i) for i in range(2))


def padded(runner: Runner, rows, size: int):
    packed = to_device(pack_rows(rows, size, runner.tables.nobody), CPU)
    return decode_batch(packed, 1, runner.memory, runner.tables, runner._rotary)


@torch.inference_mode()
def test_padding_rows_change_no_logits_and_touch_no_memory(tmp_path):
    for moe in (False, True):
        runner, rows = prepared(tmp_path / str(moe), moe)
        alone, _ = prepared(tmp_path / str(moe), moe)
        expected = alone.forward(Step(decode=rows)).logits
        logits = runner.model(padded(runner, rows, 4)).logits
        torch.testing.assert_close(logits[:2], expected, rtol=0, atol=1e-5)
        for ours, theirs in ((runner.memory.kv, alone.memory.kv), (runner.memory.slots, alone.memory.slots)):
            difference = (ours.view(torch.float32) - theirs.view(torch.float32)).nan_to_num().abs()
            assert difference.max() < 1e-4, "padding rows must store nothing"


@torch.inference_mode()
def test_a_batch_of_padding_alone_changes_nothing(tmp_path):
    runner, _ = prepared(tmp_path, False)
    unchanged(runner, ())


@torch.inference_mode()
def test_rows_with_nothing_left_to_say_change_nothing(tmp_path):
    unchanged(*prepared(tmp_path, False, left=0))


def unchanged(runner: Runner, rows) -> None:
    kept = (runner.memory.kv, runner.memory.slots, runner.tables.pages, runner.tables.length, runner.tables.left)
    before = [x.clone() for x in kept]
    batch = padded(runner, rows, 3)
    runner.choose_plainly(runner._run(batch))
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("sequences", [1, 2])
@torch.inference_mode()
def test_kernels_serve_what_a_step_asks_around_the_model(tmp_path, monkeypatch, sequences, width):
    """What a kernel hands on to torch may read on the host, and then no step can be captured."""
    make_backend("emulated")
    runner, rows = prepared(tmp_path, False, drafts=3)
    for name in ("decode_rows", "sample", "accept_tokens"):
        monkeypatch.setattr(ops, name, getattr(torch.ops.tokenspeed_emulated, name))
    packed = to_device(pack_rows(rows[:sequences], sequences, runner.tables.nobody), CPU)

    def step():
        batch = decode_batch(packed, width, runner.memory, runner.tables, runner._rotary, 1)
        forwarded = Forwarded(batch, torch.randn(sequences * width, runner.model.config.vocab), batch.cos_sin)
        assert runner.choose_plainly(forwarded)[:, 0].min() >= 1

    assert torch_served(step) == []
