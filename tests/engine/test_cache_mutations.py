"""Bugs planted in how the engine uses the cache, one at a time: each makes a scenario fail."""

from functools import partial

import pytest
import scenarios
from lab import TOLERANCE, random_model
from planting import Bug, must_be_noticed

from tokenspeed.engine.core import Engine
from tokenspeed.engine.executor.batch import Tables, build_batch
from tokenspeed.engine.executor.memory import Memory
from tokenspeed.engine.executor.mover import Mover, page_runs
from tokenspeed.engine.executor.runner import Runner
from tokenspeed.engine.schedule.scheduler import Scheduler, _Draft

RING = 3
# (what is wrong, where, the code, the bug, the scenario that notices)
BUGS = (
    (
        "a resumed prefill reads its own slot",
        Scheduler._plan_prefill,
        "sequence.read_slot if start else sequence.write_slot",
        "sequence.write_slot",
        "mid_page_hit",
    ),
    (
        "a sequence reads the snapshot again at its second step",
        Scheduler._settle_slots,
        "sequence.read_slot, sequence.row = sequence.write_slot, None",
        "sequence.row = None",
        "long_answer",
    ),
    (
        "a sequence goes on with the row that read the snapshot",
        Scheduler._settle_slots,
        "sequence.read_slot, sequence.row = sequence.write_slot, None",
        "sequence.read_slot = sequence.write_slot",
        "fork",
    ),
    (
        "shared pages are stored to, says the Step",
        Scheduler._take,
        "sequence.kv_tokens = admission.match.kv_tokens",
        "sequence.kv_tokens = 0",
        "shared_rows_stay",
    ),
    (
        "shared pages are stored to, whatever the Step says",
        build_batch,
        "torch.where(position < kv_tokens[row], -1, position)",
        "position",
        "shared_rows_stay",
    ),
    (
        "rows above the shared ones are not stored",
        build_batch,
        "position < kv_tokens[row]",
        "position < kv_tokens[row] + 1",
        "mid_page_hit",
    ),
    ("page copies are forgotten", _Draft.add, "self.copies += sequence.copies", "pass", "append_or_copy"),
    ("page copies go the wrong way", Runner.forward, "source, target, rows)", "target, source, rows)", "mid_page_hit"),
    (
        "a page copy misses its last row",
        Runner.forward,
        "source, target, rows)",
        "source, target, rows - 1)",
        "mid_page_hit",
    ),
    (
        "compute resumes where the pages end, not the state",
        Scheduler._admit,
        "sequence.consumed = sequence.launched = match.state_tokens",
        "sequence.consumed = sequence.launched = match.kv_tokens",
        "branch",
    ),
    (
        "compute resumes one token late",
        Scheduler._admit,
        "sequence.consumed = sequence.launched = match.state_tokens",
        "sequence.consumed = sequence.launched = match.state_tokens + (match.state_tokens > 0)",
        "consumed",
    ),
    (
        "a snapshot at the end of a chunk is not written",
        Scheduler._plan_prefill,
        "sequence.snapshots[0][0] <= end",
        "sequence.snapshots[0][0] < end",
        "chunks",
    ),
    (
        "snapshots are written one token late",
        build_batch,
        "(i, *pair) for",
        "(i, min(pair[0] + 1, row.end), pair[1]) for",
        "chunks",
    ),
    ("snapshots are all taken from the first prompt", build_batch, "(i, *pair) for", "(0, *pair) for", "chunks"),
    (
        "a second fork makes its parent read a fresh slot",
        Scheduler._plan_forks,
        "parent.write_slot, parent.row = fork.parent_write, None",
        "parent.read_slot, parent.write_slot, parent.row = fork.parent_read, fork.parent_write, None",
        "fork",
    ),
    (
        "a forked parent goes on in the state its children read",
        Scheduler._plan_forks,
        "parent.write_slot, parent.row = fork.parent_write, None",
        "pass",
        "fork",
    ),
    (
        "a state is labelled with the tokens that are known, not those consumed",
        Scheduler._retire,
        "min(sequence.consumed, len(sequence.tokens))",
        "sequence.consumed = len(sequence.tokens)",
        "end_by_length",
    ),
    (
        "a state is labelled one token early",
        Scheduler._retire,
        "min(sequence.consumed, len(sequence.tokens))",
        "sequence.consumed = sequence.consumed - 1",
        "end_by_token",
    ),
    (
        "a prompt is published before it is computed",
        Scheduler._publish,
        "min(sequence.consumed, len(sequence.tokens))",
        "len(sequence.tokens)",
        "pending",
    ),
    (
        "what decoding computed is never published",
        Scheduler._retire,
        "if sequence.leaving is Leaving.ABORTED:",
        "if True:",
        "preemption",
    ),
    (
        "nobody waits for a state that is being written",
        Scheduler._should_wait,
        "return match.pending_tokens > 0",
        "return False",
        "pending",
    ),
    ("namespaces are one", Scheduler._take_in, "request.name_space", '""', "namespaces"),
    (
        "prompt log-probabilities are resumed over",
        Scheduler._take_in,
        "prompt_logprobs=sequence.scored",
        "prompt_logprobs=False",
        "prompt_logprobs_after_a_snapshot",
    ),
    (
        "a page that a decode adds enters the table at its start",
        Tables.add_pages,
        "index * width + first + i",
        "index * width + i",
        "long_answer",
    ),
    (
        "pages enter the table of the first index",
        Tables.add_pages,
        "index * width + first + i",
        "first + i",
        "copy_on_write",
    ),
    ("fewer pages are told than are held", Tables.add_pages, "first + len(new)", "len(new)", "long_answer"),
    (
        "a page that a decode adds is counted twice",
        Scheduler._extend,
        "sequence.held_pages += len(pages)",
        "sequence.held_pages += 2 * len(pages)",
        "long_answer",
    ),
    ("the oldest gives way", Scheduler._grow, "victim = max(", "victim = min(", "preemption"),
    ("all layers' states lie on one another", Memory.__init__, "linear += 1", "pass", "mid_page_hit"),
    (
        "an abort ends nothing",
        Engine._abandon,
        "self.scheduler.end(sequence, Leaving.ABORTED)",
        "pass",
        "aborts",
    ),
    (
        "a sequence goes on before its state is back",
        Scheduler._admit,
        "if admission.move:",
        "if False:",
        "there_and_back",
    ),
    (
        "a move is done before its bytes are there",
        Mover._finish,
        "self._copy(started.move)",
        "pass",
        "there_and_back",
    ),
    (
        "a move goes the wrong way",
        Mover._copy,
        "(device, host) if move.out",
        "(host, device) if move.out",
        "there_and_back",
    ),
    (
        "the window of the convolution stays behind",
        Mover._copy,
        "copy(source.slots[move.source], target.slots[move.target])",
        "end = -self._memory.layers[0].window[0].nbytes; "
        "copy(source.slots[move.source, :end], target.slots[move.target, :end])",
        "there_and_back",
    ),
    ("the last page of a run stays behind", page_runs, "i - start\n", "max(i - start - 1, 0)\n", "there_and_back"),
    (
        "whoever waits for a move waits for ever",
        Scheduler.moved,
        "sequence.state = State.PREFILLING",
        "pass",
        "there_and_back",
    ),
    (
        "an abort returns what a move still writes to",
        Scheduler._leave,
        " and not sequence.move",
        "",
        "aborted_on_the_way",
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random_dense"))


def passes(model, scenario: str) -> None:
    assert getattr(scenarios, scenario)(model, ring_rows=RING).difference() <= TOLERANCE


@pytest.mark.parametrize(("bug", "where", "code", "instead", "scenario"), BUGS, ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_noticed(model, bug, where, code, instead, scenario):
    must_be_noticed(Bug(bug, where, code, instead, partial(passes, model, scenario)))


@pytest.mark.parametrize("scenario", sorted({bug[-1] for bug in BUGS}))
def test_without_them_nothing_is_noticed(model, scenario):
    passes(model, scenario)
