"""The model against `transformers`: logits, fp32, 1e-3 end to end."""

import pytest
import torch
from checkpoints import CPU, Shape, load, oracle_logits, oracle_without_ties

from tests.driving import Move, logits_of
from tokenspeed.engine.executor.loading import slot_sizes
from tokenspeed.engine.executor.memory import Memory, MemoryLayout
from tokenspeed.engine.executor.runner import Runner

TOLERANCE = 1e-3
SHAPES = [
    Shape(moe=False, group=1, gqa=4, tied=True),
    Shape(moe=False, group=2, gqa=6),
    Shape(moe=False, group=3, gqa=8, tied=True),
    Shape(moe=False, group=4, gqa=16),
    Shape(moe=True, group=1, gqa=16),
    Shape(moe=True, group=2, gqa=8, tied=True),
    Shape(moe=True, group=3, gqa=6),
    Shape(moe=True, group=4, gqa=4, tied=True),
]


class Case:
    """One random checkpoint, one prompt, and what `transformers` makes of it."""

    def __init__(self, shape: Shape, tokens: int, directory):
        self.reference, self.ids, self.expected = oracle_without_ties(shape, tokens)
        self.reference.save_pretrained(directory)
        self.model = load(directory)

    def runner(self, pages: int = 8, slots: int = 4, drafts: int = 0) -> Runner:
        layout = MemoryLayout(self.model.share, torch.float32, *slot_sizes(self.model.config, drafts, kernel=False))
        return Runner(self.model, Memory(layout, pages, slots, CPU))

    def row(self, start: int, end: int, pages=(5, 2, 7), slot: int = 1, **rest) -> Move:
        return Move(tuple(self.ids[start:end].tolist()), start, pages, slot, slot, **rest)

    def check(self, logits: torch.Tensor, first: int) -> None:
        """logits: rows for positions first, first + 1, ..."""
        assert (logits - self.expected[first : first + len(logits)]).abs().max() <= TOLERANCE


@pytest.fixture(params=SHAPES, ids=str)
def case(request, tmp_path):
    return Case(request.param, 131, tmp_path)


def test_one_shot_prefill_equals_transformers(case):
    case.check(logits_of(case.runner(), prefill=(case.row(0, 131, logits=131),)), 0)


def test_decode_token_by_token_equals_transformers(case):
    runner = case.runner()
    logits_of(runner, prefill=(case.row(0, 61),))
    for position in range(61, 131):
        case.check(logits_of(runner, decode=(case.row(position, position + 1),)), position)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_decode_of_several_tokens_at_once_equals_transformers(case, width):
    runner = case.runner(drafts=width - 1)
    logits_of(runner, prefill=(case.row(0, 61),))
    for position in range(61, 131 - width, width):
        case.check(logits_of(runner, (case.row(position, position + width),)), position)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_tokens_that_were_taken_back_leave_nothing(moe, tmp_path):
    """Of four tokens at once some are wrong, however many: what follows is as if they had never been."""
    case = Case(Shape(moe=moe), 131, tmp_path)
    runner, position = case.runner(drafts=3), 61
    logits_of(runner, prefill=(case.row(0, 61),))
    for right in (1, 2, 3, 4, 1, 1, 3, 2, 4, 1):
        move = case.row(position, position + 4)
        wrong = tuple((id + 1) % case.model.config.vocab for id in move.tokens[right:])
        logits = logits_of(runner, (move._replace(tokens=move.tokens[:right] + wrong),))
        case.check(logits[:right], position)
        position += right


def test_decode_from_the_first_token_equals_transformers(case):
    runner = case.runner()
    for position in range(12):
        case.check(logits_of(runner, decode=(case.row(position, position + 1),)), position)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_prefill_cut_at_every_token_equals_transformers(moe, tmp_path):
    case = Case(Shape(moe=moe), 70, tmp_path)
    for cut in range(1, 70):
        runner = case.runner()
        case.check(logits_of(runner, prefill=(case.row(0, cut, logits=cut),)), 0)
        case.check(logits_of(runner, prefill=(case.row(cut, 70, logits=70 - cut),)), cut)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_batch_of_mixed_rows_gives_each_what_it_gets_alone(moe, tmp_path):
    case = Case(Shape(moe=moe), 131, tmp_path)
    runner = case.runner(pages=12)
    decoding, cached = {"pages": (5, 2, 7), "slot": 1, "index": 2}, {"pages": (0, 9, 4), "slot": 3, "index": 1}
    logits_of(runner, prefill=(case.row(0, 90, **decoding), case.row(0, 33, **cached)))
    fresh = {"pages": (11, 10), "slot": 0}
    prompts = case.row(33, 101, logits=68, **cached), case.row(0, 77, logits=77, **fresh)
    logits = logits_of(runner, (case.row(90, 91, **decoding),), prompts)
    case.check(logits[:1], 90)
    case.check(logits[1:69], 33)
    case.check(logits[69:], 0)


def test_a_snapshot_resumes_exactly_where_it_was_taken_and_changes_no_output(tmp_path):
    case = Case(Shape(moe=True), 131, tmp_path)
    plain, snapping = case.runner(), case.runner()
    row = case.row(0, 131, logits=131)
    snapshot_at = 77
    with_snapshot = case.row(0, 131, logits=131, snapshots=((snapshot_at, 3),))
    assert torch.equal(logits_of(plain, prefill=(row,)), logits_of(snapping, prefill=(with_snapshot,))), (
        "a snapshot must be free of side effects"
    )
    resumed = Move(tuple(case.ids[snapshot_at:].tolist()), snapshot_at, (5, 2, 7), 3, 2, kv_tokens=131, logits=54)
    pages = snapping.memory.kv.clone()
    case.check(logits_of(snapping, prefill=(resumed,)), snapshot_at)
    assert torch.equal(pages, snapping.memory.kv), "stores below kv_tokens must be skipped"


def test_copy_on_write_leaves_the_source_slot_untouched(tmp_path):
    case = Case(Shape(), 70, tmp_path)
    runner = case.runner()
    logits_of(runner, prefill=(case.row(0, 64),))
    before = runner.memory.slots[1].clone()
    fork = Move((case.ids[64].item(),), 64, (5, 2), 1, 2)
    case.check(logits_of(runner, decode=(fork,)), 64)
    assert torch.equal(runner.memory.slots[1], before)
    case.check(logits_of(runner, decode=(case.row(64, 65),)), 64)


def test_bf16_is_no_further_from_fp32_than_transformers_is(tmp_path):
    case = Case(Shape(), 70, tmp_path)
    model = load(tmp_path, torch.bfloat16)
    runner = Runner(model, Memory(MemoryLayout(model.config, torch.bfloat16), 4, 2, CPU))
    logits = logits_of(runner, prefill=(case.row(0, 70, pages=(0, 1), logits=70),))
    theirs = oracle_logits(case.reference.to(torch.bfloat16), case.ids)
    ours, theirs = ((x.float() - case.expected).norm() for x in (logits, theirs))
    assert ours < 1.2 * theirs
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n.endswith(("a_log", "dt_bias")))


@pytest.mark.parametrize(
    "extra", [{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"attention_factor": 1.3}, {"truncate": False}]
)
def test_yarn_equals_transformers(extra, tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        **extra,
    }
    reference, ids, expected = oracle_without_ties(Shape(), 100, rope_parameters=rope)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    runner = Runner(model, Memory(MemoryLayout(model.config, torch.float32), 2, 1, CPU))
    logits = logits_of(runner, prefill=(Move(tuple(ids.tolist()), 0, (0, 1), 0, 0, logits=100),))
    assert (logits - expected).abs().max() <= TOLERANCE
