"""Arenas read through NIXL: the prefiller's engine takes no part, and UCX chooses the way (memory of another process on
this machine, NVLink, RDMA, TCP).

A read that is under way cannot be called back, but for a pull that was cancelled nothing may be written. So reads end
in stages, memory of this transport's own, and are copied from there; a stage whose read never ends is not used again.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, TransferError
from .arenas import Arenas, Move
from .messages import Agent

STAGE_BYTES = 8 << 20  # that one read brings
_STAGES = 8
_KINDS = ("DRAM", "VRAM")
_MAX_METADATA_BYTES = 1 << 16

log = logging.getLogger("tokenspeed.transfer")


class Remote(NamedTuple):
    """A peer's agent by its name here, and where its arenas are."""

    name: str
    theirs: Agent


@dataclass(slots=True, eq=False)
class _Read:
    number: int
    name: str
    stage: Tensor
    length: int
    handle: Any


class Nixl:
    """This engine's agent; one thread makes all calls after the first. own: what peers need to read the arenas."""

    def __init__(self, arenas: Arenas, name: str, make_agent: Callable[[str], Any]):
        """make_agent: of a name, a `nixl_agent`. Raises what it raises, and ConfigError where its description is too
        long to be sent."""
        cuda = arenas.device.type == "cuda"
        self._kind, self._device = ("VRAM", arenas.flat[0].get_device()) if cuda else ("DRAM", 0)
        self._arenas, self._agent = arenas, make_agent(name)
        self._registered = [self._register(arenas.flat)]
        metadata = self._agent.get_agent_metadata()
        if len(metadata) > _MAX_METADATA_BYTES:
            raise ConfigError(f"NIXL's metadata has {len(metadata)} bytes; {_MAX_METADATA_BYTES} are the most.")
        self.own = Agent(metadata, self._kind, self._device, tuple(flat.data_ptr() for flat in arenas.flat))
        self._stages: tuple[Tensor, ...] = ()  # made with the first peer
        self._free: list[Tensor] = []
        self._under_way: list[_Read] = []
        self._users: Counter[str] = Counter()  # of a peer's agent: connections and reads

    def connect(self, engine: str, theirs: Agent) -> Remote | None:
        """A peer whose arenas can be read from now on; None where they cannot, and the log says why."""
        try:
            if theirs.kind not in _KINDS or len(theirs.addresses) != len(self._arenas.flat):
                raise TransferError(f"it has {len(theirs.addresses)} arenas in {theirs.kind!r:.20}")
            if not self._stages:
                memory = torch.empty(_STAGES * STAGE_BYTES, dtype=torch.uint8, device=self._arenas.device)
                self._registered.append(self._register([memory]))
                self._stages = memory.split(STAGE_BYTES)
                self._free += self._stages
            name = self._agent.add_remote_agent(theirs.metadata)
            name = name.decode() if isinstance(name, bytes) else name
            self._users[name] += 1
            remote = Remote(name, theirs)
            if name != engine:
                self.disconnect(remote)
                raise TransferError(f"its agent is called {name!r:.100}")
        except Exception as error:  # NIXL's have no class in common
            log.warning("engine %.100s cannot be read through NIXL: %s %s", engine, type(error).__name__, error)
            return None
        return remote

    def disconnect(self, remote: Remote) -> None:
        """It is forgotten when no read of it is under way any more."""
        self._leave(remote.name)

    @property
    def free(self) -> bool:
        """Whether a read can begin now."""
        return bool(self._free)

    def read(self, remote: Remote, number: int, moves: Sequence[Move]) -> None:
        """Begins to bring the parts of these moves, STAGE_BYTES at most, one after the other, into a stage that is
        free. Raises TransferError where the peer cannot be read."""
        stage, here, there = self._free.pop(), [], []
        length = 0
        for part, _ in moves:
            address = remote.theirs.addresses[part.arena] + part.offset
            if there and there[-1][0] + there[-1][1] == address:
                size = there[-1][1] + part.length
                here[-1], there[-1] = (here[-1][0], size, self._device), (there[-1][0], size, remote.theirs.device)
            else:
                here.append((stage.data_ptr() + length, part.length, self._device))
                there.append((address, part.length, remote.theirs.device))
            length += part.length
        agent, handle = self._agent, None
        try:
            descriptors = agent.get_xfer_descs(here, self._kind), agent.get_xfer_descs(there, remote.theirs.kind)
            handle = agent.initialize_xfer("READ", *descriptors, remote.name)
            agent.transfer(handle)
        except Exception as error:
            if handle is None or self._released(handle):
                self._free.append(stage)
            raise TransferError(f"{type(error).__name__} {error}") from None
        self._users[remote.name] += 1
        self._under_way.append(_Read(number, remote.name, stage, length, handle))

    def ended(self) -> Iterator[tuple[int, Tensor | None]]:
        """Reads that have ended, each with its bytes, which are there until the next one is asked for, or None where it
        has failed."""
        for read in list(self._under_way):
            try:
                state = self._agent.check_xfer_state(read.handle)
            except Exception:  # the peer is gone
                state = "ERR"
            if state == "PROC":
                continue
            self._under_way.remove(read)
            try:
                yield read.number, read.stage[: read.length] if state == "DONE" else None
            finally:
                if self._released(read.handle):
                    self._free.append(read.stage)
                self._leave(read.name)

    def close(self) -> None:
        """Nothing is read any more, here or by peers."""
        for read in self._under_way:
            self._released(read.handle)
        for registered in self._registered:
            with contextlib.suppress(Exception):
                self._agent.deregister_memory(registered)
        self._under_way.clear()
        self._agent = None

    def _register(self, memory: Sequence[Tensor]):
        regions = [(flat.data_ptr(), flat.numel(), self._device, "") for flat in memory]
        return self._agent.register_memory(regions, self._kind)

    def _leave(self, name: str) -> None:
        self._users[name] -= 1
        if not self._users[name]:
            del self._users[name]
            with contextlib.suppress(Exception):  # it is gone already
                self._agent.remove_remote_agent(name)

    def _released(self, handle) -> bool:
        try:
            handle.release()
        except Exception:  # it may still be written for
            return False
        return True


def start(arenas: Arenas, name: str, required: bool) -> Nixl | None:
    """An agent of the installed package; None without the package, or where it does not work here, which the log says.
    Raises ConfigError instead where it is required."""
    try:
        from nixl import nixl_agent, nixl_agent_config

        return Nixl(arenas, name, lambda name: nixl_agent(name, nixl_agent_config(backends=["UCX"])))
    except Exception as error:
        if required:
            raise ConfigError(f"transfers cannot go through NIXL: {type(error).__name__} {error}") from None
        if not isinstance(error, ModuleNotFoundError):
            log.warning("transfers do not go through NIXL: %s %s", type(error).__name__, error)
        return None
