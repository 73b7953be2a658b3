"""Bugs planted in how the engine uses the cache, one at a time: each makes a scenario fail."""

import inspect
import textwrap
from unittest.mock import patch

import pytest
import scenarios
from lab import TOLERANCE, random_model

from tokenspeed.engine import batch, core, memory, runner, scheduler
from tokenspeed.engine.errors import EngineError, RequestError

RING = 3
# (what is wrong, where, the code, the bug, the scenario that notices)
BUGS = (
    (
        "a resumed prefill reads its own slot",
        (scheduler.Scheduler, "_plan_prefill"),
        "sequence.read_slot if start else sequence.write_slot",
        "sequence.write_slot",
        "mid_page_hit",
    ),
    (
        "a sequence reads the snapshot again at its second step",
        (scheduler.Scheduler, "_consumed"),
        "sequence.read_slot, sequence.new_pages = sequence.write_slot, ()",
        "sequence.new_pages = ()",
        "long_answer",
    ),
    (
        "shared pages are stored to, says the Step",
        (scheduler.Scheduler, "_take"),
        "sequence.kv_tokens = match.kv_tokens",
        "sequence.kv_tokens = 0",
        "shared_rows_stay",
    ),
    (
        "shared pages are stored to, whatever the Step says",
        (batch, "_batch"),
        "kv_slots.masked_fill_(positions < kv_tokens, -1)",
        "kv_slots",
        "shared_rows_stay",
    ),
    (
        "rows above the shared ones are not stored",
        (batch, "_batch"),
        "positions < kv_tokens",
        "positions < kv_tokens + 1",
        "mid_page_hit",
    ),
    (
        "page copies are forgotten",
        (scheduler.Scheduler, "_take"),
        "draft.copies += admission.copies",
        "pass",
        "append_or_copy",
    ),
    (
        "page copies go the wrong way",
        (runner.Runner, "forward"),
        "source, target, rows)",
        "target, source, rows)",
        "mid_page_hit",
    ),
    (
        "a page copy misses its last row",
        (runner.Runner, "forward"),
        "source, target, rows)",
        "source, target, rows - 1)",
        "mid_page_hit",
    ),
    (
        "compute resumes where the pages end, not the state",
        (scheduler.Scheduler, "_admit"),
        "sequence.consumed, sequence.target = match.state_tokens",
        "sequence.consumed, sequence.target = match.kv_tokens",
        "branch",
    ),
    (
        "compute resumes one token late",
        (scheduler.Scheduler, "_admit"),
        "sequence.consumed, sequence.target = match.state_tokens",
        "sequence.consumed, sequence.target = match.state_tokens + (match.state_tokens > 0)",
        "consumed",
    ),
    (
        "a snapshot at the end of a chunk is not written",
        (scheduler.Scheduler, "_plan_prefill"),
        "sequence.snapshots[0][0] <= end",
        "sequence.snapshots[0][0] < end",
        "chunks",
    ),
    (
        "snapshots are written one token late",
        (runner, "build_batch"),
        "(i, tokens, slot)",
        "(i, min(tokens + 1, row.end), slot)",
        "chunks",
    ),
    (
        "snapshots are all taken from the first prompt",
        (runner, "build_batch"),
        "(i, tokens, slot)",
        "(0, tokens, slot)",
        "chunks",
    ),
    (
        "a second fork makes its parent read a fresh slot",
        (scheduler.Scheduler, "_plan_forks"),
        "parent.write_slot = fork.parent_write",
        "parent.read_slot, parent.write_slot = fork.parent_read, fork.parent_write",
        "fork",
    ),
    (
        "a forked parent goes on in the state its children read",
        (scheduler.Scheduler, "_plan_forks"),
        "parent.write_slot = fork.parent_write",
        "pass",
        "fork",
    ),
    (
        "a state is labelled with the tokens that are known, not those consumed",
        (scheduler.Scheduler, "_retire"),
        "sequence.tokens, sequence.consumed",
        "sequence.tokens, len(sequence.tokens)",
        "end_by_length",
    ),
    (
        "a state is labelled one token early",
        (scheduler.Scheduler, "_retire"),
        "sequence.tokens, sequence.consumed",
        "sequence.tokens, sequence.consumed - (sequence.ending == 'finish')",
        "end_by_token",
    ),
    (
        "a prompt is published before it is computed",
        (scheduler.Scheduler, "reconcile"),
        "sequence.tokens, end)",
        "sequence.tokens, len(sequence.tokens))",
        "pending",
    ),
    (
        "what decoding computed is never published",
        (scheduler.Scheduler, "_retire"),
        'if sequence.ending == "abort":',
        "if True:",
        "preemption",
    ),
    (
        "nobody waits for a state that is being written",
        (scheduler.Scheduler, "_should_wait"),
        "return match.pending_tokens > match.state_tokens",
        "return False",
        "pending",
    ),
    (
        "namespaces are one",
        (scheduler.Scheduler, "_admit"),
        "sequence.request.name_space",
        '""',
        "namespaces",
    ),
    (
        "prompt log-probabilities are resumed over",
        (scheduler.Scheduler, "_admit"),
        "prompt_logprobs=sequence.scored",
        "prompt_logprobs=False",
        "prompt_logprobs_after_a_snapshot",
    ),
    (
        "a page that a decode adds enters the table at its start",
        (batch.Tables, "update"),
        "+ first + i",
        "+ i",
        "long_answer",
    ),
    (
        "a page that a decode adds is counted twice",
        (scheduler.Scheduler, "_extend"),
        "sequence.held_pages += len(pages)",
        "sequence.held_pages += 2 * len(pages)",
        "long_answer",
    ),
    (
        "the oldest gives way",
        (scheduler.Scheduler, "_grow"),
        "victim = max(",
        "victim = min(",
        "preemption",
    ),
    (
        "all layers' states lie on one another",
        (memory.Memory, "__init__"),
        "linear += 1",
        "pass",
        "mid_page_hit",
    ),
    (
        "an abort ends nothing",
        (core.Engine, "abort"),
        'self.scheduler.end(generation.sequence, "abort")',
        "pass",
        "aborts",
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


def planted(owner, name: str, code: str, bug: str):
    """The function with the bug in place of the code, which it holds exactly once."""
    original = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(code) == 1, f"{name} holds {source.count(code)} times: {code}"
    names: dict = {}
    exec(compile(source.replace(code, bug), f"<{name}, with a bug>", "exec"), original.__globals__, names)
    return names[name]


@pytest.mark.parametrize(("bug", "where", "code", "instead", "scenario"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_noticed(model, bug, where, code, instead, scenario):
    owner, name = where
    with patch.object(owner, name, planted(owner, name, code, instead)):
        try:
            passed = getattr(scenarios, scenario)(model, ring_rows=RING).difference() <= TOLERANCE
        except (AssertionError, EngineError, RequestError):  # of a scenario, of a checked Step, of the cache
            passed = False
    assert not passed, f"{scenario} does not notice that {bug}"
