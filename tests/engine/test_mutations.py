"""Planted bugs: each is applied to a copy of one module, and the tests that claim to guard the rule must fail."""

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import test_bad_input as bad_input
import test_loop as loop
import test_sampling as sampling
import test_step as steps
from schedules import run_schedule

import tokenspeed.engine

ENGINE = Path(tokenspeed.engine.__file__).parent
SEEDS = 45  # schedules that a bug may survive


def schedules() -> None:
    for seed in range(SEEDS):
        run_schedule(seed)


def sampled_side_by_side() -> None:
    for seed in range(6):
        sampling.test_a_sequence_gets_its_ids_in_any_batch_at_any_row_and_after_any_preemption(seed)


def distribution(name: str) -> Callable[[], None]:
    return lambda: sampling.test_ids_follow_the_exact_distribution(name)


class Bug(NamedTuple):
    """file: below tokenspeed/engine; old, new: exact text, once in the file; by: what must fail."""

    name: str
    file: str
    old: str
    new: str
    by: Callable[[], None] = schedules


BUGS = (
    # What a sequence has consumed, and where.
    Bug("consumed off by one", "scheduler", "self._consumed(sequence, 1)", "self._consumed(sequence, 2)"),
    Bug("chunk counts short", "scheduler", "self._consumed(sequence, end - start)", "self._consumed(sequence, 1)"),
    Bug("chunk cut wrong", "scheduler", "tuple(tokens[: end - start]),", "tuple(tokens[: end - start - 1]),"),
    Bug("page asked for too late", "scheduler", "PAGE_TOKENS <= sequence.consumed and", "PAGE_TOKENS < 0 and"),
    Bug(
        "stale page table", "scheduler", "sequence.new_pages, sequence.first_page = pages, sequence.held_pages", "pass"
    ),
    Bug("kv_tokens ignored", "scheduler", "sequence.kv_tokens = match.kv_tokens", "sequence.kv_tokens = 0"),
    Bug("kv_tokens too far", "scheduler", "= match.kv_tokens\n", "= match.known_tokens\n"),
    Bug("resume not where the state is", "scheduler", "= match.state_tokens, len", "= match.kv_tokens, len"),
    Bug("wrong slot", "scheduler", "= sequence.write_slot, ()", "= sequence.read_slot, ()"),
    Bug("copies forgotten", "scheduler", "draft.copies += admission.copies", "pass"),
    Bug("snapshot published early", "scheduler", "[0][0] <= end:", "[0][0] <= end + 8:"),
    Bug("snapshot never written", "scheduler", "            tuple(snapshots),\n", "            (),\n"),
    Bug("commit beyond what is verified", "scheduler", "sequence.tokens, end)", "sequence.tokens, end + 1)"),
    # The same rows again.
    Bug("ahead of its base by one", "scheduler", "NextStep(base, ahead + 1,", "NextStep(base, ahead,"),
    Bug(
        "the same for ever",
        "scheduler",
        "sequence.ending or sequence.sampled == sequence.limit:",
        "sequence.ending:",
        loop.test_one_whose_outputs_are_enough_is_not_gone_on_with,
    ),
    Bug("who is leaving goes on", "scheduler", "if sequence.ending or sequence.sampled ==", "if sequence.sampled =="),
    Bug(
        "one is left out",
        "scheduler",
        " or tuple(self.running) != last.rows:",
        ":",
        loop.test_one_that_got_no_page_while_another_was_leaving_is_asked_again_in_the_next_step,
    ),
    Bug("pages forgotten on the way", "scheduler", "more_pages.append((i, ", "[].append((i, "),
    Bug(
        "pages told twice", "scheduler", "            last.rows[i].new_pages, last.rows[i]", "            last.rows[i]"
    ),
    Bug(
        "admission put off",
        "scheduler",
        " or (self.waiting and self._free) or",
        " or",
        loop.test_a_request_that_comes_while_others_decode_is_prefilled_in_the_next_step,
    ),
    Bug("the host's say is skipped", "scheduler", " and not any(sequence.constrained for", " and not any(False for"),
    Bug(
        "the slot before is read again",
        "step",
        "read_slot=row.write_slot, **",
        "**",
        steps.test_what_it_says_of_itself_is_what_its_rows_say,
    ),
    Bug(
        "pages of the base again",
        "step",
        'none = {"pages": ()}',
        "none = {}",
        steps.test_what_it_says_of_itself_is_what_its_rows_say,
    ),
    Bug(
        "published late",
        "step",
        "row.start + self.ahead + 1 for",
        "row.start + self.ahead for",
        steps.test_what_it_says_of_itself_is_what_its_rows_say,
    ),
    Bug(
        "columns stand still",
        "batch",
        "start[: len(base.decode)] += ahead",
        "pass",
        steps.test_columns_are_those_of_the_rows_whatever_was_asked_before,
    ),
    Bug(
        "columns of another base",
        "batch",
        "self._base[0] is not base or",
        "",
        steps.test_columns_are_those_of_the_rows_whatever_was_asked_before,
    ),
    Bug(
        "columns spoiled by their user",
        "batch",
        "packed = self._packed.copy()",
        "packed = self._packed",
        steps.test_columns_are_those_of_the_rows_whatever_was_asked_before,
    ),
    # Who leaves when.
    Bug(
        "early free",
        "scheduler",
        "if sequence.last_step <= self._reconciled:\n            self._retire(sequence)\n\n    @p",
        "self._retire(sequence)\n\n    @p",
    ),
    Bug(
        "early free of who gives way",
        "scheduler",
        "1\n        if sequence.last_step <= self._reconciled:",
        "1\n        if True:",
    ),
    Bug("double retire", "scheduler", "sequence.index = -1\n        if seq", "if seq"),
    Bug("index leaks", "scheduler", "self._free.append(sequence.index)\n", "pass\n"),
    Bug(
        "given way for good",
        "scheduler",
        "            sequence.ending = None\n            self._enq",
        "            self._enq",
    ),
    Bug("ids count twice", "scheduler", 'if sequence.ending in ("finish", "abort"):', 'if sequence.ending == "abort":'),
    Bug(
        "finish label of a length stop",
        "scheduler",
        "sequence.tokens, sequence.consumed,",
        "sequence.tokens, len(sequence.tokens),",
    ),
    Bug(
        "finish label after an end",
        "scheduler",
        "sequence.tokens, sequence.consumed,",
        "sequence.tokens, sequence.consumed - 1,",
    ),
    Bug(
        "an end kept for the prompt's sake",
        "scheduler",
        "in sequence.tokens[sequence.prompt_tokens :]",
        "in sequence.tokens",
        lambda: loop.test_an_end_that_will_not_come_back_is_kept_only_with_what_makes_it_come_back(False),
    ),
    Bug(
        "an end never kept",
        "scheduler",
        "or kept_with in sequence.tokens[sequence.prompt_tokens :]",
        "",
        lambda: loop.test_an_end_that_will_not_come_back_is_kept_only_with_what_makes_it_come_back(True),
    ),
    Bug(
        "who gives way loses its state",
        "scheduler",
        '                    or sequence.ending == "preempt"\n',
        "",
        loop.test_who_gives_way_keeps_its_state_whatever_will_come_back,
    ),
    Bug(
        "aborted state donated",
        "scheduler",
        'if sequence.ending == "abort":\n                self.cache',
        "if False:\n                self.cache",
        loop.test_an_aborted_request_leaves_what_was_published_and_no_state_of_its_own,
    ),
    # Who goes when.
    Bug(
        "budget ignored",
        "scheduler",
        "budget -= self._plan_prefill(sequence, budget, draft)\n        if",
        "self._plan_prefill(sequence, budget, draft)\n        if",
        loop.test_a_step_holds_no_more_tokens_than_it_may,
    ),
    Bug(
        "budget forgets decoding",
        "scheduler",
        " - len(draft.decode)",
        "",
        loop.test_a_step_holds_no_more_tokens_than_it_may,
    ),
    Bug(
        "victim the oldest",
        "scheduler",
        "victim = max(",
        "victim = min(",
        loop.test_the_youngest_gives_way_and_never_the_oldest,
    ),
    Bug(
        "passed without end",
        "scheduler",
        "self._passed + 1 if blocked",
        "0 if blocked",
        loop.test_one_that_does_not_fit_is_passed_a_bounded_number_of_times,
    ),
    Bug(
        "waits for ever",
        "scheduler",
        "sequence.waited >= self.limits.wait_steps",
        "False",
        loop.test_waiting_is_bounded,
    ),
    Bug(
        "never waits",
        "scheduler",
        "if self._should_wait(sequence):",
        "if False:",
        loop.test_a_request_waits_for_a_state_that_another_is_writing_and_says_for_how_long,
    ),
    Bug(
        "priority ignored",
        "scheduler",
        "key = (sequence.request.priority, sequence.id)",
        "key = (9, sequence.id)",
        loop.test_lower_priority_numbers_go_first_and_arrival_breaks_ties,
    ),
    Bug("promised indices given away", "scheduler", "return len(self._free) - promised", "return len(self._free)"),
    Bug("parent keeps its slot at a fork", "scheduler", "parent.write_slot = fork.parent_write", "pass"),
    Bug(
        "parent reads what nobody wrote",
        "scheduler",
        "parent.write_slot = fork.parent_write",
        "parent.read_slot, parent.write_slot = fork.parent_read, fork.parent_write",
    ),
    Bug("limit one too many", "scheduler", "sequence.sampled < sequence.limit:", "sequence.sampled <= sequence.limit:"),
    # The loop.
    Bug(
        "ids read before the next plan",
        "core",
        "self._in_flight.append((planned, launched))",
        "self._reconcile(planned, launched)",
    ),
    Bug(
        "seeds equal among n",
        "core",
        "child * _SEED_STRIDE",
        "0",
        loop.test_a_request_of_several_continuations_is_prefilled_once,
    ),
    Bug("edits of the wrong sample", "core", "edits.append(Edit(i,", "edits.append(Edit(0,"),
    Bug("edits forgotten", "core", "launched.sample(self._edits(planned))", "launched.sample()"),
    Bug("constraints see no ids", "core", "            constraint.accept(id)\n", "            pass\n"),
    Bug("penalty lost at preemption", "core", "output=tuple(tokens[cut:])", "output=()"),
    Bug(
        "min_tokens for text ignored",
        "core",
        "if outputs >= params.min_tokens:\n                update",
        "if True:\n                update",
        loop.test_nothing_ends_before_min_tokens,
    ),
    Bug(
        "length before stop",
        "core",
        "if reason is None and outputs >= sequence.limit:",
        "if outputs >= sequence.limit:",
    ),
    Bug(
        "prompt scores shifted",
        "core",
        "first = planned.step.rows[i].start\n",
        "first = planned.step.rows[i].start + 1\n",
    ),
    Bug(
        "its other continuations go on",
        "core",
        "                    self.abort(request.id)",
        "                    pass",
        bad_input.test_a_sink_that_raises_at_the_last_news_of_one_continuation_ends_the_others,
    ),
    Bug(
        "a sink harms all",
        "core",
        "except Exception:  #",
        "except ZeroDivisionError:  #",
        lambda: bad_input.test_a_sink_that_raises_ends_its_own_request_alone(0, 1),
    ),
    Bug(
        "failure told to nobody",
        "core",
        'self._close(generation, update, "error")',
        "pass",
        lambda: bad_input.test_when_the_device_fails_everyone_is_told_and_nobody_is_served_afterwards("forward"),
    ),
    # Text.
    Bug("stop across borders missed", "text/stops", "text = self._held + text", "text = text"),
    Bug("held text lost", "text/stops", 'held, self._held = self._held, ""', 'held = ""'),
    Bug(
        "held text said twice",
        "text/stops",
        '            self._held = ""\n',
        "",
        loop.test_a_stop_id_that_completes_a_stop_string_says_no_text_twice,
    ),
    Bug("bad word found too late", "text/constraints", "== ids[:-1]]", "== ids]"),
    Bug(
        "thinking budget off by one", "text/constraints", "self._spent < self._budget:", "self._spent <= self._budget:"
    ),
    Bug(
        "reasoning on its way not seen",
        "text/constraints",
        " and (self._thinking or output > self._outputs)",
        " and self._thinking",
    ),
    # Sampling.
    Bug(
        "noise tied to the row",
        "sampling",
        "[b.seed for b in begins]",
        "[b.seed + i for i, b in enumerate(begins)]",
        sampled_side_by_side,
    ),
    Bug(
        "noise of one output",
        "sampling",
        "[sample.output for sample in samples]",
        "[0 for sample in samples]",
        sampling.test_the_noise_of_one_output_says_nothing_about_the_next,
    ),
    Bug(
        "noise stands still",
        "sampling",
        "prepared.outputs + ahead",
        "prepared.outputs",
        sampling.test_a_choice_some_outputs_ahead_is_that_of_samples_that_say_so,
    ),
    Bug(
        "banned for ever",
        "sampling",
        "if sample.output + ahead <",
        "if sample.output <",
        sampling.test_a_choice_some_outputs_ahead_is_that_of_samples_that_say_so,
    ),
    Bug("prepared for others", "sampling", " or self._prepared.samples is not samples:", ":", sampled_side_by_side),
    Bug(
        "columns of the last batch",
        "sampling",
        "if indices != self._columns[0]:",
        "if len(indices) != len(self._columns[0]):",
        sampled_side_by_side,
    ),
    Bug(
        "columns outlive an index",
        "sampling",
        "            self._columns = ((), [])\n",
        "",
        sampling.test_a_new_sequence_at_an_index_brings_its_own_parameters,
    ),
    Bug(
        "outputs not counted",
        "sampling",
        "self._counts[index[rows], local] += here",
        "pass",
        sampling.test_penalties_count_what_was_generated_since,
    ),
    Bug("outputs not seen", "sampling", "self._seen[index[rows], local] |= here.bool()", "pass", sampled_side_by_side),
    Bug(
        "counts of the predecessor",
        "sampling",
        "self._counts[begin.index].zero_(), self",
        "self._counts[begin.index], self",
        sampled_side_by_side,
    ),
    Bug("presence counts each", "sampling", "presence * (counts > 0)", "presence * counts", distribution("presence")),
    Bug(
        "repetition of negatives",
        "sampling",
        "x / repetition, x * repetition), x)",
        "x / repetition, x / repetition), x)",
        distribution("repetition"),
    ),
    Bug("prompt not seen", "sampling", "seen[self._local(begin.prompt)] = True", "pass", distribution("repetition")),
    Bug(
        "penalties before biases",
        "sampling",
        "        if places:\n",
        "        if places and not penalised:\n",
        distribution("penalties come after biases"),
    ),
    Bug(
        "end ids always banned",
        "sampling",
        "if sample.output + ahead < begin.min_tokens:",
        "if begin.banned:",
        sampling.test_a_choice_some_outputs_ahead_is_that_of_samples_that_say_so,
    ),
    Bug(
        "scores after penalties",
        "sampling",
        "self._vocabulary.scores(logits, ids, most)",
        "self._vocabulary.scores(x, ids, most)",
        sampling.test_log_probabilities_are_those_of_the_models_own_logits,
    ),
    Bug(
        "rank from 0",
        "sampling",
        "rank = (logprobs > own).sum(-1) + 1",
        "rank = (logprobs > own).sum(-1)",
        sampling.test_log_probabilities_are_those_of_the_models_own_logits,
    ),
)


@contextmanager
def planted(bug: Bug):
    """The engine with the bug in it: every name that the changed module defines is replaced wherever it is used."""
    original = importlib.import_module(f"tokenspeed.engine.{bug.file.replace('/', '.')}")
    source = (ENGINE / f"{bug.file}.py").read_text()
    assert source.count(bug.old) == 1, f"{bug.name}: the text to change occurs {source.count(bug.old)} times"
    changed = ModuleType(f"{original.__name__}_with_a_bug")
    changed.__package__ = original.__package__
    sys.modules[changed.__name__] = changed
    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("tokenspeed.engine.") or module in (sampling, loop, bad_input, steps)
    ]
    replaced = []
    try:
        exec(compile(source.replace(bug.old, bug.new), f"{bug.file} with a bug", "exec"), changed.__dict__)
        for name, value in list(vars(changed).items()):
            if getattr(value, "__module__", None) != changed.__name__:
                continue
            before = getattr(original, name)
            for module in users:
                if vars(module).get(name) is before:
                    replaced.append((module, name, before))
                    setattr(module, name, value)
        yield
    finally:
        for module, name, before in replaced:
            setattr(module, name, before)
        del sys.modules[changed.__name__]


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_a_planted_bug_is_found(bug):
    with planted(bug):
        try:
            bug.by()
        except Exception:
            return
    pytest.fail(f"nothing noticed: {bug.name}")
