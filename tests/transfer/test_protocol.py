"""The protocol between two engines, message by message."""

import threading

import pytest
import torch
from wire import ADDRESS, IDENTITY, LEASE, PAGE_BYTES, PEER, SLOT_BYTES, Wire

from tokenspeed.engine.errors import HandshakeError, TransferError
from tokenspeed.engine.transfer import cuda_ipc
from tokenspeed.engine.transfer.messages import (
    MAX_READ_BYTES,
    VERSION,
    Ask,
    Closed,
    Data,
    Done,
    Gone,
    Hello,
    Identity,
    Leave,
    OtherVersion,
    Part,
    Read,
    Ready,
    Stranger,
    Welcome,
    decode_from_decoder,
    encode,
)
from tokenspeed.engine.transfer.pull import Targets

PAGES, SLOT = (3, 4, 5, 9, 1), 2
TARGETS = Targets({1: 7, 2: 2, 3: 3, 4: 11}, 1)  # page 0 is there already


def started(wire: Wire, targets: Targets = TARGETS) -> Wire:
    wire.pulls.pull(wire.source("room"), lambda: targets)
    return wire


def test_pages_are_read_while_later_ones_are_computed_and_only_those_that_are_lacking():
    wire = started(Wire())
    wire.run()
    for count in (2, 3):
        wire.rooms.offer("room", b"prompt", PAGES[:count], None, 0)
        wire.run()
    before = wire.pulls.take_ended()
    read = [part for message in wire.sent if isinstance(message, Read) for part in message.parts]
    size = wire.there.row_bytes[0]
    assert [part.offset // size for part in read] == [PAGES[1], PAGES[2]] and not before
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run()
    assert wire.pulls.take_ended() == [("room", None)] and wire.rooms.take_ended() == [("room", None)]
    assert wire.arrived(TARGETS, PAGES, SLOT)
    assert wire.pulls.bytes == 4 * size + wire.there.row_bytes[1]


def test_a_room_that_was_complete_before_it_was_asked_for_is_read_just_so():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire).run()
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)


def test_nothing_is_read_before_there_is_a_place_and_the_first_that_asked_gets_it_first():
    wire, free, asked = Wire(), [], []

    def reserve(name: str):
        asked.append(name)
        return free.pop() if free else None

    for name in ("a", "b"):
        wire.rooms.offer(name, b"prompt", PAGES, SLOT, 0)
        wire.pulls.pull(wire.source(name), lambda name=name: reserve(name))
    wire.run(LEASE / 2)
    assert set(asked) == {"a"} and not any(isinstance(message, Read) for message in wire.sent)
    free += [Targets({}, 3), TARGETS]
    wire.run()
    assert [name for name, _ in wire.pulls.take_ended()] == ["a", "b"] and wire.arrived(TARGETS, PAGES, SLOT)


def test_pages_that_were_taken_back_are_read_again():
    wire = started(Wire())
    wire.rooms.offer("room", b"prompt", (3, 4), None, 0)
    wire.run()
    wire.there.flat[0].random_(0, 256, generator=torch.Generator().manual_seed(5))  # somebody else's now
    wire.rooms.offer("room", b"prompt", (), None, 1)
    wire.run()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 1)
    wire.run()
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)


def messages_of_a_transfer() -> list:
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES[:3], None, 0)
    started(wire).run()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run()
    assert wire.pulls.take_ended()[0].error is None
    return wire.sent


MESSAGES = messages_of_a_transfer()


def test_the_messages_whose_loss_is_tried_are_all_that_a_transfer_has():
    kinds = {type(message).__name__ for message in MESSAGES}
    assert kinds == {"Hello", "Welcome", "Ask", "Ready", "Read", "Data", "Done", "Closed"} and len(MESSAGES) < 40


@pytest.mark.parametrize("number", range(len(MESSAGES)))
@pytest.mark.parametrize("who", ["prefiller", "decoder", "message", "twice"])
def test_whatever_is_lost_at_any_message_both_sides_end_within_their_leases(number, who):
    """A peer that dies before a message goes out, a message that is lost, and one that comes twice."""
    wire = Wire()

    def fault(at: int, message) -> int:
        if at != number:
            return 1
        if who == "prefiller":
            wire.prefiller_lives = False
        if who == "decoder":
            wire.decoder_lives = False
        return 2 if who == "twice" else 0

    wire.fault = fault
    wire.rooms.offer("room", b"prompt", PAGES[:3], None, 0)
    started(wire).run()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run(2 * LEASE + 1)
    pulled, ended = wire.pulls.take_ended(), wire.rooms.take_ended()
    if wire.decoder_lives:
        assert len(pulled) == 1 and not wire.pulls.open, "the decoder waits for ever"
        if pulled[0].error is None:
            assert wire.arrived(TARGETS, PAGES, SLOT), "what is usable is not what was offered"
    if wire.prefiller_lives:
        assert len(ended) == 1 and not wire.rooms.open, "the prefiller waits for ever"
    if who == "twice":
        assert pulled[0].error is None and ended[0].error is None
    if who == "message" and not isinstance(MESSAGES[number], Closed):
        assert pulled[0].error is None, "one lost message does not lose the transfer"


def test_a_cancelled_pull_is_not_written_for_and_the_prefiller_hears_of_it():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire)
    before = [flat.clone() for flat in wire.here.flat]
    wire.fault = lambda number, message: wire.pulls.cancel("room") or 1 if isinstance(message, Data) else 1
    wire.run()
    assert all(torch.equal(*pair) for pair in zip(wire.here.flat, before, strict=True))
    assert wire.pulls.take_ended() == [] and "left" in str(wire.rooms.take_ended()[0].error)


def test_what_had_ended_when_it_was_cancelled_is_no_news_of_the_next_of_its_name():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire).run()
    wire.pulls.cancel("room")
    wire.rooms.close("room", "not wanted")
    started(wire)
    assert wire.pulls.take_ended() == wire.rooms.take_ended() == []


@pytest.mark.parametrize("own", [LEASE / 8, 8 * LEASE])
@pytest.mark.parametrize("slow", ["prefill", "decoder"])
def test_the_lease_of_who_prefills_counts_for_both(own, slow):
    """Whoever waits says so often enough for the other, and nothing is read again for it."""
    wire, free = Wire(), [TARGETS] if slow == "prefill" else []
    wire.pulls._lease = own
    wire.pulls.pull(wire.source("room"), lambda: free.pop() if free else None)
    if slow == "prefill":
        wire.rooms.offer("room", b"prompt", PAGES[:2], None, 0)
    else:
        wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    for _ in range(60):
        wire.run(1.0)
        assert wire.rooms.take_ended() == wire.pulls.take_ended() == []
    free.append(TARGETS)
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run(1.0)
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)
    assert wire.pulls.bytes == 4 * wire.there.row_bytes[0] + wire.there.row_bytes[1]


@pytest.mark.parametrize("lease", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_that_is_none_is_refused(lease):
    wire = started(Wire())
    wire.pulls.tick()
    wire.pulls.handle(ADDRESS, Welcome("prefill-engine", lease))
    assert "has a lease of" in str(wire.pulls.take_ended()[0].error)


def test_an_engine_that_stands_still_is_not_waited_for():
    """Though its wire goes on."""
    wire = started(Wire())
    wire.rooms.offer("room", b"prompt", PAGES[:2], None, 0)
    wire.run(3 * LEASE)
    assert "nothing was heard" in str(wire.pulls.take_ended()[0].error)


def test_a_cancel_waits_for_what_is_being_written():
    wire, left = Wire(), []
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire)
    write = wire.here.write

    def slow(moves, data) -> None:
        if not left:
            left.append(threading.Thread(target=wire.pulls.cancel, args=("room",)))
            left[0].start()
            left[0].join(0.1)
            assert left[0].is_alive(), "what is written now may be somebody else's"
        write(moves, data)

    wire.here.write = slow
    wire.run()
    left[0].join(5)
    assert not left[0].is_alive() and wire.pulls.take_ended() == []


def test_a_room_is_not_closed_for_who_has_read_what_was_taken_back():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES[:2], None, 0)
    wire.rooms.handle(PEER, Hello("decode-engine", IDENTITY))
    wire.rooms.handle(PEER, Ask("room", b"prompt"))
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 1)
    (reply,) = wire.rooms.handle(PEER, Done("room", 0))
    assert isinstance(reply.message, Ready) and reply.message.epoch == 1 and wire.rooms.open == 1
    (reply,) = wire.rooms.handle(PEER, Done("room", 1))
    assert reply.message == Closed("room") and wire.rooms.open == 0


def test_a_room_that_the_engine_closes_ends_its_pull():
    wire = started(Wire())
    wire.rooms.offer("room", b"prompt", PAGES[:2], None, 0)
    wire.run()
    wire.rooms.close("room", "the request was aborted")
    wire.run()
    assert "the request was aborted" in str(wire.pulls.take_ended()[0].error)
    assert wire.rooms.take_ended() == [], "who has closed it knows"


def test_names_can_be_used_once():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire).run()
    wire.rooms.take_ended()
    with pytest.raises(TransferError, match="'room' is over"):
        wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    started(wire).run()
    assert "the decoder has it" in str(wire.pulls.take_ended()[-1].error)


def test_the_name_of_a_room_does_not_give_another_prompts_state():
    wire = Wire()
    wire.rooms.offer("room", b"another", PAGES, SLOT, 0)
    started(wire).run()
    assert "another prompt" in str(wire.pulls.take_ended()[0].error) and not wire.rooms.open


def test_a_second_decoder_gets_nothing_and_the_first_one_all():
    wire = started(Wire())
    wire.run()
    wire.rooms.handle(b"other", Hello("other", IDENTITY))
    (reply,) = wire.rooms.handle(b"other", Ask("room", b"prompt"))
    assert isinstance(reply.message, Gone)
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run()
    assert wire.pulls.take_ended() == [("room", None)]


@pytest.mark.parametrize(
    "part",
    [
        Part(0, 0, 700),
        Part(0, 3 * 700, 3 * 700 + 1),
        Part(0, -700, 700),
        Part(0, 3 * 700, 0),
        Part(1, 0, 1),
        Part(2, 0, 1),
        Part(0, 2**62, 1),
        Part(1, 2 * 3_000_000, MAX_READ_BYTES + 1),
    ],
)
def test_nothing_beside_what_a_room_offers_is_read(part):
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.rooms.handle(PEER, Hello("decode-engine", IDENTITY))
    wire.rooms.handle(PEER, Ask("room", b"prompt"))
    (reply,) = wire.rooms.handle(PEER, Read("room", 0, 1, (part,)))
    assert isinstance(reply.message, Gone) and reply.data is None
    (reply,) = wire.rooms.handle(PEER, Read("room", 0, 2, (Part(0, 3 * 700, 3 * 700),)))
    assert reply.data == bytes(wire.there.flat[0][3 * 700 : 6 * 700].numpy())


def test_who_has_not_said_hello_is_a_stranger_and_is_greeted_anew():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    (reply,) = wire.rooms.handle(PEER, Ask("room", b"prompt"))
    assert reply.message == Stranger()
    started(wire)
    forgotten = []

    def fault(number: int, message) -> int:
        if isinstance(message, Ready) and not forgotten:
            forgotten.append(wire.rooms._peers.clear())
        return 1

    wire.fault = fault
    wire.run(LEASE)
    assert forgotten
    assert wire.pulls.take_ended() == [("room", None)] and wire.arrived(TARGETS, PAGES, SLOT)


@pytest.mark.parametrize("field", Identity.__struct_fields__)
def test_another_identity_is_refused_with_both_values(field):
    theirs = {name: getattr(IDENTITY, name) for name in Identity.__struct_fields__}
    value = theirs[field]
    other = {int: lambda: value + 1, str: lambda: "other", tuple: lambda: (2, 1) if field == "ranks" else ()}
    theirs[field] = other[type(value)]()
    wire = Wire(identity=Identity(**theirs))
    started(wire)
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.run()
    (ended,) = wire.pulls.take_ended()
    error = ended.error
    assert isinstance(error, HandshakeError) and error.field == field
    assert error.ours == str(theirs[field]) and error.theirs == str(value)
    assert error.ours in str(error) and error.theirs in str(error) and field in str(error)


def test_another_engine_than_the_one_that_was_named_is_refused():
    wire = Wire()
    wire.rooms.offer("room", b"prompt", PAGES, SLOT, 0)
    wire.pulls.pull(wire.source("room", engine="the one before"), lambda: TARGETS)
    wire.run()
    assert "the one before" in str(wire.pulls.take_ended()[0].error)


def test_another_version_is_named_and_what_is_no_message_refused():
    frame = encode(Done("room", 1))
    assert decode_from_decoder(frame) == Done("room", 1)
    with pytest.raises(OtherVersion, match=f"version {VERSION + 1} .* version {VERSION}"):
        decode_from_decoder(bytes([VERSION + 1]) + frame[1:])
    for wrong in (frame[:-1], frame[:1] + b"\xc1", encode(Gone("room", "x")), frame[:1] + b"\x91" * 10_000):
        with pytest.raises(TransferError):
            decode_from_decoder(wrong)


@pytest.mark.parametrize("handles", [(b"x",), (b"x", b"y"), (b"x",) * 3])
def test_handles_that_are_none_end_what_is_pulled_from_there(handles):
    wire = started(Wire())
    wire.pulls._map = lambda found: cuda_ipc.map_arenas(wire.here, found)
    wire.pulls.tick()
    wire.pulls.handle(ADDRESS, Welcome("prefill-engine", LEASE, handles))
    ((room, error),) = wire.pulls.take_ended()
    assert room == "room" and isinstance(error, TransferError) and "handle" in str(error)


@pytest.mark.parametrize(
    "parts, state",
    [
        ((Part(0, 0, 1 << 60),), None),
        ((Part(0, 0, PAGE_BYTES - 1),), None),
        ((Part(0, 0, 0),), None),
        ((Part(1, 0, PAGE_BYTES),), None),
        ((), Part(1, 0, 2 * SLOT_BYTES)),
        ((), Part(0, 0, SLOT_BYTES)),
        ((), Part(1, (1 << 64) - 1, SLOT_BYTES)),  # whose end no message could name
        ((Part(0, -PAGE_BYTES, PAGE_BYTES),), None),
    ],
)
def test_what_is_no_page_and_no_state_is_not_read(parts, state):
    wire = started(Wire())
    wire.rooms.offer("room", b"prompt", (), None, 0)
    wire.run()
    wire.pulls.handle(ADDRESS, Ready("room", 0, 0, parts, state))
    ((_, error),) = wire.pulls.take_ended()
    assert isinstance(error, TransferError) and "offers" in str(error)
    assert not any(isinstance(message, Read) for message in wire.sent)


def test_a_copy_that_fails_ends_its_pull_and_nothing_is_called_done():
    wire = started(Wire())
    wire.pulls._map = lambda handles: [flat[:PAGE_BYTES] for flat in wire.there.flat]  # less than what is offered
    wire.pulls.tick()
    wire.pulls.handle(ADDRESS, Welcome("prefill-engine", LEASE, (b"x", b"y")))
    wire.pulls.handle(ADDRESS, Ready("room", 0, 0, wire.there.rows(0, PAGES), wire.there.rows(1, [SLOT])[0]))
    wire.pulls.reserve()
    wire.pulls.tick()
    ((_, error),) = wire.pulls.take_ended()
    assert "cannot be copied" in str(error) and not any(isinstance(message, Done) for message in wire.sent)


def test_pulls_are_gone_through_under_their_lock():
    """The engine's thread starts and cancels some meanwhile."""
    wire = started(Wire())
    wire.run()

    class Watched(dict):
        def values(self):
            assert wire.pulls._lock.locked()
            return super().values()

    wire.pulls._pulls = Watched(wire.pulls._pulls)
    assert wire.pulls.drop_idle() == {ADDRESS}
    wire.pulls.cancel("room")
    assert wire.pulls.drop_idle() == set()


def test_after_the_end_nothing_is_begun():
    wire = started(Wire())
    wire.rooms.offer("room", b"prompt", PAGES, None, 0)
    wire.run()
    end = TransferError("the end")
    wire.rooms.forget(end)
    wire.pulls.forget(end)
    assert [(reply.peer, reply.message) for reply in wire.rooms.parting()] == [(PEER, Gone("room", "the end"))]
    wire.pulls.part()
    assert wire.sent[-1] == Leave("room")
    for begin in (lambda: wire.rooms.offer("other", b"", (), None, 0), lambda: wire.pulls.pull(wire.source("a"), None)):
        with pytest.raises(TransferError, match="the end"):
            begin()
