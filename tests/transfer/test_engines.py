"""What was prefilled by another engine is what this one would have computed, whatever happens on the way."""

from random import Random

import pytest
from lab import TOLERANCE, random_model, shipped_model
from lives import live
from pair import LEASE, Pair, held
from texts import text

from tokenspeed.engine.errors import TransferError
from tokenspeed.engine.schedule.scheduler import Leaving, State
from tokenspeed.engine.transfer.messages import Read, Ready
from tokenspeed.engine.transfer.params import RemoteDecode


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("random"))


@pytest.mark.parametrize("tokens", [2, 63, 64, 65, 66, 129, 500])
@pytest.mark.parametrize("n", [1, 3])
def test_a_prompt_that_was_brought_is_computed_nowhere_but_for_its_last_token(model, tokens, n):
    pair = Pair(model)
    talk = pair.decode.ask(text(1, tokens), n=n, temperature=1.0)
    assert pair.decode.difference() <= TOLERANCE
    assert pair.decode.tokens_computed(talk) == 1 and talk.reuse.cached_tokens == tokens - 1
    assert pair.taker.pulled == pair.lender.offered == 1
    (end,) = [update for update in pair.updates["0"] if update.finish_reason]
    assert end.finish_reason == "length" and not any(update.ids or update.text for update in pair.updates["0"])
    pair.settle()


def test_a_prompt_of_one_token_needs_nobody(model):
    pair = Pair(model)
    talk = pair.decode.ask(text(1, 1))
    assert talk.finished and pair.decode.difference() <= TOLERANCE and held(pair.prefill) == {}


@pytest.mark.parametrize("drafts", [0, 3])
def test_drafts_and_their_head_go_on_from_what_was_brought(drafts):
    """The shipped model's MTP head: its keys are in the pages, its last input is in the slot."""
    local = Pair(shipped_model(), drafts=drafts)
    prompt = local.decode.engine.tokenizer.encode("<|im_start|>user\nWhat is 12 plus 30?<|im_end|>\n" * 20)
    talks = [local.decode.submit(prompt[: 200 + 64 * i], max_tokens=24, temperature=0.0) for i in range(3)]
    local.run()
    assert local.decode.difference() <= TOLERANCE and local.taker.pulled == 3
    assert all(local.decode.tokens_computed(talk) == 1 for talk in talks)


def test_pages_are_read_before_the_prefill_has_ended(model):
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    pair.decode.ask(text(1, 1000))
    sent = pair.wire.sent
    last = max(i for i, message in enumerate(sent) if isinstance(message, Ready) and message.state)
    early = [message for message in sent[:last] if isinstance(message, Read)]
    assert sum(part.length for read in early for part in read.parts) >= 10 * pair.decode.memory.layout.page_bytes


def test_only_pages_that_are_lacking_are_brought(model):
    pair = Pair(model)
    first = pair.decode.ask(text(1, 400), max_tokens=70)
    before = pair.wire.pulls.bytes
    pair.decode.ask([*first.history(), *text(2, 100)])
    layout = pair.decode.memory.layout
    known = (len(first.history()) - 1) // 64
    assert pair.wire.pulls.bytes - before == layout.slot_bytes + ((len(first.history()) + 99 + 63) // 64 - known) * (
        layout.page_bytes
    )
    assert pair.decode.difference() <= TOLERANCE and pair.taker.pulled == 2


def test_a_prompt_that_is_known_here_is_not_brought_and_one_that_is_known_there_is_not_computed(model):
    pair = Pair(model)
    prompt = text(1, 300)
    pair.decode.ask(prompt)
    computed = len(pair.prefill.computed)
    pair.decode.ask(prompt)
    pair.settle()
    assert pair.taker.pulled == 1 and pair.taker.failed == 0
    pair.decode.engine.clear_cache()
    pair.decode.ask(prompt)
    assert pair.taker.pulled == 2 and len(pair.prefill.computed) == computed
    assert pair.decode.difference() <= TOLERANCE
    pair.settle()


@pytest.mark.parametrize("who", ["prefill", "decode"])
@pytest.mark.parametrize("when", range(0, 60, 6))
def test_a_request_that_is_aborted_anywhere_leaves_nothing(model, who, when):
    pair = Pair(model, prefill={"max_num_batched_tokens": 64}, seed=when)
    kept, lost = pair.decode.submit(text(1, 300)), pair.decode.submit(text(2, 700))
    for _ in range(when):
        pair.step()
    getattr(pair, who).engine.abort(lost.request.id)
    pair.settle()
    assert kept.finished and lost.finished and pair.decode.difference() <= TOLERANCE
    if who == "prefill":
        assert lost.reasons[0] == "length", "the decoder computes what it was not given"


def test_an_abort_of_the_decoder_ends_the_prefill(model):
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    talk = pair.decode.submit(text(1, 1000))
    while not pair.prefill.computed:
        pair.step()
    pair.decode.engine.abort(talk.request.id)
    pair.settle()
    assert pair.updates["0"][-1].finish_reason == "abort" and pair.lender.offered == 0
    (rows,) = pair.prefill.computed.values()
    assert rows[-1][1] < 999, "nobody wanted the rest"


def test_a_prompt_for_which_there_is_no_room_within_the_lease_is_not_kept_waiting_for(model):
    pair = Pair(model, decode={"slots": 1, "pages": 8, "max_seqs": 2})
    pair._inside = True
    hog = pair.decode.submit(text(9, 10), max_tokens=300)
    pair._inside = False
    while not hog.outputs[0]:
        pair.step()
    talk = pair.decode.submit(text(1, 130), max_tokens=3)
    pair.run(hog)
    assert pair.taker.failed == 1 and pair.lender.stats()["transfer_rooms"] == 0
    pair.settle()
    assert talk.finished and pair.decode.difference() <= TOLERANCE


def length_of(model) -> int:
    """Messages of the lives below."""
    pair = Pair(model, prefill={"max_num_batched_tokens": 64}, seed=3)
    for i in range(2):
        pair.decode.submit(text(i, 70 + 100 * i), n=1 + i, max_tokens=3)
    pair.settle()
    return len(pair.wire.sent)


@pytest.mark.parametrize("who", ["prefiller", "decoder"])
def test_an_engine_that_is_killed_at_any_message_holds_nothing_of_the_other(model, who):
    length = length_of(model)
    assert 20 < length < 120
    for number in range(who == "decoder", length, 2):
        pair = Pair(model, prefill={"max_num_batched_tokens": 64}, seed=3)

        def fault(at: int, message, number=number, wire=pair.wire) -> int:
            if at == number:
                setattr(wire, f"{who}_lives", False)
            return int(at != number)

        pair.wire.fault = fault
        talks = [pair.decode.submit(text(i, 70 + 100 * i), n=1 + i, max_tokens=3) for i in range(2)]
        start = pair.wire.now
        pair.settle()
        assert pair.wire.now - start < 3 * LEASE
        if who == "prefiller":
            assert all(talk.finished for talk in talks) and pair.decode.difference() <= TOLERANCE


def test_messages_that_are_lost_or_come_twice_cost_time_and_nothing_else(model):
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    random = Random(5)
    pair.wire.fault = lambda number, message: random.choice([0, 1, 1, 1, 1, 1, 1, 2])
    for i in range(8):
        pair.decode.submit(text(i, 100 + 50 * i))
    pair.settle()
    assert pair.decode.difference() <= TOLERANCE and pair.taker.pulled > 2


TINY = {"pages": 14, "slots": 4, "max_seqs": 3}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("prefill, decode", [({}, {}), (TINY, {}), ({}, TINY), (TINY, TINY)])
def test_random_lives_through_two_engines(model, seed, prefill, decode):
    """Turns, edits, forks, aborts, lost messages, and in tiny engines sequences that give way."""
    pair = Pair(model, prefill={"max_num_batched_tokens": 96} | prefill, decode=decode, drafts=seed % 2, seed=seed)
    random = Random(seed)
    pair.wire.fault = lambda number, message: 0 if random.random() < 0.005 else 1
    pair.decode.engine.limits = pair.prefill.engine.limits = min(
        pair.decode.engine.limits, pair.prefill.engine.limits, key=lambda limits: limits.max_tokens
    )
    live(pair.decode, seed, turns=10)
    pair.settle()
    assert pair.decode.difference() <= TOLERANCE and not pair.refused
    assert pair.taker.pulled > 2


def test_one_slot_is_enough(model):
    pair = Pair(model, decode={"slots": 1, "pages": 8, "max_seqs": 2})
    talks = [pair.decode.submit(text(i, 130), max_tokens=30) for i in range(3)]
    pair.settle()
    assert all(talk.finished for talk in talks) and pair.decode.difference() <= TOLERANCE


def test_a_sequence_that_gives_way_while_it_is_read_is_read_again(model):
    pair = Pair(model, prefill={"pages": 9, "slots": 3, "max_num_batched_tokens": 65, "max_seqs": 3})
    pair.decode.ask(text(3, 2))
    hog = pair.prefill.submit(text(9, 60), max_tokens=90)  # older than what comes, and about to need a page
    while len(hog.outputs[0]) < 64:
        pair.prefill.engine.step()
    talk = pair.decode.submit(text(1, 440), max_tokens=3)
    epochs = set()
    while not talk.finished:
        pair.step()
        epochs |= {message.epoch for message in pair.wire.sent if isinstance(message, Ready)}
    pair.settle()
    assert pair.prefill.scheduler.preemptions and len(epochs) > 1 and pair.taker.pulled == 2
    assert pair.decode.difference() <= TOLERANCE


def test_a_prefill_whose_cache_was_cleared_is_not_waited_for(model):
    """What it has computed is forgotten, and what its room would name may be another's."""
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    talk = pair.decode.submit(text(1, 640))
    while not any(isinstance(message, Ready) and message.parts for message in pair.wire.sent):
        pair.step()
    pair.prefill.engine.clear_cache()
    while pair.lender.stats()["transfer_rooms"]:
        pair.step()
    assert pair.prefill.engine.has_work, "the decoder waited for the whole prefill"
    pair.settle()
    assert talk.finished and pair.decode.difference() <= TOLERANCE and pair.taker.failed == 1


def test_what_gives_way_is_not_offered_anew_before_it_goes_on(model):
    """A move to it may be under way: it retires when that is done, and then others may take its pages."""
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    offers, offer = [], pair.lender._calls.offer
    pair.lender._calls.offer = lambda *given: offers.append(given) or offer(*given)
    pair.decode.submit(text(1, 640))
    while not (offers and offers[-1][2]):
        pair.prefill.engine.step()
        pair.lender.step()
    (sequence,) = pair.prefill.scheduler.running
    before, sequence.state, sequence.leaving = len(offers), State.RETIRING, Leaving.PREEMPTED
    sequence.preemptions += 1
    pair.lender.step()
    assert len(offers) == before
    sequence.state, sequence.leaving = State.WAITING, None
    pair.lender.step()
    assert offers[-1][2:] == ((), None, 1)


def test_a_name_can_be_used_once(model):
    pair = Pair(model)
    talk = pair.decode.ask(text(1, 100))
    pair.settle()
    again = [update for update in pair.updates["0"] if update.finish_reason]
    assert talk.finished and len(again) == 1
    with pytest.raises(TransferError, match="used once"):
        pair.lender.submit(talk.request, print, RemoteDecode("0"))


@pytest.mark.parametrize("offers", [1, 2, 4, 5])
def test_a_room_that_cannot_be_offered_any_more_costs_a_computation_and_nothing_else(model, offers):
    pair = Pair(model, prefill={"max_num_batched_tokens": 64})
    left, offer = [offers], pair.lender._calls.offer

    def refusing(*args):
        left[0] -= 1
        if left[0] < 0:
            raise TransferError("planted")
        offer(*args)

    pair.lender._calls.offer = refusing
    talk = pair.decode.submit(text(1, 300))
    pair.settle()
    assert left[0] < 0 and talk.finished and pair.decode.difference() <= TOLERANCE
    assert pair.taker.failed == 1 and pair.lender.offered == 0 and not pair.lender.lends
    assert pair.updates["0"][-1].finish_reason == "length", "the prefill goes on"


def test_a_known_prompt_that_cannot_be_offered_is_refused_and_given_back(model):
    pair = Pair(model)
    pair.decode.ask(text(1, 300))
    pair.settle()
    pair.decode.engine.clear_cache()
    offer = pair.lender._calls.offer

    def refusing(room, digest, pages, slot, epoch):
        if slot is not None:
            raise TransferError("planted")
        offer(room, digest, pages, slot, epoch)

    pair.lender._calls.offer = refusing
    talk = pair.decode.ask(text(1, 300))
    pair.settle()
    assert [str(error) for error in pair.refused] == ["planted"] and not pair.lender.lends
    assert talk.finished and pair.taker.failed == 1 and pair.decode.difference() <= TOLERANCE
