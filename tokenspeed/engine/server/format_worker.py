"""Compiles what clients want their answers to look like, each in a process of its own that may use so much and no more.

python -m tokenspeed.engine.server.format_worker DIRECTORY PARENT    with a SOCK_SEQPACKET socket as standard input

The parent sends a job's number with a socket, on which the job comes and its reply goes; the number alone ends the job.
When a job's process has ended its number and wait status are told. This process holds a tokenizer and nothing else, and
forks in milliseconds; what a job breaks or fills is gone with its process.
"""

import gc
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path

import msgspec

from ..chat.formats import Format
from ..errors import TokenSpeedError
from ..text.frontend import Frontend
from ..text.grammar import GrammarCompiler, GrammarSpec
from ..text.tool_grammar import ToolGrammars
from .formats import MAX_BYTES, MAX_CPU_SECONDS, STATUS, Compiled, NotCompiled
from .lifeline import end_with_parent, give_way

_LEAST_BYTES = 1 << 16  # that a grammar counts for where it is kept


class FormatWorker:
    """The loop that forks. compiler: for the model's tokenizer."""

    def __init__(self, compiler: GrammarCompiler, control: socket.socket):
        self._compiler, self._control = compiler, control
        self._jobs: dict[int, int] = {}  # by process id

    def run(self) -> None:
        """Until the parent has closed its end."""
        woken, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([woken, self._control], [], [])
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control in ready and not self._take():
                return

    def _take(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
        if not data:
            return False
        number, _ = STATUS.unpack(data)
        if not descriptors:
            for process, job in self._jobs.items():
                if job == number:
                    os.kill(process, signal.SIGKILL)
            return True
        with socket.socket(fileno=descriptors[0]) as job:
            parent = os.getpid()
            if process := os.fork():
                self._jobs[process] = number
                return True
            try:
                end_with_parent(parent)
                self._control.close()
                self._work(job)
            finally:
                os._exit(1)
        return True

    def _reap(self) -> None:
        while self._jobs:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            self._control.send(STATUS.pack(self._jobs.pop(process), status))

    def _work(self, job: socket.socket) -> None:
        """In the process of the job: it ends here."""
        job.setblocking(True)
        give_way()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a failed allocation writes there
        signal.set_wakeup_fd(-1)
        with job.makefile("rb") as incoming:
            data = incoming.read()
        limit = _pages(0) + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
        try:
            spec = msgspec.msgpack.decode(data, type=Format).spec(ToolGrammars())
            before = _pages(1)
            if spec is not None:
                self._compiler.compile(spec).mask()  # the first mask is part of what it costs
            reply = Compiled(spec, max(_pages(1) - before, _LEAST_BYTES))
        except MemoryError:
            os.kill(os.getpid(), signal.SIGABRT)
        except TokenSpeedError as error:
            reply = NotCompiled(str(error))
        except Exception as error:  # whatever a schema makes Python raise
            reply = NotCompiled(f"the requested output format cannot be read: {type(error).__name__}: {error}"[:500])
        job.sendall(msgspec.msgpack.encode(reply))
        os._exit(0)


def _pages(field: int) -> int:
    """Bytes of this process's memory: 0: all of it; 1: what is resident."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides what follows
    frontend = Frontend.from_directory(Path(sys.argv[1]))
    compiler = GrammarCompiler(frontend.tokenizer, frontend.config.vocab, sorted(frontend.defaults.eos_ids))
    compiler.compile(GrammarSpec('answer: "a"'))  # what the library sets up once
    gc.collect()
    gc.freeze()  # or a collection in a job's process would touch, and so copy, all of it
    FormatWorker(compiler, socket.socket(fileno=os.dup(0))).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
