"""What clients want their answers to look like, made into grammars where that can disturb nobody.

A schema of a kilobyte can take for ever and gigabytes to compile. So each is looked at and compiled in a process of its
own, which is killed at a limit or when its client goes away. The engine is told only what was compiled within the
limits. What is remembered is remembered by key and salt: that it is fast tells nobody else what was asked.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
import socket
import struct
import sys
from pathlib import Path

import msgspec

from ..chat.formats import Format
from ..errors import EngineError, RequestError
from ..text.grammar import GrammarSpec, json_object
from ..text.sized_cache import SizedCache
from .shares import Shares

MAX_CPU_SECONDS = 2.0
MAX_WALL_SECONDS = 30.0  # of a machine that is busy with other things
MAX_BYTES = 256 << 20
MAX_CHARACTERS = 1 << 20  # of one request's schemas and tools
SHARE = 4  # of one key at a time
STATUS = struct.Struct("<qq")  # a job's number, a wait status
_KEPT_BYTES = 32 << 20


class Compiled(msgspec.Struct, tag=True, frozen=True):
    """spec: None where any text will do; size: bytes it took when it was compiled."""

    spec: GrammarSpec | None
    size: int


class NotCompiled(msgspec.Struct, tag=True, frozen=True):
    """reason: for the client."""

    reason: str


_decode = msgspec.msgpack.Decoder(Compiled | NotCompiled).decode
_JSON_OBJECT_BYTES = 1 << 20


class Formats:
    """The process that compiles (`format_worker`) and what it found. One event loop uses it."""

    def __init__(self, directory: Path):
        """directory: the checkpoint's, for its tokenizer."""
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._shares = Shares(SHARE)
        self._numbers = itertools.count()
        self._ends: dict[int, asyncio.Future[int]] = {}  # the wait statuses of jobs
        self._known: SizedCache[Compiled | NotCompiled] = SizedCache(_KEPT_BYTES)

    async def start(self) -> None:
        """Starts the process, where none runs. It takes jobs before it is ready."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            self._drop()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = ["-m", "tokenspeed.engine.server.format_worker", str(self._directory), str(os.getpid())]
            # One thread: a process that forks should have no others.
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, *command, stdin=theirs, env=environment
                )
            ours.setblocking(False)
            self._control = ours
            asyncio.get_running_loop().add_reader(ours, self._told, ours)

    async def compile(self, key: str | None, name_space: str, format: Format) -> Compiled:
        """The grammar for a format. key: whose share of the work it takes; name_space: whose memory.

        Raises RequestError for what cannot be enforced, or only beyond a limit, which it names; EngineError where the
        process cannot be used.
        """
        if format.is_json_object:
            return Compiled(json_object(format.reasoning), _JSON_OBJECT_BYTES)
        try:
            data = msgspec.msgpack.encode(format)
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise RequestError(f"the schemas of the request cannot be used: {error}") from None
        if len(data) > MAX_CHARACTERS:
            raise RequestError(
                f"the schemas and tools of the request have {len(data)} bytes; at most {MAX_CHARACTERS} are supported"
            )
        known = name_space, hashlib.blake2b(data, digest_size=16).digest()
        found = self._known.get(known)
        if found is None:
            async with self._shares.one(key):
                found = await self._job(data)
            self._known.put(known, found, len(data) + 256)
        if isinstance(found, NotCompiled):
            raise RequestError(found.reason)
        return found

    async def close(self) -> None:
        """Ends the process and its jobs; harmless when it has ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._drop()

    async def _job(self, data: bytes) -> Compiled | NotCompiled:
        await self.start()
        number = next(self._numbers)
        ended = self._ends[number] = asyncio.get_running_loop().create_future()
        try:
            reply, status = await asyncio.wait_for(self._done(number, data, ended), MAX_WALL_SECONDS)
        except TimeoutError:
            raise RequestError(_LIMIT.format(f"{MAX_WALL_SECONDS:g} s")) from None
        except OSError as error:
            raise EngineError(f"output formats cannot be compiled just now: {error}") from None
        finally:
            del self._ends[number]
            if not ended.done() and self._control is not None:
                with contextlib.suppress(OSError):
                    self._control.send(STATUS.pack(number, 0))
        return _decode(reply) if status == 0 else NotCompiled(_why(status))

    async def _done(self, number: int, data: bytes, ended: asyncio.Future[int]) -> tuple[bytes, int]:
        """The reply of a job's process, and its wait status."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                socket.send_fds(self._control, [STATUS.pack(number, 0)], [theirs.fileno()])
            pieces = []
            with contextlib.suppress(ConnectionError):  # its status says why
                await loop.sock_sendall(ours, data)
                ours.shutdown(socket.SHUT_WR)
                while piece := await loop.sock_recv(ours, 1 << 16):
                    pieces.append(piece)
            return b"".join(pieces), await asyncio.shield(ended)

    def _told(self, control: socket.socket) -> None:
        try:
            while data := control.recv(64):
                number, status = STATUS.unpack(data)
                if (ended := self._ends.get(number)) and not ended.done():
                    ended.set_result(status)
        except BlockingIOError:
            return
        except OSError:
            pass
        if control is self._control:
            self._drop()

    def _drop(self) -> None:
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
        for ended in self._ends.values():
            if not ended.done():
                ended.set_exception(OSError("their process ended"))


_LIMIT = (
    "the requested output format needs more than {} to compile; use fewer or simpler patterns, alternatives and lengths"
)


def _why(status: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGPROF:
        return _LIMIT.format(f"{MAX_CPU_SECONDS:g} s of computing")
    if number in (signal.SIGABRT, signal.SIGKILL):
        return _LIMIT.format(f"{MAX_BYTES >> 20} MiB of memory")
    return f"the requested output format cannot be enforced: compiling it failed with status {status}"
