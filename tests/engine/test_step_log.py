"""Step logs: the same steps give the same bits, any other bit is noticed, and what is no log is named by its line."""

import json
import math

import msgspec
import pytest
import torch

from tokenspeed.engine.__main__ import main
from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.debug.step_log import Record, StepLog, hash_logits, read_log, replay
from tokenspeed.engine.errors import LogError
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.schedule.step import Begin, DecodeRow, Edit, NewPages, PrefillRow, Sample, Step
from tokenspeed.ops.fp8 import quantise_blocks


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Of a run in which little memory makes sequences give way to each other."""
    path = tmp_path_factory.mktemp("log") / "steps.jsonl"
    llm = LLM(
        progress=False, threads=1, max_num_seqs=6, max_num_batched_tokens=64, kv_pages=6, state_slots=8, validate=True
    )
    written = StepLog(path, llm.engine, "tiny_agent")
    common = {"max_tokens": 24, "ignore_eos": True, "temperature": 1.1}
    params = [
        SamplingParams(n=3, **common),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, bad_words=["a", "the code"], **common),
        SamplingParams(prompt_logprobs=2, logprobs=3, logit_bias={7: 2.0}, min_tokens=10, **common),
        SamplingParams(**common),
    ]
    llm.generate([list(range(5, 5 + n)) for n in (100, 60, 40, 120)], params, progress=False)
    written.close()
    assert llm.engine.scheduler.preemptions > 0
    return path


def rewritten(log, path, number, change):
    """A copy of the log in `path` whose line `number`, from 1, went through `change`."""
    lines = log.read_text().splitlines()
    line = json.loads(lines[number - 1])
    change(line)
    path.write_text("\n".join([*lines[: number - 1], json.dumps(line), *lines[number:]]) + "\n")
    return path


def test_a_mixed_schedule_replays_bit_for_bit(log):
    records = [record for number, record in read_log(log) if number > 1]
    assert any(record.step.decode and record.step.prefill for record in records)
    assert any(record.step.copies for record in records), "forks within a page copy it"
    assert any(record.edits for record in records)
    assert any(begin.penalised for record in records for begin in record.step.begins)
    assert any(bias == -math.inf for record in records for begin in record.step.begins for _, bias in begin.bias)
    replayed = replay(log, SHIPPED)
    assert replayed.difference is None
    assert replayed.steps == len(records)
    assert replayed.tokens == sum(record.step.tokens for record in records)


def test_drafts_of_a_head_in_fp8_are_drafted_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenspeed.engine.executor.loading.drafts_in_fp8", lambda dtype, kernel: True)
    # A copy that drafts other ids than the head itself, so that a replay without it has other rows.
    coarse = "tokenspeed.engine.model.mtp.quantise_blocks"
    monkeypatch.setattr(coarse, lambda rows: quantise_blocks(rows + rows.roll(1, 0)))
    llm = LLM(progress=False, threads=1, draft_tokens=3)
    written = StepLog(tmp_path / "log", llm.engine, "tiny_agent")
    params = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    llm.generate([list(range(5, 45))], params, progress=False)
    written.close()
    (_, header), *_ = read_log(tmp_path / "log")
    assert header.drafts_in_fp8 and replay(tmp_path / "log", SHIPPED).difference is None


def test_a_stored_head_is_replayed_whatever_the_configuration_says(log, tmp_path):
    for file in SHIPPED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    raw = msgspec.json.decode((SHIPPED / "config.json").read_bytes())
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(raw | {"tie_word_embeddings": True}))
    assert replay(log, tmp_path).difference is None


def test_a_hash_that_was_changed_is_noticed_at_its_step(log, tmp_path, capsys):
    path = rewritten(log, tmp_path / "log", 4, lambda line: line.update(logits="0" * 64))
    assert main(["bench", "replay", str(path), "--quiet"]) == 1
    assert "step 3 differs" in capsys.readouterr().err


def test_another_token_is_noticed_in_the_first_logits_that_see_it(log, tmp_path):
    def change(line):
        line["step"]["prefill"][0][0][5] += 1

    replayed = replay(rewritten(log, tmp_path / "log", 2, change), SHIPPED)
    first = next(n - 1 for n, record in read_log(log) if n > 1 and any(row.logits for row in record.step.prefill))
    assert replayed.difference.step == first


def test_another_seed_is_noticed_after_the_id_it_chose(log, tmp_path):
    def change(line):
        line["step"]["begins"][0][Begin._fields.index("seed")] += 1

    assert replay(rewritten(log, tmp_path / "log", 2, change), SHIPPED).difference is not None


def test_every_field_of_a_step_survives_the_log(tmp_path, log):
    begin = Begin(
        3, 0.5, 7, 0.9, 0.1, 2**63 - 1, 1.5, -1.5, 1.25, 4, (5,), ((6, -math.inf), (7, 1.5)), (8,), (9,), (1, 2)
    )
    begin = begin._replace(prompt_tokens=5, left=6, stops=(7,), history=(8, 9))
    row = PrefillRow((1, 2, 3), 64, 1, 2, 3, 66, ((65, 4), (67, 5)), 3, (6, 7), 2)
    decode, pages, samples = DecodeRow(9, 0, 1), NewPages(3, 1, (4, 5)), Sample(1, 3, 2, True)
    step = Step((decode,), 4, (row,), (begin,), ((1, 2, 33),), (pages,), (samples,), 3)
    record = Record(step, (Edit(0, b"\x00\x01\xfe\xff", (3, 4)),), "ab" * 32)
    path = tmp_path / "log"
    path.write_bytes(log.read_bytes().splitlines()[0] + b"\n" + msgspec.json.encode(record) + b"\n")
    assert [line for _, line in read_log(path)][1] == record


def test_the_hash_is_of_the_bits_whatever_the_type_and_the_strides():
    x = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    assert hash_logits(x.T) == hash_logits(x.T.contiguous()) != hash_logits(x)
    assert hash_logits(torch.tensor([0.0])) != hash_logits(torch.tensor([-0.0]))


PLACED = '{"pages": [%s], "prefill": [[[9], 0, 0, %d, 5]]}'  # one row of index 5


@pytest.mark.parametrize(
    ("number", "line", "expected"),
    [
        (1, "", ["line 1"]),
        (1, "{}", ["line 1", "model"]),
        (1, '{"kind": "other"}', ["line 1"]),
        (1, '{"version": 2, "package": "0.1"}', ["line 1", "format 2", "tokenspeed 0.1", "reads format 3"]),
        (1, "\x00\xff", ["line 1"]),
        (2, "[" * 100_000, ["line 2"]),
        (2, '{"step": {}, "edits": []', ["line 2"]),
        (2, '{"step": {}, "edits": [], "logits": "", "more": 1}', ["line 2", "more"]),
        (2, '{"step": {"decode": [[[], 0]]}, "edits": [], "logits": ""}', ["line 2", "decode"]),
        (3, '{"step": {"begins": [[0, 1, 0, 1, 0, "seed"]]}, "edits": [], "logits": ""}', ["line 3", "begins"]),
        (3, '{"step": {}, "edits": [], "logits": ""}', ["line 3", "no rows"]),
        (3, '{"step": {}, "edits": [[0, "", []]], "logits": ""}', ["line 3", "sample 0"]),
        (3, '{"step": {"samples": [[0, 0]]}, "edits": [[0, "", [], 1]], "logits": ""}', ["line 3", "place 1"]),
        (3, '{"step": {"decode": [[6, 0, 0]]}, "edits": [], "logits": ""}', ["line 3", "index 6"]),
        (3, '{"step": {"prefill": [[[999], 0, 0, 0]]}, "edits": [], "logits": ""}', ["line 3", "999", "640"]),
        (3, '{"step": {"prefill": [[[9], 9999, 0, 0]]}, "edits": [], "logits": ""}', ["line 3", "10000"]),
        (
            3,
            '{"step": {"decode": [[5, 0, 0]], "width": 9}, "edits": [], "logits": ""}',
            ["width 9", "3 drafts"],
        ),
        (3, f'{{"step": {PLACED % ("[5, 99, [0]]", 0)}, "edits": [], "logits": ""}}', ["line 3", "pages 99 to 100"]),
        (3, f'{{"step": {PLACED % ("[5, 0, [77]]", 0)}, "edits": [], "logits": ""}}', ["line 3", "out of range"]),
        (3, f'{{"step": {PLACED % ("[5, 0, [0]]", 9)}, "edits": [], "logits": ""}}', ["line 3", "out of range"]),
    ],
)
def test_what_is_no_log_is_refused_with_the_line(log, tmp_path, number, line, expected):
    lines = log.read_text().splitlines()
    path = tmp_path / "log"
    path.write_text("\n".join([*lines[: number - 1], line, *lines[number:]]) + "\n", encoding="latin-1")
    with pytest.raises(LogError) as error:
        replay(path, SHIPPED)
    for word in expected:
        assert word in str(error.value)


def test_files_that_are_empty_or_missing_or_of_another_model_are_refused(log, tmp_path):
    path = tmp_path / "log"
    for prepare, expected in (
        (lambda: None, "cannot be read"),
        (lambda: path.write_text(""), "empty"),
        (lambda: rewritten(log, path, 1, lambda header: header.update(vocabulary=5)), "5 ids"),
    ):
        prepare()
        with pytest.raises(LogError, match=expected):
            replay(path, SHIPPED)
    with pytest.raises(LogError, match="cannot be written"):
        StepLog(tmp_path, LLM(progress=False, max_num_seqs=1).engine, "x")


def test_an_engine_with_host_memory_is_not_logged(tmp_path):
    llm = LLM(progress=False, threads=1, max_num_seqs=2, kv_pages=6, state_slots=4, host_memory=0.05)
    with pytest.raises(LogError, match="leave out --host-memory"):
        StepLog(tmp_path / "steps.jsonl", llm.engine, "tiny_agent")
