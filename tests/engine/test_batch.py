"""Batches: padding rows of a decode step, and copies to the device."""

import torch
from checkpoints import CPU, Shape, load, oracle

from tokenspeed.engine.batch import decode_batch, pack_rows, to_device
from tokenspeed.engine.memory import Memory, MemoryLayout
from tokenspeed.engine.runner import Runner
from tokenspeed.engine.step import Row, Step

PROMPTS = ((5, 9, 11, 2), (7, 7, 3))


def prepared(directory, moe: bool) -> tuple[Runner, tuple[Row, ...]]:
    """A runner that has consumed two prompts, and the decode rows that come next."""
    oracle(Shape(moe=moe)).save_pretrained(directory)
    model = load(directory)
    runner = Runner(model, Memory(MemoryLayout(model.config, torch.float32), 4, 4, CPU), max_seqs=4, max_tokens=128)
    prefill = [Row(tokens, 0, (i,), i, i, index=i + 1) for i, tokens in enumerate(PROMPTS)]
    runner.forward(Step(prefill=tuple(prefill)))
    runner.tables.last_ids[1:3] = torch.tensor([17, 23])
    return runner, tuple(Row((), len(tokens), (), i, i, index=i + 1) for i, tokens in enumerate(PROMPTS))


@torch.inference_mode()
def test_padding_rows_change_no_logits_and_touch_no_memory(tmp_path):
    for moe in (False, True):
        runner, rows = prepared(tmp_path / str(moe), moe)
        alone, _ = prepared(tmp_path / str(moe), moe)
        expected = alone.forward(Step(decode=rows))
        packed = to_device(pack_rows(rows, 4), CPU)
        logits = runner.model(decode_batch(packed, runner.memory, runner.tables, *runner._rotary)).logits
        torch.testing.assert_close(logits[:2], expected, rtol=0, atol=1e-5)
        for ours, theirs in ((runner.memory.kv, alone.memory.kv), (runner.memory.slots, alone.memory.slots)):
            difference = (ours.view(torch.float32) - theirs.view(torch.float32)).nan_to_num().abs()
            assert difference.max() < 1e-4, "padding rows must store nothing"


@torch.inference_mode()
def test_a_batch_of_padding_alone_changes_nothing(tmp_path):
    runner, _ = prepared(tmp_path, False)
    before = runner.memory.kv.clone(), runner.memory.slots.clone(), runner.tables.pages.clone()
    runner.model(decode_batch(to_device(pack_rows((), 3), CPU), runner.memory, runner.tables, *runner._rotary))
    after = runner.memory.kv, runner.memory.slots, runner.tables.pages
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_row_may_name_its_token_or_take_the_one_sampled_last(tmp_path):
    runner, rows = prepared(tmp_path, False)
    again, _ = prepared(tmp_path, False)
    named = tuple(row._replace(tokens=(id,)) for row, id in zip(rows, (17, 23), strict=True))
    assert torch.equal(runner.forward(Step(decode=rows)), again.forward(Step(decode=named)))
