"""The server's log: lines go to standard error from a thread of their own: whoever reads them stalls nothing."""

import logging
import os
import queue
import time
from logging.handlers import QueueHandler, QueueListener

_MAX_LINES = 10_000  # that wait; beyond it lines are dropped, and how many is said
_LAST_SECONDS = 1.0


class Log:
    """Takes over the root logger. `flush` before the process ends."""

    def __init__(self, descriptor: int = 2):
        """descriptor: of the open file that the lines go to."""
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_LINES)
        writer = _Writer(descriptor)
        writer.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        taken = _Dropping(self._lines)
        taken.setFormatter(logging.Formatter("%(message)s"))
        self._listener = QueueListener(self._lines, writer)
        self._listener.start()  # a daemon: a write that never returns does not keep the process
        logging.basicConfig(level=logging.INFO, handlers=[taken], force=True)

    def flush(self) -> None:
        """Waits a moment for what is not written yet."""
        end = time.monotonic() + _LAST_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)


class _Dropping(QueueHandler):
    """dropped: lines since one was last taken."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                text = f"{self.dropped} lines were dropped: nobody took them"
                self.queue.put_nowait(logging.LogRecord("tokenspeed", logging.WARNING, "", 0, text, (), None))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class _Writer(logging.Handler):
    """Writes past Python's own buffers, which would be locked at the end while a write stalls."""

    def __init__(self, descriptor: int):
        super().__init__()
        self._descriptor = descriptor

    def createLock(self) -> None:
        """None is needed: one thread writes. A lock would be held while a write stalls, and asked for at the end."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        data = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:  # nobody will ever read it
            pass
