"""Random lives of sequences: the cache answers as the naive model of its contract does, call by call."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.cache.naive import Naive
from tokenspeed.engine.errors import RequestError
from tokenspeed.engine.schedule.cache import CacheConfig, NoRoom, Policy, PrefixCache

PAGE = 8
TEXT = st.lists(st.integers(0, 1), max_size=20)
NAMES = st.sampled_from(["", "", "", "other"])


def array(values) -> np.ndarray:
    return np.array(values, np.int32)


class CacheLife(RuleBasedStateMachine):
    @initialize(
        slots=st.sampled_from([1, 2, 2, 3, 3, 4, 7]),
        grid=st.sampled_from([0, 0, 5]),
        log=st.sampled_from([3, 1000]),
        host=st.sampled_from([0, 2, 6, 6]),
    )
    def start(self, slots, grid, log, host):
        shape = {
            "pages": 4096,
            "slots": slots,
            "host_pages": 4096,
            "host_slots": host,
            "page_tokens": PAGE,
            "ghost_nodes": 1 << 20,
            "grid_tokens": grid,
        }
        self.cache = PrefixCache(CacheConfig(**shape, policy=Policy.LRU))
        self.cache.log_events(log)
        self.blocks = {}  # as a listener to the log knows them: block -> (name space, tokens up to its end)
        self.model = Naive(PAGE, slots, grid, host)
        self.moves = {}  # under way: number -> None for a move out, its sequence for one back
        self.waits = {}  # by number, the sequences whose move was not taken yet
        self.transfers = {}  # id -> whether its bytes are still on their way
        self.history = [()]
        self.next = 1

    def sequences(self) -> list[int]:
        arrived = {id for id, sequence in self.model.running.items() if not sequence.coming}
        return sorted(arrived - self.transfers.keys())

    def running(self, index: int) -> int:
        return self.sequences()[index % len(self.sequences())]

    @rule(name=NAMES, past=st.integers(0, 50), keep=st.integers(0, 60), new=TEXT, at=st.lists(st.integers(-1, 60)))
    def admit(self, name, past, keep, new, at):
        self.enter(name, (*self.history[past % len(self.history)][:keep], *new), at, False)

    @rule(past=st.integers(0, 50), new=TEXT)
    def continue_something(self, past, new):
        self.enter("", (*self.history[past % len(self.history)], *new), [], False)

    @rule(turns=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=6))
    def converse(self, turns):
        for past, tokens in turns:
            request = self.next
            self.enter("", (*self.history[-1 - past % len(self.history)], *range(tokens)), [], False)
            if request in self.model.running:
                self.take_moves()
                self.settle()
                sequence = self.model.running[request]
                sequence.launched = len(sequence.tokens)
                self.end(request, True)

    @rule(name=NAMES, past=st.integers(0, 50), new=TEXT)
    def admit_with_prompt_logprobs(self, name, past, new):
        self.enter(name, (*self.history[past % len(self.history)], *new), [], True)

    def enter(self, name, prompt, boundaries, prompt_logprobs):
        if not prompt or len(prompt) > 200:
            return
        self.take_moves()
        if len(prompt) % 3:  # mostly they are done by then
            self.settle()
        request, self.next = self.next, self.next + 1
        probed = self.cache.probe(name, array(prompt), prompt_logprobs=prompt_logprobs)
        expected = self.model.match(name, prompt, prompt_logprobs)
        assert {field: getattr(probed, field) for field in expected} == expected
        admission = self.cache.admit(request, name, array(prompt), boundaries, prompt_logprobs=prompt_logprobs)
        assert (self.model.admit(request, name, prompt, boundaries, prompt_logprobs) is None) == (
            isinstance(admission, NoRoom)
        )
        if isinstance(admission, NoRoom):
            return
        sequence = self.model.running[request]
        sequence.pages = admission.pages.tolist()
        sequence.working.id = admission.write_slot
        for count, slot in admission.snapshots:
            sequence.promised[count].id = slot
        assert (admission.move > 0) == (sequence.coming is not None)
        if sequence.coming:
            self.waits[admission.move] = request
            assert (admission.read_slot != admission.write_slot) == (sequence.source is not None)
            if sequence.source:
                sequence.source.id = admission.read_slot
            with pytest.raises(RequestError, match="waits for what it resumes from"):
                self.cache.abort(request)
        resume = expected["state_tokens"]
        assert [count for count, _ in admission.snapshots] == [
            count for count in sorted(sequence.promised) if count > resume
        ]
        if sequence.coming:
            return
        shared = expected["kv_tokens"] // PAGE
        pages = [self.model.kv[name, prompt[: (i + 1) * PAGE]] for i in range(shared)]
        assert sequence.pages[:shared] == pages
        assert (admission.read_slot == admission.write_slot) == (
            sequence.source is None and expected["state_tokens"] > 0
        )

    @precondition(lambda self: self.sequences())
    @rule(index=st.integers(0, 99), more=st.integers(1, 25), new=TEXT, reconciled=st.integers(0, 100))
    def compute(self, index, more, new, reconciled):
        request = self.running(index)
        sequence = self.model.running[request]
        if sequence.launched == sequence.prompt or len(sequence.tokens) > sequence.prompt:
            sequence.tokens += new
        sequence.launched = min(sequence.launched + more, len(sequence.tokens))
        sequence.pages += self.cache.extend(request, len(sequence.tokens))
        count = sequence.committed + (sequence.launched - sequence.committed) * reconciled // 100
        self.cache.commit(request, array(sequence.tokens), count)
        self.model.commit(request, count)

    @precondition(lambda self: self.sequences())
    @rule(index=st.integers(0, 99), donate=st.booleans())
    def finish(self, index, donate):
        self.end(self.running(index), donate)

    def end(self, request, donate):
        sequence = self.model.running[request]
        self.history.append(tuple(sequence.tokens))
        self.cache.finish(request, array(sequence.tokens), sequence.launched, donate=donate)
        self.model.finish(request, donate)

    @precondition(lambda self: self.sequences())
    @rule(index=st.integers(0, 99))
    def abort(self, index):
        request = self.running(index)
        assert self.cache.abort(request) and not self.cache.abort(request)
        del self.model.running[request]

    @precondition(lambda self: self.sequences())
    @rule(index=st.integers(0, 99))
    def fork(self, index):
        request = self.running(index)
        parent = self.model.running[request]
        if parent.launched < parent.prompt or parent.launched == parent.resume:
            return
        child, self.next = self.next, self.next + 1
        made = self.cache.fork(request, child, array(parent.tokens), parent.launched)
        assert self.model.fork(request, child) != isinstance(made, NoRoom)
        if not isinstance(made, NoRoom):
            self.model.running[child].pages = made.child.pages.tolist()
            self.model.running[child].working.id, parent.working.id = made.child.write_slot, made.parent_write

    @rule(name=NAMES, past=st.integers(0, 50), keep=st.integers(0, 60), new=TEXT)
    def receive(self, name, past, keep, new):
        prefix = (*self.history[past % len(self.history)][:keep], *new)
        if not prefix:
            return
        request, self.next = self.next, self.next + 1
        shared = self.model.match(name, (*prefix, -1), True)["kv_tokens"]
        reception = self.cache.receive(request, name, array(prefix))
        assert self.model.receive(request, name, prefix) != isinstance(reception, NoRoom)
        if not isinstance(reception, NoRoom):
            self.transfers[request] = True
            assert reception.kv_tokens == shared and len(reception.pages) == -(-len(prefix) // PAGE)
            self.model.running[request].pages = reception.pages.tolist()
            self.model.running[request].promised[len(prefix)].id = reception.slot

    @precondition(lambda self: True in self.transfers.values())
    @rule(index=st.integers(0, 99))
    def received(self, index):
        coming = sorted(id for id, comes in self.transfers.items() if comes)
        request = coming[index % len(coming)]
        self.cache.received(request)
        self.model.received(request)
        self.transfers[request] = False

    @rule(name=NAMES, past=st.integers(0, 50), keep=st.integers(0, 60), new=TEXT)
    def lend(self, name, past, keep, new):
        prefix = (*self.history[past % len(self.history)][:keep], *new)
        if not prefix:
            return
        request, self.next = self.next, self.next + 1
        loan = self.cache.lend(request, name, array(prefix))
        assert (loan.kv_tokens, loan.state_tokens) == self.model.lend(request, name, prefix)
        assert len(loan.pages) == -(-loan.kv_tokens // PAGE) and (loan.slot >= 0) == (loan.state_tokens > 0)
        self.transfers[request] = False

    @precondition(lambda self: self.transfers)
    @rule(index=st.integers(0, 99))
    def release(self, index):
        request = sorted(self.transfers)[index % len(self.transfers)]
        assert self.cache.release(request) and not self.cache.release(request)
        del self.model.running[request], self.transfers[request]

    @rule()
    def take_moves(self):
        for move in self.cache.take_moves():
            self.moves[move.number] = None if move.out else self.waits.pop(move.number)
            if move.out:
                self.model.move_out(move.number, move.source)

    @precondition(lambda self: self.moves)
    @rule(index=st.integers(0, 99))
    def moved(self, index):
        self.done(sorted(self.moves)[index % len(self.moves)])

    def done(self, number):
        request = self.moves.pop(number)
        self.cache.moved(number)
        self.model.moved_out(number) if request is None else self.model.moved_in(request)

    @rule(name=NAMES)
    def clear(self, name):
        self.cache.clear(name)
        self.model.clear(name)

    @rule()
    def clear_all(self):
        self.cache.clear_all()
        self.model.clear_all()
        assert self.cache.clear_all() == self.cache.stats()["namespaces"] == 0

    @invariant()
    def holds(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.check() == ""
        stats = self.cache.stats()
        assert stats["slots_free"] == self.model.free()
        assert stats["slots_snapshot"] == sum(snapshot.slot is not None for snapshot in self.model.snapshots.values())
        assert stats["host_slots_free"] == self.model.host_free()
        assert stats["moves_under_way"] == len(self.moves) + len(self.waits)
        assert stats["slots_promised"] == self.model.promises()
        waiting = sum(sequence.coming is not None for sequence in self.model.running.values())
        assert stats["running"] == len(self.sequences()) + waiting and stats["pinned"] == len(self.transfers)
        for kind, *what in self.cache.drain_events():
            if kind == "cleared":
                self.blocks.clear()
            elif kind == "removed":
                del self.blocks[what[0]]
            else:
                block, parent, name, tokens = what
                name, before = (name, ()) if parent is None else self.blocks[parent]
                assert block not in self.blocks and len(tokens) == PAGE
                self.blocks[block] = name, (*before, *tokens)
        matchable = [key for key in self.model.kv if " cleared " not in key[0]]
        assert sorted(self.blocks.values()) == sorted(matchable)

    def settle(self):
        while self.moves:
            self.done(min(self.moves))

    def teardown(self):
        if hasattr(self, "cache"):
            self.take_moves()
            self.settle()
        for request in list(self.model.running) if hasattr(self, "cache") else []:
            assert (self.cache.release if request in self.transfers else self.cache.abort)(request)
        if hasattr(self, "cache"):
            assert self.cache.check() == ""
            stats = self.cache.stats()
            assert stats["pages_held"] == 0
            assert stats["slots_free"] + stats["slots_snapshot"] == self.model.slots


CacheLife.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestCacheLife = CacheLife.TestCase
