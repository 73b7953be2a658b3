"""The contract of csrc/cache/cache.h, one claim a test, within one memory."""

import numpy as np
import pytest

from tokenspeed.engine.errors import CapacityError, ConfigError, RequestError
from tokenspeed.engine.schedule.cache import Admission, CacheConfig, NoRoom, Policy, PrefixCache, Reason

from .contract import away, invariants_hold_afterwards, join, make, run, text, tokens  # noqa: F401, a fixture

# --- what is matched -------------------------------------------------------------------------------------------------


def test_the_second_request_resumes_at_a_boundary_inside_a_page():
    cache = make()
    run(cache, 1, join(text(0, 10), text(100, 5)), boundaries=[10])
    match = cache.probe("", join(text(0, 10), text(200, 5)))
    assert (match.state_tokens, match.kv_tokens, match.known_tokens) == (10, 10, 10)
    assert match.reason == Reason.NEW_TOKENS


def test_a_linear_turn_recomputes_its_new_tokens_and_one_after_a_length_stop():
    cache = make()
    prompt, output = text(0, 11), text(50, 6)
    run(cache, 1, prompt, output=output)
    longer = join(prompt, output, text(90, 5))
    assert cache.probe("", longer).state_tokens == len(prompt) + len(output) - 1
    cache.admit(2, "", longer)
    cache.finish(2, longer, len(longer))  # this time the last token was consumed, as after an end-of-sequence token
    assert cache.probe("", join(longer, text(7, 3))).state_tokens == len(longer)


def test_after_dropped_reasoning_recompute_starts_where_it_was_dropped():
    cache = make()
    question, generation_prompt = text(0, 13), text(900, 2)
    run(cache, 1, join(question, generation_prompt), boundaries=[13], output=text(300, 20))
    match = cache.probe("", join(question, text(320, 9)))
    assert match.state_tokens == len(question) == match.known_tokens


def test_a_match_never_covers_the_last_token():
    cache = make()
    prompt = text(0, 9)
    run(cache, 1, prompt, boundaries=[8, 9])
    match = cache.probe("", prompt)
    assert match.state_tokens == 8 and match.reason == Reason.WHOLE_PROMPT_KNOWN
    assert cache.probe("", text(0, 8)).state_tokens == 0, "the snapshot at 8 leaves no token to compute"


def test_of_two_snapshots_in_sibling_pages_the_one_that_fits_is_found():
    cache = make()
    run(cache, 1, tokens(1, 2, 3, 4, 9), boundaries=[2])
    run(cache, 2, tokens(1, 2, 5, 6, 9), boundaries=[3])
    assert cache.probe("", tokens(1, 2, 5, 7, 7)).state_tokens == 3
    assert cache.probe("", tokens(1, 2, 3, 7, 7)).state_tokens == 2
    assert cache.probe("", tokens(1, 2, 8, 7, 7)).state_tokens == 2


def test_prompt_logprobs_share_pages_but_compute_everything():
    cache = make()
    first = run(cache, 1, text(0, 13), boundaries=[12])
    admission = cache.admit(2, "", text(0, 13), prompt_logprobs=True)
    assert admission.match.state_tokens == 0 and admission.match.kv_tokens == 12
    assert admission.match.reason == Reason.PROMPT_LOGPROBS and admission.read_slot == -1
    assert list(admission.pages[:3]) == list(first.pages[:3])


def test_namespaces_never_match_each_other_and_clear_alone():
    cache = make()
    for request, name in enumerate(("a", "b")):
        cache.admit(request, name, text(0, 9), [8])
        cache.finish(request, text(0, 9), 9)
    assert cache.probe("c", text(0, 9)).reason == Reason.COLD
    assert cache.clear("a") and not cache.clear("a")
    assert cache.probe("a", text(0, 9)).known_tokens == 0
    assert cache.probe("b", text(0, 9)).state_tokens == 8


def test_clearing_under_a_running_sequence_leaves_it_running_and_nothing_behind():
    cache = make()
    cache.admit(1, "a", text(0, 9), [8])
    cache.clear("a")
    cache.commit(1, text(0, 9), 9)
    assert cache.probe("a", text(0, 9)).known_tokens == 0
    cache.finish(1, text(0, 9), 9)
    stats = cache.stats()
    assert stats["pages_free"] == 64 and stats["slots_free"] == 16 and stats["nodes"] == 0


def test_clearing_all_forgets_every_namespace_and_what_runs_goes_on_and_leaves_nothing():
    cache = make()
    for request, name in enumerate(("a", "b")):
        cache.admit(request, name, text(0, 9), [8])
        cache.finish(request, text(0, 9), 9)
    running = cache.admit(7, "b", text(0, 13), [11])
    assert running.match.state_tokens == 9
    assert cache.clear_all() == 2 and cache.clear_all() == 0
    assert [cache.probe(name, text(0, 9)).reason for name in ("a", "b")] == [Reason.COLD] * 2
    later = cache.admit(8, "b", text(0, 13), [11])
    assert later.match.known_tokens == 0 and not set(later.pages.tolist()) & set(running.pages.tolist())
    cache.commit(7, text(0, 13), 13)
    cache.fork(7, 9, text(0, 13), 13)
    assert cache.probe("b", text(0, 13)).kv_tokens == 0, "what it commits is found by nobody"
    for request in (7, 8, 9):
        cache.finish(request, text(0, 13), 13)
    assert cache.probe("b", text(0, 14)).state_tokens == 13, "a sequence that came after is kept"
    assert cache.clear_all() == 1
    stats = cache.stats()
    assert stats["pages_free"] == 64 and stats["slots_free"] == 16 and stats["nodes"] == 0


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_lone_continuation_appends_to_the_page_and_copies_nothing():
    cache = make()
    first = run(cache, 1, text(0, 10))
    admission = cache.admit(2, "", text(0, 15))
    assert admission.match.state_tokens == 10 and admission.copies == ()
    assert admission.pages[2] == first.pages[2]
    assert cache.stats()["pages_appended_in_place"] == 1


def test_a_second_continuation_copies_the_rows_it_needs():
    cache = make()
    run(cache, 1, text(0, 10))
    one = cache.admit(2, "", text(0, 15))
    two = cache.admit(3, "", join(text(0, 10), text(70, 5)))
    assert two.copies == ((one.pages[2], two.pages[2], 2),)
    assert list(one.pages[:2]) == list(two.pages[:2]) and one.pages[2] != two.pages[2]


def test_rows_that_were_filled_further_are_copied_not_overwritten():
    cache = make()
    first = run(cache, 1, text(0, 12), boundaries=[10])
    admission = cache.admit(2, "", join(text(0, 10), text(70, 5)))
    assert admission.match.state_tokens == 10
    assert admission.copies == ((first.pages[2], admission.pages[2], 2),)


def test_a_snapshot_may_be_read_while_its_writer_appends_to_the_same_page():
    cache = make()
    writer = cache.admit(1, "", text(0, 11), [9])
    cache.commit(1, text(0, 11), 11)
    reader = cache.admit(2, "", join(text(0, 9), text(50, 4)))
    assert reader.match.state_tokens == 9 and reader.copies == ((writer.pages[2], reader.pages[2], 1),)
    assert reader.read_slot == writer.snapshots[0][1] and reader.write_slot not in (reader.read_slot, writer.write_slot)


def test_known_pages_are_shared_even_where_their_state_is_gone():
    cache = make()
    first = run(cache, 1, text(0, 13), donate=False)
    admission = cache.admit(2, "", text(0, 17))
    assert admission.match.state_tokens == 0 and admission.match.kv_tokens == 12
    assert list(admission.pages[:3]) == list(first.pages[:3])


def test_extend_grows_by_pages_and_repeats_nothing():
    cache = make()
    admission = cache.admit(1, "", text(0, 6))
    assert len(admission.pages) == 2 and cache.extend(1, 8) == ()
    grown = cache.extend(1, 13)
    assert len(grown) == 2 and not set(grown) & set(admission.pages.tolist())
    assert cache.extend(1, 13) == ()


def test_two_sequences_that_compute_the_same_tokens_pin_no_page_twice_once_one_has_ended():
    cache = make(pages=6, slots=4, ghost_nodes=0)
    prompt = text(0, 7)
    cache.admit(1, "", prompt)
    cache.admit(2, "", prompt)
    cache.commit(1, prompt, 7)
    cache.commit(2, prompt, 7)
    cache.finish(1, prompt, 7)
    whole = join(prompt, text(40, 17))
    assert not isinstance(cache.extend(2, 24), NoRoom), "all six pages are its own"
    cache.commit(2, whole, 24)


def test_rows_that_a_fork_relies_on_are_never_appended_over_though_its_parent_is_aborted():
    cache = make()
    prompt = text(0, 7)
    cache.admit(1, "", prompt, [1])
    cache.commit(1, prompt, 2)  # the snapshot at 1 is published, the rows after it are not
    child = cache.fork(1, 2, prompt, 7).child
    cache.abort(1)
    other = cache.admit(3, "", join(text(0, 1), text(70, 5)))
    assert other.match.state_tokens == 1 and other.copies == ((child.pages[0], other.pages[0], 1),)
    assert not set(other.pages.tolist()) & set(child.pages.tolist())


def test_a_fork_pins_no_page_twice_once_those_it_came_from_have_ended():
    cache = make(pages=6, slots=8, ghost_nodes=0)
    prompt = text(0, 7)
    for request in (1, 2):
        cache.admit(request, "", prompt)
    for request in (1, 2):
        cache.commit(request, prompt, 7)
    cache.fork(2, 3, prompt, 7)
    cache.finish(2, prompt, 7)
    cache.finish(1, prompt, 7)
    cache.commit(3, join(prompt, text(40, 1)), 8)  # its rows are copied
    assert not isinstance(cache.extend(3, 24), NoRoom), "all six pages are its own"


# --- slots and promised snapshots ------------------------------------------------------------------------------------


def test_boundaries_are_promised_once_in_order_and_inside_the_prompt():
    cache = make()
    admission = cache.admit(1, "", text(0, 10), [9, -3, 4, 0, 4, 10, 11])
    assert [count for count, _ in admission.snapshots] == [4, 9, 10]
    slots = {slot for _, slot in admission.snapshots} | {admission.write_slot}
    assert len(slots) == 4 and admission.read_slot == -1


def test_a_prompt_that_leaves_what_is_known_gets_a_snapshot_at_its_branch_point():
    cache = make()
    run(cache, 1, text(0, 14))
    assert [count for count, _ in run(cache, 2, join(text(0, 7), text(60, 8))).snapshots] == [7]
    assert cache.probe("", join(text(0, 7), text(80, 8))).state_tokens == 7
    assert make(branch_points=False).admit(1, "", text(0, 14)).snapshots == ()


def test_a_branch_point_is_recognised_after_its_pages_are_gone():
    cache = make(pages=5, ghost_nodes=8)
    run(cache, 1, text(0, 15))
    run(cache, 2, text(500, 19))
    assert cache.stats()["pages_evicted"] > 0 and cache.probe("", text(0, 12)).kv_tokens == 0
    admission = cache.admit(3, "", join(text(0, 8), text(60, 8)))
    assert [count for count, _ in admission.snapshots] == [8]


def test_without_ghosts_nothing_is_remembered_of_evicted_pages():
    cache = make(pages=5, ghost_nodes=0)
    run(cache, 1, text(0, 15))
    run(cache, 2, text(500, 19))
    assert cache.stats()["ghosts_dropped"] > 0 and cache.probe("", text(0, 12)).known_tokens == 0


def test_the_grid_uses_spare_slots_only():
    assert [count for count, _ in make(grid_tokens=5).admit(1, "", text(0, 22)).snapshots] == [5, 10, 15, 20]
    crowded = make(grid_tokens=5, slots=4).admit(1, "", text(0, 22))
    assert [count for count, _ in crowded.snapshots] == [5], "half of the slots stay free"


def test_scarce_slots_go_to_what_saves_most():
    cache = make(slots=3)
    run(cache, 1, text(0, 40), donate=False, boundaries=[40])
    run(cache, 2, text(500, 40), donate=False, boundaries=[40])
    run(cache, 3, text(900, 8), donate=False, boundaries=[8])
    assert cache.stats()["snapshots_declined"] == 1
    assert cache.probe("", text(0, 44)).state_tokens == 40 and cache.probe("", text(900, 12)).state_tokens == 0


def test_lru_keeps_what_was_used_last():
    cache = make(slots=3, policy=Policy.LRU)
    run(cache, 1, text(0, 40), donate=False, boundaries=[40])
    run(cache, 2, text(500, 8), donate=False, boundaries=[8])
    run(cache, 3, text(900, 8), donate=False, boundaries=[8])
    assert cache.probe("", text(0, 44)).state_tokens == 0
    assert cache.probe("", text(500, 12)).state_tokens == 8 and cache.probe("", text(900, 12)).state_tokens == 8


def test_the_only_slot_is_consumed_in_place():
    cache = make(slots=1)
    run(cache, 1, text(0, 10))
    admission = cache.admit(2, "", text(0, 15))
    assert admission.match.state_tokens == 10 and admission.read_slot == admission.write_slot
    assert cache.stats()["snapshots_consumed"] == 1
    assert isinstance(cache.admit(3, "", text(0, 15)), NoRoom)


def test_a_state_that_an_empty_machine_cannot_use_is_recomputed():
    cache = make(pages=3, slots=4)
    run(cache, 1, text(0, 9))  # ends with one row of the third page, and
    run(cache, 2, tokens(0, 1, 2, 3, 4, 5, 6, 7, 8, 60))  # that page is filled further
    match = cache.probe("", join(text(0, 9), text(70, 2)))
    assert match.state_tokens == 9
    admission = cache.admit(3, "", join(text(0, 9), text(70, 2)))
    assert admission.match.reason == Reason.TIGHT_MEMORY and admission.match.state_tokens == 0


# --- running beside each other ---------------------------------------------------------------------------------------


def test_a_boundary_that_another_sequence_will_write_is_announced():
    cache = make()
    cache.admit(1, "", text(0, 15), [10])
    match = cache.probe("", join(text(0, 10), text(60, 5)))
    assert match.pending_tokens == 10 and match.state_tokens == 0 and match.reason == Reason.PENDING
    cache.commit(1, text(0, 15), 12)
    match = cache.probe("", join(text(0, 10), text(60, 5)))
    assert match.pending_tokens == 0 and match.state_tokens == 10


def test_an_aborted_writer_withdraws_its_announcement():
    cache = make()
    cache.admit(1, "", text(0, 15), [10])
    assert cache.abort(1) and not cache.abort(1)
    match = cache.probe("", join(text(0, 10), text(60, 5)))
    assert match.pending_tokens == 0 and match.reason == Reason.NO_SNAPSHOT
    stats = cache.stats()
    assert stats["pages_held"] == stats["slots_promised"] == stats["slots_working"] == 0


def test_a_fork_reads_the_parents_state_and_copies_its_last_rows():
    cache = make()
    prompt = text(0, 10)
    parent = cache.admit(1, "", prompt)
    first = cache.fork(1, 2, prompt, 10)
    second = cache.fork(1, 3, prompt, 10)
    assert first.child.read_slot == second.child.read_slot == parent.write_slot
    assert first.parent_read == parent.write_slot != first.parent_write
    assert second.parent_read == second.parent_write == first.parent_write
    writes = {first.parent_write, first.child.write_slot, second.child.write_slot}
    assert len(writes) == 3 and parent.write_slot not in writes
    for made in (first, second):
        assert made.child.copies == ((parent.pages[2], made.child.pages[2], 2),)
        assert list(made.child.pages[:2]) == list(parent.pages[:2])
    cache.commit(1, prompt, 10)
    assert cache.probe("", text(0, 14)).state_tokens == 10, "the state they share is a snapshot"


def test_a_fork_at_a_promised_snapshot_needs_one_slot_only():
    cache = make()
    parent = cache.admit(1, "", text(0, 10), [10])
    before = cache.stats()["slots_free"]
    made = cache.fork(1, 2, text(0, 10), 10)
    assert made.child.read_slot == parent.snapshots[0][1] and made.parent_read == made.parent_write == parent.write_slot
    assert cache.stats()["slots_free"] == before - 1


def test_children_outlive_an_aborted_parent():
    cache = make()
    cache.admit(1, "", text(0, 10))
    cache.fork(1, 2, text(0, 10), 10)
    cache.abort(1)
    assert cache.check() == "" and cache.stats()["slots_draining"] == 1
    whole = join(text(0, 10), text(40, 2))
    cache.commit(2, whole, 12)
    assert cache.stats()["slots_draining"] == 0
    cache.finish(2, whole, 12)


def test_a_preempted_sequence_resumes_where_it_stopped():
    cache = make()
    prompt = text(0, 10)
    cache.admit(1, "", prompt)
    so_far = join(prompt, text(50, 3))
    cache.extend(1, 13)
    cache.finish(1, so_far, 12)  # two of three output tokens were consumed by launched steps
    again = cache.admit(1, "", so_far)
    assert again.match.state_tokens == 12 and again.match.reason == Reason.NEW_TOKENS


def test_admission_is_all_or_nothing():
    cache = make(pages=8, slots=4)
    cache.admit(1, "", text(0, 20))
    before = cache.stats()
    refused = cache.admit(2, "", text(500, 12), [8])
    assert isinstance(refused, NoRoom) and (refused.pages_short, refused.slots_short) == (2, 0)
    assert cache.stats() == before | {"no_room": 1}
    cache.abort(1)
    assert isinstance(cache.admit(2, "", text(500, 12)), Admission)


def test_what_a_running_sequence_uses_is_never_evicted():
    cache = make(pages=8, slots=4)
    run(cache, 1, text(0, 12))
    held = cache.admit(2, "", text(0, 15))
    assert held.match.state_tokens == 12
    assert isinstance(cache.admit(3, "", text(500, 18)), NoRoom)
    assert isinstance(cache.admit(4, "", text(700, 14)), Admission)
    assert held.read_slot >= 0 and cache.stats()["snapshots_evicted"] == 0


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_every_reason_is_given_for_its_cause():
    cache = make()
    reasons = {cache.probe("", text(0, 9)).reason: "nothing yet"}
    cache.admit(1, "", text(0, 15), [10])
    reasons[cache.probe("", text(0, 13)).reason] = "being written"
    cache.finish(1, text(0, 15), 15, donate=False)
    reasons[cache.probe("", join(text(0, 10), text(70, 3))).reason] = "resumes at the divergence"
    reasons[cache.probe("", join(text(0, 14), text(70, 3))).reason] = "no state was kept at 14"
    reasons[cache.probe("", text(0, 11)).reason] = "all known but the last token"
    reasons[cache.probe("", text(0, 11), prompt_logprobs=True).reason] = "asked for logits"
    reasons[make(enabled=False).probe("", text(0, 9)).reason] = "off"
    small = make(slots=2)
    run(small, 1, text(0, 10))
    run(small, 2, text(300, 10))
    run(small, 3, text(600, 10))
    reasons[small.probe("", text(0, 14)).reason] = "let go"
    tight = make(pages=3, slots=4)
    run(tight, 1, text(0, 9))
    run(tight, 2, tokens(0, 1, 2, 3, 4, 5, 6, 7, 8, 60))
    reasons[tight.admit(3, "", join(text(0, 9), text(70, 2))).match.reason] = "no room to use it"
    hosted = away()
    hosted.set_costs(1, 1, 0.1)
    reasons[hosted.probe("", text(0, 14)).reason] = "in host memory, and slow to come back"
    assert set(reasons) == set(Reason.__members__.values()), reasons


def test_switched_off_nothing_is_shared_and_everything_returns():
    cache = make(enabled=False)
    first = cache.admit(1, "", text(0, 10), [8])
    second = cache.admit(2, "", text(0, 10), [8])
    assert first.snapshots == () and not set(first.pages.tolist()) & set(second.pages.tolist())
    forked = cache.fork(1, 3, text(0, 10), 10)
    assert list(forked.child.pages[:2]) == list(first.pages[:2])
    for request in (1, 2, 3):
        cache.commit(request, text(0, 11), 11)
        cache.finish(request, text(0, 11), 11)
    stats = cache.stats()
    assert stats["pages_free"] == 64 and stats["slots_free"] == 16 and stats["nodes"] == 0


# --- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_calls_name_what_is_wrong_and_change_nothing():
    cache = make()
    cache.admit(1, "", text(0, 10))
    cache.commit(1, text(0, 10), 10)
    before = cache.stats()
    for call, message in [
        (lambda: cache.admit(2, "", text(0, 0)), "request 2 has no tokens"),
        (lambda: cache.admit(1, "", text(0, 5)), "request 1 is running already"),
        (lambda: cache.commit(9, text(0, 5), 5), "request 9 is not running"),
        (lambda: cache.extend(9, 5), "request 9 is not running"),
        (lambda: cache.finish(9, text(0, 5), 5), "request 9 is not running"),
        (lambda: cache.fork(9, 10, text(0, 5), 5), "request 9 is not running"),
        (lambda: cache.fork(1, 1, text(0, 10), 10), "request 1 is running already"),
        (lambda: cache.commit(1, text(0, 20), 13), "holds no pages for 13 tokens"),
        (lambda: cache.commit(1, text(0, 10), 11), "11 tokens named"),
        (lambda: cache.commit(1, text(0, 10), 9), "committed more than 9"),
        (lambda: cache.commit(1, text(0, 10), -1), "committed more than -1"),
    ]:
        with pytest.raises(RequestError, match=message):
            call()
        assert cache.stats() == before and cache.check() == ""


def test_prompts_that_can_never_fit_are_refused_with_the_numbers():
    with pytest.raises(CapacityError, match=r"257 tokens; the cache has 64 pages of 4 tokens and 16 state slots"):
        make().admit(1, "", text(0, 256))
    assert isinstance(make().admit(1, "", text(0, 255)), Admission)
    cache = make()
    cache.admit(1, "", text(0, 5))
    with pytest.raises(CapacityError):
        cache.extend(1, 257)


def test_finish_works_once():
    cache = make()
    cache.admit(1, "", text(0, 10))
    cache.finish(1, text(0, 10), 10)
    with pytest.raises(RequestError, match="not running"):
        cache.finish(1, text(0, 10), 10)
    assert not cache.abort(1)


@pytest.mark.parametrize(("pages", "slots"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_budgets_of_nothing_or_one(pages, slots):
    cache = make(pages=pages, slots=slots)
    if pages and slots:
        run(cache, 1, text(0, 2))
        assert cache.admit(2, "", text(0, 3)).match.state_tokens == 2
    with pytest.raises(CapacityError):
        cache.admit(3, "", text(0, 4))


@pytest.mark.parametrize("change", [{"pages": -1}, {"page_tokens": 1}, {"page_tokens": 129}])
def test_impossible_configurations_are_refused(change):
    with pytest.raises(ConfigError, match="impossible cache"):
        make(**change)


def test_tokens_of_another_type_are_refused():
    strided = np.zeros(8, np.int32)[::2]
    for wrong in (np.zeros(4, np.int64), np.zeros((2, 2), np.int32), np.zeros(4, np.float32), strided, [1, 2]):
        with pytest.raises(TypeError, match="int32 buffer"):
            make().probe("", wrong)


# --- size ------------------------------------------------------------------------------------------------------------


def test_bookkeeping_stays_below_160_bytes_a_page():
    cache = PrefixCache(CacheConfig(pages=20_000, slots=64))
    for request in range(10):
        prompt = np.random.default_rng(request).integers(0, 250_000, 100_000, dtype=np.int32)
        cache.admit(request, "", prompt, (6_000, 99_990))
        cache.finish(request, prompt, len(prompt))
    stats = cache.stats()
    assert 20_000 - stats["pages_free"] > 15_000
    assert stats["bookkeeping_bytes"] / (20_000 - stats["pages_free"]) <= 160
