"""NIXL agents without the package: they copy within this process, when and as far as the test lets them."""

import ctypes
from collections.abc import Callable


class Network:
    """The agents that know each other's names. polls: how often a read is asked for before it has ended; fault: told of
    each read with its number, says how it ends ("DONE", "ERR", an exception that check_xfer_state or, with `at_once`,
    transfer raises, or "PROC": never)."""

    def __init__(self, polls: int = 2, fault: Callable[[int], str | Exception] = lambda number: "DONE"):
        self.polls, self.fault, self.at_once = polls, fault, False
        self.agents: dict[str, FakeAgent] = {}
        self.reads = 0

    def agent(self, name: str) -> "FakeAgent":
        return FakeAgent(self, name)


class _Handle:
    def __init__(self, network: Network, pairs: list[tuple[int, int, int]]):
        self.network, self.pairs, self.polls, self.outcome, self.released = network, pairs, network.polls, None, False

    def release(self) -> None:
        assert not self.released
        if self.outcome == "PROC" or (self.outcome == "DONE" and self.polls):
            raise RuntimeError("it is under way")
        self.released = True


class FakeAgent:
    def __init__(self, network: Network, name: str):
        self.network, self.name = network, name
        self.regions: list[tuple[int, int]] = []
        self.known: set[str] = set()
        network.agents[name] = self

    def register_memory(self, regions, kind: str):
        assert kind == "DRAM" and all(device == 0 and meta == "" for _, _, device, meta in regions)
        found = [(address, length) for address, length, _, _ in regions]
        self.regions += found
        return found

    def deregister_memory(self, regions) -> None:
        for region in regions:
            self.regions.remove(region)

    def get_agent_metadata(self) -> bytes:
        return b"agent " + self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        if not metadata.startswith(b"agent "):
            raise ValueError("no metadata")
        self.known.add(metadata[6:].decode())
        return metadata[6:]

    def remove_remote_agent(self, name: str) -> None:
        self.known.remove(name)

    def get_xfer_descs(self, descriptors, kind: str):
        assert kind == "DRAM"
        return list(descriptors)

    def initialize_xfer(self, operation: str, here, there, name: str) -> _Handle:
        assert operation == "READ" and len(here) == len(there) and name in self.known
        for descriptors, regions in ((here, self.regions), (there, self.network.agents[name].regions)):
            for address, length, _ in descriptors:
                if not any(start <= address and address + length <= start + size for start, size in regions):
                    raise ValueError("it is not registered")
        pairs = [(own[0], other[0], own[1]) for own, other in zip(here, there, strict=True)]
        assert [own[1] for own in here] == [other[1] for other in there]
        return _Handle(self.network, pairs)

    def transfer(self, handle: _Handle) -> str:
        handle.outcome = self.network.fault(self.network.reads)
        self.network.reads += 1
        if self.network.at_once and isinstance(handle.outcome, Exception):
            raise handle.outcome
        return "PROC"

    def check_xfer_state(self, handle: _Handle) -> str:
        assert not handle.released
        if handle.polls:
            handle.polls -= 1
            return "PROC"
        if isinstance(handle.outcome, Exception):
            raise handle.outcome
        if handle.outcome == "DONE":
            for here, there, length in handle.pairs:
                ctypes.memmove(here, there, length)
        return handle.outcome
