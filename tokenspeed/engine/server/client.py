"""The engine process as the HTTP process sees it."""

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator

import msgspec
import zmq

from ..errors import EngineError
from ..request import Update
from ..transfer.params import RemoteDecode
from .folders import OwnFolder
from .messages import (
    Abort,
    Clear,
    Failed,
    News,
    Ping,
    Pong,
    Ready,
    Refused,
    Settings,
    Stop,
    Submit,
    decode_from_engine,
    encode,
)


class EngineClient:
    """Starts the engine process and speaks with it. One event loop uses it.

    ready: the engine's limits; failed: why it serves nobody any more, None while it does; done: set with it.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self.ready: Ready | None = None
        self.failed: str | None = None
        self.done = asyncio.Event()
        self._folder = OwnFolder()
        self._socket = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.sndhwm = 0  # what is said is small and never dropped: a lost abort would leave a request running
        self._queues: dict[str, asyncio.Queue[Update | Exception]] = {}
        self._pongs: dict[int, asyncio.Future[Pong]] = {}
        self._pings = itertools.count()
        self._process: asyncio.subprocess.Process | None = None
        self._started = asyncio.Event()  # or it failed
        self._watcher: asyncio.Task | None = None

    async def start(self) -> None:
        """Returns when the engine takes requests. Raises EngineError with its reason where it cannot."""
        path = self._folder.path / "engine.sock"
        self._socket.bind(f"ipc://{path}")
        os.chmod(path, 0o600)
        command = [sys.executable, "-m", "tokenspeed.engine.server.process", f"ipc://{path}", str(os.getpid())]
        self._process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        self._process.stdin.write(msgspec.json.encode(self._settings))
        self._process.stdin.close()
        self._watcher = asyncio.create_task(self._watch())
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive)
        self._receive()
        await self._started.wait()
        if self.failed is not None:
            raise EngineError(self.failed)

    async def generate(self, submit: Submit, timeout: float | None = None) -> AsyncIterator[Update]:
        """The news of a request; leaving early aborts it. No two requests may ever have the same id: what one was told
        last may still be on its way when the other begins.

        Raises what the engine refuses it with, TimeoutError after `timeout` seconds, EngineError where the engine
        fails.
        """
        request = submit.request
        news = self._queues[request.id] = asyncio.Queue()
        timer = None
        if timeout is not None:
            timer = asyncio.get_running_loop().call_later(timeout, news.put_nowait, TimeoutError())
        left = 1 if isinstance(submit.transfer, RemoteDecode) else request.params.n
        try:
            self._send(submit)
            while left:
                what = await news.get()
                if isinstance(what, Exception):
                    if not isinstance(what, TimeoutError):
                        left = 0  # it does not run any more
                    raise what
                if what.error:
                    left = 0
                    raise what.error.error
                left -= what.finish_reason is not None
                yield what
        finally:
            if timer is not None:
                timer.cancel()
            del self._queues[request.id]
            if left:
                with contextlib.suppress(EngineError):  # then nothing runs that could be aborted
                    self._send(Abort(request.id))

    async def abort(self, request_id: str) -> bool:
        """Ends a request: its news close with the reason "abort". False where none of that id runs."""
        known = request_id in self._queues
        if known:
            self._send(Abort(request_id))
        return known

    async def clear_cache(self) -> None:
        """Forgets every cached prefix."""
        self._send(Clear())

    async def stats(self, timeout: float) -> dict[str, float]:
        """The engine's counters. Raises EngineError where it does not answer in time (seconds)."""
        number = next(self._pings)
        self._pongs[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(number))
            return (await asyncio.wait_for(self._pongs[number], timeout)).stats
        except TimeoutError:
            raise EngineError(f"the engine did not answer within {timeout:g} s") from None
        finally:
            del self._pongs[number]

    def give_up(self, reason: str) -> None:
        """Tells everybody who waits that nothing more will come."""
        for queue in self._queues.values():
            queue.put_nowait(EngineError(reason))

    async def close(self, seconds: float) -> None:
        """Ends the engine process, by force after so many seconds; harmless when it has ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(EngineError):
                self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), seconds)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watcher is not None:
            self._watcher.cancel()
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._folder.remove()

    def _send(self, message) -> None:
        """Raises EngineError where nobody listens any more, instead of waiting for somebody."""
        if self.failed is not None:
            raise EngineError(self.failed)
        try:
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            raise EngineError("the engine process ended") from None
        # Sending may take the edge that would have announced a message: look once more.
        asyncio.get_running_loop().call_soon(self._receive)

    def _receive(self) -> None:
        """Take what has come. The descriptor announces by edges, so everything is taken each time."""
        while not self._socket.closed:
            try:
                data = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._take(decode_from_engine(data))

    def _take(self, message) -> None:
        match message:
            case News(updates):
                for update in updates:
                    if queue := self._queues.get(update.request_id):
                        queue.put_nowait(update)
            case Pong() as pong:
                future = self._pongs.get(pong.number)
                if future and not future.done():
                    future.set_result(pong)
            case Refused(request_id, failure):
                if queue := self._queues.get(request_id):
                    queue.put_nowait(failure.error)
            case Ready() as ready:
                self.ready = ready
                self._started.set()
            case Failed(reason):
                self._fail(reason)

    async def _watch(self) -> None:
        code = await self._process.wait()
        await asyncio.sleep(0.1)  # its last messages may still be on their way
        self._fail(f"the engine process ended with status {code}")

    def _fail(self, reason: str) -> None:
        if self.failed is None:
            self.failed = reason
            self.give_up(reason)
            for future in self._pongs.values():
                if not future.done():
                    future.set_exception(EngineError(reason))
            self._started.set()
            self.done.set()
