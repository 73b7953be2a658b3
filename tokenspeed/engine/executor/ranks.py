"""The processes of one model: rank 0 runs the engine, the others run the Steps it sends.

    python -m tokenspeed.engine.executor.ranks    a rank beside rank 0, with its settings as JSON on standard input

A rank that is lost ends the others, with the reason: collectives cannot go on without it.
"""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from ..config import EngineConfig
from ..errors import ConfigError, EngineError, TokenSpeedError
from ..parallel.comm import ProcessCommunicator, abort, join_ranks
from ..parallel.control import Inbox, StepChannel
from ..parallel.mesh import Mesh
from ..schedule.step import Edit, Step
from .device import pick_device
from .loading import load_runner
from .runner import Launched, Runner

Doing = AbstractContextManager[Callable[[], None]]

_CHECK_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for the loss to be noticed and told where the rank was needed


class Beside(NamedTuple):
    """What the other ranks do beside their Steps: a module that calls `run_rank`, and settings for it, as JSON."""

    module: str
    settings: str


class RankSettings(msgspec.Struct, frozen=True):
    """What a rank beside rank 0 is started with. beside: settings of what it does beside its Steps."""

    directory: str
    config: EngineConfig
    rank: int
    beside: str = ""


ALONE = Beside("tokenspeed.engine.executor.ranks", "")


@dataclass(slots=True)
class Ranks:
    """Rank 0's side: its collectives, the channel to the others, why one of those it started is lost, how to end the
    watch over them, and once it is loaded its runner."""

    mesh: Mesh
    device: torch.device
    communicator: ProcessCommunicator
    channel: StepChannel
    lost: list[str]
    end_watch: Callable[[], None]
    runner: Runner | None = None

    def check(self) -> None:
        """Raises EngineError where a rank is lost: what was computed without it is worth nothing."""
        if self.lost:
            raise EngineError(self.lost[0])
        self.communicator.check()

    def announce(self, message: Step | list[Edit]) -> None:
        """Tells the others what to run. Raises EngineError where one of them is lost."""
        try:
            self.channel.send(message)
        except RuntimeError as error:
            time.sleep(2 * _CHECK_SECONDS)  # until it is known which one, and how it ended
            self.check()
            raise EngineError(f"another rank is lost: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Lets the others end; harmless where they have. Nothing runs after this. Ends this process, too, where one of
        them was lost on a GPU: NCCL's threads may wait for it for ever."""
        with contextlib.suppress(RuntimeError):
            self.channel.send(None)
        self.end_watch()  # a thread that Python ends where it stands may take the process with it
        if self.lost and self.device.type == "cuda":
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if self.runner:
            _leave(self.runner, self.communicator)


def start_ranks(directory: Path, config: EngineConfig, beside: Beside = ALONE) -> Ranks:
    """Make this process rank 0 of `config.tensor_parallel_size` and `config.expert_parallel_size`. Without a rendezvous
    the other ranks are started on this machine; with one, somebody else starts them, and they do nothing beside their
    Steps. Returns when all have met. Raises ConfigError where they cannot."""
    mesh = Mesh(config.tensor_parallel_size, config.expert_parallel_size)
    device = rank_device(config, 0)
    others: list[subprocess.Popen] = []
    if config.rendezvous is None:
        gpus = torch.cuda.device_count()
        if device.type == "cuda" and mesh.world > gpus:
            raise ConfigError(
                f"tensor_parallel_size {mesh.tp} and expert_parallel_size {mesh.ep} make {mesh.world} ranks, and this "
                f"machine has {gpus} GPU{'s' * (gpus != 1)}: each rank needs its own; take fewer, or torchrun over "
                "several hosts."
            )
        config = replace(config, rendezvous=f"tcp://127.0.0.1:{free_port()}")
        others = [_start(directory, config, rank, beside) for rank in range(1, mesh.world)]
    lost: list[str] = []
    ended = threading.Event()
    watch = threading.Thread(target=_watch_others, args=(others, lost, ended), name="tokenspeed-ranks", daemon=True)
    watch.start()

    def end_watch() -> None:
        ended.set()
        watch.join()

    return Ranks(mesh, device, join_ranks(mesh, device, config.rendezvous), StepChannel(), lost, end_watch)


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: the CPU, or one of this machine's GPUs, dealt out in order of rank. Raises ConfigError
    where the configuration names one GPU for all."""
    device = pick_device(config.device)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(f"device {config.device!r} names one GPU, but each rank needs its own: it must be cuda.")
    return torch.device("cuda", rank % torch.cuda.device_count())


def follow(directory: Path, config: EngineConfig, rank: int, beside: Callable[[Runner], Doing] | None = None) -> None:
    """Run what rank 0 sends, until it sends the end. beside: what goes on meanwhile, and is told of each Step that was
    run (on a GPU: launched). Raises RuntimeError where another rank is lost."""
    mesh, device = Mesh(config.tensor_parallel_size, config.expert_parallel_size, rank), rank_device(config, rank)
    communicator = join_ranks(mesh, device, config.rendezvous)
    channel = StepChannel()
    runner, _ = load_runner(directory, config, device, communicator, channel.smallest, progress=False)
    inbox = Inbox(channel)
    running: Launched | None = None
    with beside(runner) if beside else contextlib.nullcontext(lambda: None) as ran:
        while (message := inbox.get()) is not None:
            assert isinstance(message, Step)
            running = _run(runner, message, inbox, running)
            ran()
        if running:
            running.read()
    _leave(runner, communicator)


def _run(runner: Runner, step: Step, inbox: Inbox, before: Launched | None) -> Launched:
    launched = runner.launch(step)
    edits = inbox.get() if any(sample.edited for sample in step.samples) else ()
    launched.sample(edits or ())
    (launched if runner.device.type == "cpu" else before or launched).read()  # a GPU runs one Step ahead
    runner.finish()
    return launched


def _start(directory: Path, config: EngineConfig, rank: int, beside: Beside) -> subprocess.Popen:
    command = [sys.executable, "-m", beside.module]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    process.stdin.write(msgspec.json.encode(RankSettings(str(directory), config, rank, beside.settings)))
    process.stdin.close()
    return process


def _leave(runner: Runner, communicator: ProcessCommunicator) -> None:
    """NCCL waits for the graphs that hold its collectives, and torch complains of groups that nobody left."""
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
        runner.forget_graphs()
        gc.collect()
        communicator.close()


def _watch_others(others: list[subprocess.Popen], lost: list[str], ended: threading.Event) -> None:
    while others and not ended.wait(_CHECK_SECONDS):
        for rank, process in enumerate(others, start=1):
            if process.poll() is not None:
                if process.returncode == 0:  # told to end
                    return
                lost.append(f"rank {rank} ended with status {process.returncode}; the other ranks end with it.")
                abort()  # whoever waits on the GPU for it goes on, and then finds it lost
                time.sleep(_GRACE_SECONDS)
                _end(lost[0])


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)
    time.sleep(_GRACE_SECONDS)
    _end("rank 0 is gone; this rank ends with it.")


def _end(reason: str) -> None:
    """The main thread may stand in a collective that never returns: nothing but the process's end helps."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(beside: Callable[[Runner, RankSettings], Doing] | None = None) -> int:
    """This process is a rank beside rank 0, by the settings on standard input; the exit status."""
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSettings)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    try:
        doing = beside and (lambda runner: beside(runner, settings))
        follow(Path(settings.directory), settings.config, settings.rank, doing)
    except KeyboardInterrupt:  # Ctrl-C goes to every rank; rank 0 says so
        return 130
    except (TokenSpeedError, ConfigError, RuntimeError) as error:
        print(f"error: rank {settings.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of the process group may never end
    return 0


if __name__ == "__main__":
    sys.exit(run_rank())
