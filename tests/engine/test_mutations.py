"""Planted bugs of scheduling, the loop and text: the test that claims to guard the rule must fail, on every run."""

import pytest
import test_bad_input as bad_input
import test_loop as loop
import test_loop_drafts as drafts
from planting import Bug, must_be_noticed, must_pass_without, seeds

from tokenspeed.engine.core import Engine
from tokenspeed.engine.request import Acceptance
from tokenspeed.engine.schedule.scheduler import Continuation, Scheduler, _Draft
from tokenspeed.engine.text.constraints import BadWords, ThinkingBudget
from tokenspeed.engine.text.stops import StopStrings


def kept(held: bool):
    return lambda: loop.test_an_end_that_will_not_come_back_is_kept_only_with_what_makes_it_come_back(held)


def a_step() -> None:
    drafts.test_a_step_holds_no_more_tokens_than_it_may(((10, 7),), 5)
    drafts.test_a_step_holds_no_more_tokens_than_it_may(((4, 7), (7, 5)), 90)


def text_ends() -> None:
    for length in range(38, 50):
        drafts.test_where_text_ends_among_accepted_ids_nothing_behind_it_is_kept(length)


BUGS = (
    # What a sequence has consumed, and where.
    Bug("a chunk counts short", Scheduler._plan_prefill, "launched = end\n", "launched = start + 1\n", seeds(0)),
    Bug(
        "a chunk is cut wrong", Scheduler._plan_prefill, "tokens[: end - start]", "tokens[: end - start - 1]", seeds(0)
    ),
    Bug("width counts in place of ids", Scheduler.reconcile, "+= len(new)", "+= step.width", seeds(18)),
    Bug("bounds stay loose", Scheduler.reconcile, "sequence.launched -= step.width - len(new)", "pass", seeds(1)),
    Bug(
        "bounds are tightened twice",
        Scheduler.reconcile,
        "-= step.width - len(new)",
        "-= 2 * (step.width - len(new))",
        seeds(1),
    ),
    Bug(
        "a bound forgets drafts",
        Scheduler._plan_decode,
        "sequence.launched += draft.width",
        "sequence.launched += 1",
        seeds(0),
    ),
    Bug("a page is asked for too late", Scheduler._extend, "needed <=", "needed - 1 <=", seeds(3)),
    Bug("a page is counted twice", Scheduler._extend, "+= len(pages)", "+= 2 * len(pages)", seeds(0)),
    Bug(
        "pages enter the table at its start", _Draft.add, "sequence.held_pages - len(sequence.new_pages)", "0", seeds(0)
    ),
    Bug("pages are told twice", _Draft.add, "sequence.new_pages = sequence.copies = ()", "pass", seeds(0)),
    Bug(
        "pages are forgotten on the way",
        Scheduler._extend,
        "sequence.new_pages += pages",
        "sequence.new_pages = pages",
        seeds(2),
    ),
    Bug("copies are forgotten", _Draft.add, "self.copies += sequence.copies", "pass", seeds(0)),
    Bug("shared keys are ignored", Scheduler._take, "= admission.match.kv_tokens", "= 0", seeds(10)),
    Bug("shared keys reach too far", Scheduler._take, "match.kv_tokens", "match.known_tokens", seeds(0)),
    Bug(
        "resume not where the state is",
        Scheduler._admit,
        "launched = match.state_tokens",
        "launched = match.kv_tokens",
        seeds(1),
    ),
    Bug(
        "the slot before is read again",
        Scheduler._settle_slots,
        "sequence.read_slot, sequence.row = sequence.write_slot, None",
        "sequence.row = None",
        seeds(0),
    ),
    Bug(
        "the row before is used again",
        Scheduler._settle_slots,
        "sequence.read_slot, sequence.row = sequence.write_slot, None",
        "sequence.read_slot = sequence.write_slot",
        seeds(2),
    ),
    Bug("a snapshot is published early", Scheduler._plan_prefill, "[0][0] <= end", "[0][0] <= end + 8", seeds(2)),
    Bug("a snapshot is never written", Scheduler._plan_prefill, "tuple(snapshots)", "()", seeds(0)),
    Bug(
        "keys of rejected drafts are published",
        Scheduler._publish,
        "min(sequence.consumed, len(sequence.tokens))",
        "min(sequence.launched, len(sequence.tokens))",
        seeds(0),
    ),
    Bug(
        "what the host did not take is published",
        Scheduler._publish,
        "min(sequence.consumed, len(sequence.tokens))",
        "sequence.consumed",
        text_ends,
    ),
    # Several tokens a step.
    Bug(
        "drafts beyond the room",
        Scheduler._width,
        "if any(tokens > self.limits.max_tokens for tokens in needed)",
        "if False",
        drafts.test_no_draft_goes_beyond_the_room,
    ),
    Bug(
        "drafts beyond a step",
        Scheduler._width,
        " or len(decoding) * width > self.limits.max_num_batched_tokens",
        "",
        a_step,
    ),
    Bug(
        "drafts beyond the pages",
        Scheduler._width,
        "width if all(enough) else 1",
        "width",
        drafts.test_nobody_gives_way_for_the_sake_of_drafts,
    ),
    Bug(
        "drafts by another's load",
        Scheduler.plan,
        "drafts_for(self.limits.drafts, len(decoding))",
        "self.limits.max_drafts",
        drafts.test_each_number_of_decoding_sequences_has_its_drafts,
    ),
    Bug("the budget forgets drafts", Scheduler.plan, "len(draft.decode) * draft.width", "len(draft.decode)", a_step),
    Bug("the host has its say too late", Scheduler._edited, "sequence.launched", "sequence.consumed", seeds(0)),
    Bug(
        "the host has no say",
        Scheduler._plan_decode,
        "sequence.constrained and self._edited(sequence)",
        "False",
        seeds(1),
    ),
    Bug("all ids of a step count", Engine.judge, "return count, True", "return len(ids), True", text_ends),
    Bug(
        "min_tokens by a step's first output",
        Engine.judge,
        "sequence.outputs + count, update",
        "sequence.outputs + 1, update",
        seeds(0),
    ),
    Bug("log-probabilities of a step's first id", Engine.judge, "scores[count - 1 : count]", "scores[:1]", seeds(5)),
    Bug(
        "log-probabilities of another sequence",
        Engine._reconcile,
        "planned.samples[i].id: scores",
        "planned.samples[i - 1].id: scores",
        seeds(7),
    ),
    Bug(
        "a state beyond the text is donated",
        Scheduler._retire,
        "donate = count == sequence.consumed and",
        "donate =",
        text_ends,
    ),
    Bug(
        "the id itself counts as a draft",
        Acceptance.count,
        "ids - 1",
        "ids",
        drafts.test_drafts_are_counted_by_their_place,
    ),
    Bug(
        "acceptance of drafts that were not verified",
        Acceptance.count,
        "(self.drafted, drafts)",
        "(self.drafted, ids - 1)",
        drafts.test_drafts_are_counted_by_their_place,
    ),
    Bug(
        "acceptance by the width alone",
        Engine._count_drafts,
        "self.acceptance.count(step.width - 1, len(new))",
        "self.acceptance.count(step.width - 1, step.width)",
        lambda: drafts.test_it_is_counted_how_drafts_fare(0),
    ),
    # Who leaves when.
    Bug(
        "freed under a launched step",
        Scheduler._leave,
        "sequence.last_step <= self._reconciled",
        "True",
        seeds(0),
    ),
    Bug("retired a step early", Scheduler.reconcile, "s.last_step <= planned.number", "True", seeds(2)),
    Bug("an index leaks", Scheduler._retire, "self._free.append(sequence.index)", "pass", seeds(0)),
    Bug("given way for good", Scheduler._retire, "self._enqueue(sequence)", "pass", seeds(1)),
    Bug("who gave way decodes", Scheduler.plan, "if sequence.state is State.DECODING:  #", "if True:  #", seeds(291)),
    Bug(
        "who ended is judged again",
        Scheduler.reconcile,
        "if new and sequence.leaving in (None, Leaving.PREEMPTED):",
        "if new:",
        seeds(4),
    ),
    Bug(
        "a state is labelled with what is known",
        Scheduler._retire,
        "min(sequence.consumed, len(sequence.tokens))",
        "len(sequence.tokens)",
        loop.test_after_a_length_stop_the_last_id_was_not_consumed,
    ),
    Bug(
        "a state is labelled one token early",
        Scheduler._retire,
        "min(sequence.consumed, len(sequence.tokens))",
        "sequence.consumed = sequence.consumed - 1",
        loop.test_after_a_length_stop_the_last_id_was_not_consumed,
    ),
    Bug(
        "an end is kept for the prompt's sake",
        Scheduler._comes_back,
        "sequence.tokens[sequence.prompt_tokens :]",
        "sequence.tokens",
        kept(False),
    ),
    Bug(
        "an end is never kept",
        Scheduler._comes_back,
        "or opening in sequence.tokens[sequence.prompt_tokens :]",
        "",
        kept(True),
    ),
    Bug(
        "who gives way loses its state",
        Scheduler._retire,
        "(preempted or self._comes_back(sequence))",
        "self._comes_back(sequence)",
        loop.test_who_gives_way_keeps_its_state_whatever_will_come_back,
    ),
    Bug(
        "an aborted state is donated",
        Scheduler._retire,
        "if sequence.leaving is Leaving.ABORTED:",
        "if False:",
        loop.test_an_aborted_request_leaves_what_was_published_and_no_state_of_its_own,
    ),
    Bug(
        "outputs beyond the limit",
        Continuation.waits_for_more,
        "<",
        "<=",
        loop.test_one_whose_outputs_are_enough_is_not_gone_on_with,
    ),
    Bug(
        "launched outputs are forgotten",
        Continuation.waits_for_more,
        " + self.unread",
        "",
        loop.test_one_whose_outputs_are_enough_is_not_gone_on_with,
    ),
    # Who goes when.
    Bug(
        "one is left out",
        Scheduler._grow,
        "return False  #",
        "return True  #",
        loop.test_one_that_got_no_page_while_another_was_leaving_is_asked_again_in_the_next_step,
    ),
    Bug(
        "admission is put off",
        Scheduler.plan,
        "if budget > kept and self.preemptions",
        "if not decoding and self.preemptions",
        loop.test_a_request_that_comes_while_others_decode_is_prefilled_in_the_next_step,
    ),
    Bug(
        "prompts go beyond the budget",
        Scheduler.plan,
        "budget -= self._plan_prefill(sequence, budget - kept, draft)",
        "self._plan_prefill(sequence, budget - kept, draft)",
        loop.test_a_step_holds_no_more_tokens_than_it_may,
    ),
    Bug(
        "the oldest prompt takes all",
        Scheduler.plan,
        "budget - budget // 2 // PAGE_TOKENS * PAGE_TOKENS",
        "budget",
        loop.test_a_short_prompt_does_not_wait_until_a_long_one_has_ended,
    ),
    Bug(
        "the oldest prompt takes what is left over alone",
        Scheduler.plan,
        "budget - budget // 2 // PAGE_TOKENS * PAGE_TOKENS",
        "0",
        loop.test_a_short_prompt_does_not_wait_until_a_long_one_has_ended,
    ),
    Bug(
        "the budget forgets decoding",
        Scheduler.plan,
        " - len(draft.decode) * draft.width",
        "",
        loop.test_a_step_holds_no_more_tokens_than_it_may,
    ),
    Bug(
        "the oldest gives way",
        Scheduler._grow,
        "victim = max(",
        "victim = min(",
        loop.test_the_youngest_gives_way_and_never_the_oldest,
    ),
    Bug(
        "passed without end",
        Scheduler._admit,
        "self._passed + 1 if blocked",
        "0 if blocked",
        loop.test_one_that_does_not_fit_is_passed_a_bounded_number_of_times,
    ),
    Bug(
        "one waits for ever",
        Scheduler._should_wait,
        "sequence.waited >= self.limits.wait_steps",
        "False",
        loop.test_waiting_is_bounded,
    ),
    Bug(
        "nobody waits",
        Scheduler._admit,
        "if self._should_wait(sequence):",
        "if False:",
        loop.test_a_request_waits_for_a_state_that_another_is_writing_and_says_for_how_long,
    ),
    Bug(
        "priority is ignored",
        Scheduler._enqueue,
        "sequence.request.priority * _AGE",
        "9 * _AGE",
        loop.test_lower_priority_numbers_go_first_and_arrival_breaks_ties,
    ),
    Bug(
        "low priority waits for ever",
        Scheduler._enqueue,
        " + self._admissions",
        "",
        loop.test_one_of_low_priority_is_overtaken_for_a_while_and_no_longer,
    ),
    Bug("promised indices are given away", Scheduler._available, " - promised", "", seeds(2)),
    Bug(
        "a parent keeps its slot at a fork",
        Scheduler._plan_forks,
        "parent.write_slot, parent.row = fork.parent_write, None",
        "pass",
        seeds(2),
    ),
    Bug(
        "a parent reads what nobody wrote",
        Scheduler._plan_forks,
        "parent.write_slot, parent.row = fork.parent_write, None",
        "parent.read_slot, parent.write_slot, parent.row = fork.parent_read, fork.parent_write, None",
        seeds(2),
    ),
    Bug(
        "a child starts one token late",
        Scheduler._plan_prefill,
        "child.launched = sequence.target",
        "child.launched = sequence.target + 1",
        lambda: drafts.test_each_continuation_of_a_request_is_gone_on_with_where_it_ended(()),
    ),
    # The loop.
    Bug(
        "ids are read before the next plan",
        Engine._step,
        "self._in_flight.append((planned, launched, begin))",
        "self._reconcile(planned, launched, begin)",
        seeds(0),
    ),
    Bug(
        "n continuations are one",
        Engine.submit,
        "child * _SEED_STRIDE",
        "0",
        loop.test_a_request_of_several_continuations_is_prefilled_once,
    ),
    Bug("an edit of the wrong sample", Engine._edits, "edits.append(Edit(i,", "edits.append(Edit(0,", seeds(1)),
    Bug(
        "edits of drafts are those of the id before",
        Engine._edits,
        "zip(*rules",
        "zip(*[[r[0]] * len(r) for r in rules]",
        seeds(6),
    ),
    Bug(
        "edits are forgotten",
        Engine._step,
        "launched.sample(self._edits(planned, launched))",
        "launched.sample()",
        seeds(0),
    ),
    Bug("constraints see no ids", Engine._accept, "constraint.accept(id)", "pass", seeds(0)),
    Bug("a penalty is lost at preemption", Engine.begin, "output=tuple(tokens[cut:])", "output=()", seeds(1)),
    Bug(
        "min_tokens of text are ignored",
        Engine._accept,
        "push(text, outputs > params.min_tokens)",
        "push(text)",
        loop.test_nothing_ends_before_min_tokens,
    ),
    Bug(
        "length goes before a stop",
        Engine._accept,
        "if reason is None and outputs >= sequence.limit:",
        "if outputs >= sequence.limit:",
        seeds(41),
    ),
    Bug(
        "prompt scores are shifted",
        Engine._reconcile,
        "planned.step.rows[i].start",
        "planned.step.rows[i].start + 1",
        seeds(3),
    ),
    Bug(
        "its other continuations go on",
        Engine._deliver,
        "self.abort(request.id)",
        "pass",
        bad_input.test_a_sink_that_raises_at_the_last_news_of_one_continuation_ends_the_others,
    ),
    Bug(
        "a sink harms all",
        Engine._deliver,
        "except Exception:",
        "except ZeroDivisionError:",
        lambda: bad_input.test_a_sink_that_raises_ends_its_own_request_alone(1, 0),
    ),
    Bug(
        "a failure is told to nobody",
        Engine._fail,
        'self._close(generation, update, "error")',
        "pass",
        lambda: bad_input.test_when_the_device_fails_everyone_is_told_and_nobody_is_served_afterwards("forward"),
    ),
    # Text.
    Bug("a stop across borders is missed", StopStrings.push, "text = self._held + text", "text = text", seeds(4)),
    Bug("held text is lost", StopStrings.finish, "held, self._held = self._held", "held, self._held = ''", seeds(9)),
    Bug(
        "held text is said twice",
        StopStrings.push,
        '        self._held = ""\n',
        "",
        loop.test_a_stop_id_that_completes_a_stop_string_says_no_text_twice,
    ),
    Bug("a bad word is found too late", BadWords._verdict, "== ids[:-1]", "== ids", seeds(8)),
    Bug(
        "bad words forget the last of the launched",
        BadWords.may_act,
        "output > 0",
        "output > 1",
        lambda: drafts.test_a_bad_word_is_no_beginning_either(()),
    ),
    Bug(
        "the thinking budget is off by one",
        ThinkingBudget._verdict,
        "spent < self._budget",
        "spent <= self._budget",
        seeds(0),
    ),
    Bug(
        "reasoning on its way is not seen",
        ThinkingBudget.may_act,
        " and (self._thinking or output > self._outputs)",
        " and self._thinking",
        seeds(6),
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "-") for bug in BUGS])
def test_a_planted_bug_is_found(bug):
    must_be_noticed(bug)


def test_without_them_nothing_is_found():
    must_pass_without(BUGS)
