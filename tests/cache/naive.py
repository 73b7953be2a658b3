"""The contract again, written for clarity alone: prefixes are tuples, every search looks at everything.

Pages are assumed ample and ghosts unlimited, slots go by LRU, and moves cost nothing, so every answer of the real cache
is determined; but which snapshots it saves to host memory, and when, this model is told.
"""

from dataclasses import dataclass, field
from itertools import takewhile

from tokenspeed.engine.schedule.cache import Reason

Prefix = tuple[int, ...]


class Slot:
    """Compared by identity: two sequences that hold the same object use the same slot. id: what the cache calls it."""

    id: int = -1


@dataclass(eq=False)
class Snapshot:
    slot: Slot | None  # on the device
    used: int
    host: bool = False  # in host memory
    move: int = 0  # on its way there


@dataclass
class Sequence:
    name: str
    tokens: list[int]
    prompt: int
    resume: int
    launched: int
    committed: int
    working: Slot | None  # None: a prefix that comes from elsewhere or is lent
    source: Slot | None = None  # read in the first step
    coming: Snapshot | None = None  # what it resumes from is on its way back from host memory
    promised: dict[int, Slot] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    leaves_nothing: bool = False  # its namespace was cleared


class Naive:
    def __init__(self, page_tokens: int, slots: int, grid_tokens: int = 0, host_slots: int = 0):
        self.page, self.slots, self.grid, self.host_slots = page_tokens, slots, grid_tokens, host_slots
        self.outgoing: dict[int, Snapshot | None] = {}  # by the move's number; None: void
        self.running: dict[int, Sequence] = {}
        self.known: set[tuple[str, Prefix]] = set()  # token strings that were seen
        self.kv: dict[tuple[str, Prefix], int] = {}  # published whole pages -> page id
        self.snapshots: dict[tuple[str, Prefix], Snapshot] = {}
        self.lost: set[tuple[str, Prefix]] = set()
        self.clock = self.cleared = 0

    # --- what is held

    def holders(self) -> list[Slot]:
        held = [snapshot.slot for snapshot in self.snapshots.values()]
        for sequence in self.running.values():
            held += [sequence.working, *sequence.promised.values(), sequence.source]
        return [slot for slot in held if slot]

    def free(self) -> int:
        return self.slots - len(set(self.holders()))

    def evict(self) -> bool:
        """Drops the snapshot that was used longest ago and that nobody reads."""
        held = self.holders()
        idle = [key for key, snapshot in self.snapshots.items() if held.count(snapshot.slot) == 1]
        if not idle:
            return False
        self.leave(min(idle, key=lambda key: self.snapshots[key].used))
        return True

    def leave(self, key: tuple[str, Prefix]) -> None:
        """A snapshot goes from the device."""
        snapshot = self.snapshots[key]
        self.make_void(snapshot)
        snapshot.slot = None
        if not snapshot.host:
            del self.snapshots[key]
            self.lost.add(key)

    # --- host memory

    def make_void(self, snapshot: Snapshot) -> None:
        if snapshot.move:
            self.outgoing[snapshot.move], snapshot.move = None, 0

    def host_free(self) -> int:
        read = [sequence.coming for sequence in self.running.values() if sequence.coming]
        return self.host_slots - len({*read, *(s for s in self.snapshots.values() if s.host)}) - len(self.outgoing)

    def move_out(self, number: int, slot: int) -> None:
        """The cache saves what is in a slot of the device. It makes room for that by what was used longer ago."""
        [snapshot] = [s for s in self.snapshots.values() if s.slot and s.slot.id == slot]
        assert not snapshot.host and not snapshot.move
        if not self.host_free():
            read = [sequence.coming for sequence in self.running.values()]
            idle = [key for key, s in self.snapshots.items() if s.host and s not in read]
            oldest = min(idle, key=lambda key: self.snapshots[key].used)
            assert self.snapshots[oldest].used < snapshot.used
            self.snapshots[oldest].host = False
            if not self.snapshots[oldest].slot:
                del self.snapshots[oldest]
                self.lost.add(oldest)
        snapshot.move, self.outgoing[number] = number, snapshot

    def moved_out(self, number: int) -> None:
        if snapshot := self.outgoing.pop(number):
            snapshot.host, snapshot.move = True, 0

    def moved_in(self, request: int) -> None:
        sequence = self.running[request]
        sequence.coming = None
        self.commit(request, sequence.resume)

    def promises(self) -> int:
        return sum(len(sequence.promised) for sequence in self.running.values())

    def is_promised(self, name: str, prefix: Prefix) -> bool:
        return any(
            sequence.name == name and tuple(sequence.tokens[:count]) == prefix
            for sequence in self.running.values()
            for count in sequence.promised
        )

    # --- matching

    def match(self, name: str, prompt: Prefix, prompt_logprobs: bool) -> dict:
        length, cap = len(prompt), len(prompt) - 1

        def common(other: Prefix) -> int:
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, other, strict=False)))

        known = max((common(text) for space, text in self.known if space == name), default=0)
        kept = {n: self.snapshots[name, prompt[:n]] for n in range(1, length) if (name, prompt[:n]) in self.snapshots}
        device = max((n for n in kept if kept[n].slot), default=0)
        state = max(kept, default=0)
        least = max(device + 1, state)
        pending = max((n for n in range(least, length) if self.is_promised(name, prompt[:n])), default=0)
        lost = any((name, prompt[:n]) in self.lost for n in range(state + 1, length))
        whole = (name, prompt) in self.snapshots
        if prompt_logprobs:
            state = device = pending = 0
        shared = max((n for n in range(self.page, cap + 1, self.page) if (name, prompt[:n]) in self.kv), default=0)
        if known == 0:
            reason = Reason.COLD
        elif prompt_logprobs:
            reason = Reason.PROMPT_LOGPROBS
        elif state == cap and known == length:
            reason = Reason.WHOLE_PROMPT_KNOWN
        elif state == min(known, cap):
            reason = Reason.NEW_TOKENS
        elif pending:
            reason = Reason.PENDING
        elif lost:
            reason = Reason.SNAPSHOT_EVICTED
        else:
            reason = Reason.WHOLE_PROMPT_KNOWN if whole else Reason.NO_SNAPSHOT
        return {
            "known_tokens": known,
            "kv_tokens": max(state, shared),
            "state_tokens": state,
            "moved_tokens": state - device,
            "pending_tokens": pending,
            "reason": reason,
        }

    # --- a sequence's life

    def admit(
        self, request: int, name: str, prompt: Prefix, boundaries: list[int], prompt_logprobs: bool
    ) -> dict | None:
        match = self.match(name, prompt, prompt_logprobs)
        resume = match["state_tokens"]
        key = (name, prompt[:resume])
        sequence = Sequence(name, list(prompt), len(prompt), resume, resume, resume, Slot())
        if match["moved_tokens"]:
            sequence.coming = self.snapshots[key]
        elif resume:
            sequence.source = self.snapshots[key].slot
        self.running[request] = sequence  # pins its source; its own slot is one too many until there is room
        if self.free() < 0 and not self.evict():
            if not sequence.source or self.holders().count(sequence.source) > 2:
                del self.running[request]
                return None
            self.leave(key)
            sequence.working, sequence.source = sequence.source, None
        elif resume:
            self.clock += 1
            self.snapshots[key].used = self.clock
        if sequence.coming and not self.is_promised(*key) and self.may_promise() and (self.free() or self.evict()):
            sequence.source = sequence.promised[resume] = Slot()
        self.known.add((name, prompt[: len(prompt) // self.page * self.page]))
        self.promise_snapshots(sequence, boundaries, match["known_tokens"])
        return match

    def may_promise(self) -> bool:
        return self.promises() + 1 <= self.slots // 2

    def promise_snapshots(self, sequence: Sequence, boundaries: list[int], known: int) -> None:
        length = sequence.prompt
        candidates = [(known, "branch")] if known < length else []
        candidates += [(count, "boundary") for count in boundaries]
        if self.grid:
            candidates += [(count, "grid") for count in range(self.grid, length + 1, self.grid)]
        previous = sequence.resume
        for count, kind in sorted(candidates, key=lambda candidate: candidate[0]):
            if not previous < count <= length or (kind == "branch" and count - previous < self.page // 4):
                continue
            key = (sequence.name, tuple(sequence.tokens[:count]))
            if (key in self.snapshots and self.snapshots[key].slot) or self.is_promised(*key):
                previous = count
                continue
            room = self.may_promise()
            if kind == "grid":
                if not room or self.free() == 0 or self.free() <= self.slots // 2:
                    continue
            elif not room or (self.free() == 0 and not self.evict()):
                if key not in self.snapshots:
                    self.lost.add(key)
                self.known.add(key)
                continue
            sequence.promised[count] = Slot()
            self.known.add(key)
            previous = count

    def commit(self, request: int, count: int) -> None:
        sequence = self.running[request]
        if count > sequence.resume:
            sequence.source = None
        sequence.committed = count
        whole = count // self.page
        for page in range(1, whole + 1):
            key = (sequence.name, tuple(sequence.tokens[: page * self.page]))
            self.kv.setdefault(key, sequence.pages[page - 1])
            self.known.add(key)
        for at in sorted(sequence.promised):
            if at <= count:
                self.publish(sequence, at, sequence.promised.pop(at))

    def publish(self, sequence: Sequence, count: int, slot: Slot) -> None:
        key = (sequence.name, tuple(sequence.tokens[:count]))
        if sequence.leaves_nothing or (key in self.snapshots and self.snapshots[key].slot):
            return
        self.clock += 1
        snapshot = self.snapshots.setdefault(key, Snapshot(slot, self.clock))
        snapshot.slot, snapshot.used = slot, self.clock
        self.lost.discard(key)

    def finish(self, request: int, donate: bool) -> None:
        sequence = self.running[request]
        count = sequence.launched
        self.commit(request, count)
        self.known.add((sequence.name, tuple(sequence.tokens[:count])))
        if donate and count > sequence.resume:
            self.publish(sequence, count, sequence.working)
        del self.running[request]

    def fork(self, parent_id: int, child_id: int) -> bool:
        parent = self.running[parent_id]
        count = parent.launched
        convert = count not in parent.promised
        while self.free() < 1 + convert:
            held = self.holders()
            idle = sum(held.count(snapshot.slot) == 1 for snapshot in self.snapshots.values())
            if self.free() + idle < 1 + convert:
                return False
            self.evict()
        if convert:
            parent.promised[count], parent.working = parent.working, Slot()
            self.known.add((parent.name, tuple(parent.tokens[:count])))
        child = Sequence(parent.name, parent.tokens[:count], count, count, count, count, Slot(), parent.promised[count])
        child.leaves_nothing = parent.leaves_nothing
        self.running[child_id] = child
        self.commit(parent_id, parent.committed)
        return True

    # --- prefixes from elsewhere, and lent ones

    def receive(self, request: int, name: str, prefix: Prefix) -> bool:
        if self.free() < 1 and not self.evict():
            return False
        count = len(prefix)
        self.running[request] = Sequence(name, list(prefix), count, 0, count, 0, None, promised={count: Slot()})
        self.known.add((name, prefix))
        return True

    def received(self, request: int) -> None:
        sequence = self.running[request]
        count = len(sequence.tokens)
        self.commit(request, count)
        snapshot = self.snapshots.get((sequence.name, tuple(sequence.tokens)))
        sequence.source = snapshot.slot if snapshot else None

    def lend(self, request: int, name: str, prefix: Prefix) -> tuple[int, int]:
        count = len(prefix)
        kept = {n: self.snapshots.get((name, prefix[:n])) for n in range(1, count + 1)}
        state = max((n for n in kept if kept[n] and kept[n].slot), default=0)
        whole = max((n for n in range(self.page, count + 1, self.page) if (name, prefix[:n]) in self.kv), default=0)
        source = self.snapshots[name, prefix[:state]].slot if state else None
        self.running[request] = Sequence(name, list(prefix), count, 0, count, 0, None, source)
        return max(whole, state), state

    def clear(self, name: str) -> None:
        for held in (self.known, self.lost):
            held -= {key for key in held if key[0] == name}
        for key, snapshot in self.snapshots.items():
            if key[0] == name:
                self.make_void(snapshot)
        for table in (self.kv, self.snapshots):
            for key in [key for key in table if key[0] == name]:
                del table[key]
        self.cleared += 1
        for sequence in self.running.values():
            if sequence.name == name:  # goes on under a name that no prompt has
                sequence.name, sequence.leaves_nothing = f"{name} cleared {self.cleared}", True

    def clear_all(self) -> None:
        for name in {sequence.name for sequence in self.running.values() if not sequence.leaves_nothing}:
            self.clear(name)
        for name in {name for name, _ in self.known}:
            self.clear(name)
