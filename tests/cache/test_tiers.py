"""The contract of csrc/cache/cache.h where prefixes come and go: another engine's, and host memory."""

import pytest

from tokenspeed.engine.errors import CapacityError, RequestError
from tokenspeed.engine.schedule.cache import Admission, NoRoom, Policy, Reason

from .contract import away, invariants_hold_afterwards, join, make, run, settle, text  # noqa: F401, a fixture

# --- prefixes from elsewhere ------------------------------------------------------------------------------------------


def test_a_prefix_that_was_received_is_matched_like_one_that_was_computed():
    cache = make()
    run(cache, 1, text(0, 8), donate=False)
    prefix = text(0, 14)
    reception = cache.receive(7, "", prefix)
    assert reception.kv_tokens == 8 and len(reception.pages) == 4 and reception.slot >= 0
    longer = join(prefix, text(90, 3))
    before = cache.probe("", longer)
    assert (before.state_tokens, before.pending_tokens, before.reason) == (0, 14, Reason.PENDING)
    cache.received(7)
    cache.release(7)
    admission = cache.admit(2, "", longer)
    assert admission.match.state_tokens == 14 and admission.read_slot == reception.slot
    assert admission.pages.tolist()[:4] == reception.pages.tolist()  # it appends to the last one


def test_a_reception_that_is_released_early_leaves_nothing():
    cache = make()
    before = cache.stats()
    reception = cache.receive(7, "", text(0, 14))
    assert len(reception.pages) == 4
    assert cache.release(7) and not cache.release(7)
    after = cache.stats()
    assert all(after[gauge] == before[gauge] for gauge in ("pages_free", "slots_free", "pinned", "slots_promised"))
    assert cache.probe("", text(0, 20)).kv_tokens == 0


def test_a_reception_is_all_or_nothing():
    cache = make(pages=4, slots=2)
    cache.admit(1, "", text(50, 3))
    assert isinstance(cache.receive(7, "", text(0, 14)), NoRoom)
    assert isinstance(cache.receive(7, "", text(0, 12)).slot, int)
    assert isinstance(cache.receive(8, "", text(100, 1)), NoRoom)
    with pytest.raises(CapacityError):
        cache.receive(9, "", text(0, 17))
    with pytest.raises(RequestError, match="cache is off"):
        make(enabled=False).receive(1, "", text(0, 4))


def test_what_was_received_stays_until_it_is_released():
    cache = make(pages=8, slots=2)
    cache.receive(7, "", text(0, 12))
    cache.received(7)
    assert isinstance(cache.admit(1, "", text(50, 21)), NoRoom)  # six pages, and three are pinned
    assert cache.probe("", text(0, 13)).state_tokens == 12
    cache.release(7)
    assert isinstance(cache.admit(1, "", text(50, 21)), Admission)
    assert cache.probe("", text(0, 13)).state_tokens == 0


def test_what_is_lent_stays_until_it_is_released():
    cache = make(pages=8, slots=2)
    run(cache, 1, text(0, 14))
    loan = cache.lend(7, "", text(0, 14))
    assert (loan.kv_tokens, loan.state_tokens, len(loan.pages)) == (14, 14, 4) and loan.slot >= 0
    assert isinstance(cache.admit(2, "", text(50, 18)), NoRoom)
    assert cache.release(7)
    assert isinstance(cache.admit(2, "", text(50, 18)), Admission)


def test_pages_of_a_sequence_that_runs_are_lent_as_it_commits_them():
    cache = make()
    cache.admit(1, "", text(0, 14), [14])
    cache.commit(1, text(0, 14), 9)
    loan = cache.lend(7, "", text(0, 14))
    assert (loan.kv_tokens, loan.state_tokens, loan.slot) == (8, 0, -1)
    cache.commit(1, text(0, 14), 14)
    assert (cache.lend(8, "", text(0, 14)).kv_tokens, cache.release(7), cache.release(8)) == (14, True, True)


# --- host memory -----------------------------------------------------------------------------------------------------


def test_a_unit_is_saved_before_the_device_lets_it_go():
    cache = make(slots=2, host_pages=32, host_slots=4)
    run(cache, 1, text(0, 10))
    assert cache.take_moves() == ()  # a slot is free
    run(cache, 2, text(300, 10))
    [move] = cache.take_moves()  # of the older one: then there is one that may go
    assert move.out and len(move.sources) == len(move.targets) == 3
    cache.moved(move.number)
    assert cache.take_moves() == ()
    stats = cache.stats()
    assert (stats["moved_out"], stats["moved_out_pages"], stats["host_pages_free"]) == (1, 3, 29)


def test_what_comes_back_is_the_sequences_own_at_once_and_matched_when_it_is_there():
    cache = away(slots=4)
    for request in range(4, 7):
        run(cache, request, text(300 * request, 10))
        settle(cache)
    prompt = join(text(0, 10), text(70, 3))
    match = cache.probe("", prompt)
    assert (match.state_tokens, match.moved_tokens, match.reason) == (10, 10, Reason.NEW_TOKENS)
    admission = cache.admit(9, "", prompt)
    assert admission.move > 0 and len(admission.pages) == 4 and admission.read_slot != admission.write_slot
    with pytest.raises(RequestError, match="waits for what it resumes from"):
        cache.commit(9, prompt, 10)
    assert cache.probe("", prompt).pending_tokens == 10
    [move] = [move for move in cache.take_moves() if not move.out]
    assert move.number == admission.move and move.target == admission.read_slot
    assert set(move.targets) <= set(admission.pages.tolist())
    cache.moved(move.number)
    match = cache.probe("", prompt)
    assert (match.state_tokens, match.moved_tokens, match.pending_tokens) == (10, 0, 0)
    cache.abort(9)


def test_pages_that_stayed_on_the_device_are_not_moved_back():
    cache = away()
    admission = cache.admit(9, "", join(text(0, 10), text(70, 3)))
    assert admission.match.moved_tokens == 10 and admission.match.kv_tokens == 10
    [move] = [move for move in cache.take_moves() if not move.out]
    assert len(move.sources) == 1  # the partly filled page; the two whole ones are there
    cache.moved(move.number)


def test_a_move_out_is_void_where_its_unit_goes_before_it_is_done():
    cache = make(slots=2, host_pages=32, host_slots=4)
    run(cache, 1, text(0, 10))
    run(cache, 2, text(300, 10))
    [move] = cache.take_moves()
    run(cache, 3, text(600, 10))  # takes the slot that is being copied
    assert cache.stats()["moves_void"] == 1 and cache.probe("", text(0, 14)).state_tokens == 0
    assert cache.stats()["host_slots_free"] == 3  # the copy still writes there
    cache.moved(move.number)
    assert cache.stats()["moved_out"] == 0 and cache.stats()["host_slots_free"] == 4
    with pytest.raises(RequestError, match="not under way"):
        cache.moved(move.number)


def test_moving_back_is_refused_where_computing_is_sooner():
    cache = away()
    prompt = join(text(0, 10), text(70, 3))
    cache.set_costs(2, 1, 1)  # 2 + 1 seconds for a page and the slot, 10 to compute
    assert cache.probe("", prompt).moved_tokens == 10
    cache.set_costs(10, 1, 1)
    match = cache.probe("", prompt)
    assert (match.moved_tokens, match.state_tokens, match.reason) == (0, 0, Reason.COMPUTED_SOONER)


def test_host_memory_keeps_what_was_used_last():
    cache = make(slots=2, host_pages=32, host_slots=2, policy=Policy.LRU)
    for request in range(5):
        run(cache, request, text(300 * request, 10))
        settle(cache)
    there = [cache.probe("", text(300 * request, 14)).state_tokens for request in range(5)]
    assert there == [0, 0, 10, 10, 10] and cache.stats()["host_evicted"] > 0  # two on the device, one beside them


def test_clearing_frees_host_memory_too():
    cache = away()
    cache.clear_all()
    stats = cache.stats()
    assert (stats["host_pages_free"], stats["host_slots_free"]) == (32, 4)
