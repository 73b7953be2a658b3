"""The processes of one model: rank 0 runs the engine, the others run the Steps it sends.

    python -m tokenspeed.engine.ranks    a rank beside rank 0, with its settings as JSON on standard input

A rank that is lost ends the others, with the reason: collectives cannot go on without it.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from .config import EngineConfig
from .device import pick_device
from .errors import ConfigError, TokenSpeedError
from .loading import load_runner
from .parallel.comm import Communicator, join_ranks
from .parallel.control import Inbox, StepChannel
from .parallel.mesh import Mesh
from .runner import Launched, Runner
from .step import Step

_CHECK_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for the loss to be noticed and told where the rank was needed


class RankSettings(msgspec.Struct, frozen=True):
    """What a rank beside rank 0 is started with."""

    directory: str
    config: EngineConfig
    rank: int


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank 0's side: its collectives, the channel to the others, and those it started itself."""

    mesh: Mesh
    device: torch.device
    communicator: Communicator
    channel: StepChannel

    def close(self) -> None:
        """Lets the others end; harmless where they have."""
        with contextlib.suppress(RuntimeError):
            self.channel.send(None)


def start_ranks(directory: Path, config: EngineConfig) -> Ranks:
    """Make this process rank 0 of `config.tensor_parallel_size` and `config.expert_parallel_size`. Without a rendezvous
    the other ranks are started on this machine; with one, somebody else starts them. Returns when all have met. Raises
    ConfigError where they cannot."""
    mesh = Mesh(config.tensor_parallel_size, config.expert_parallel_size)
    if config.rendezvous is None:
        config = replace(config, rendezvous=f"tcp://127.0.0.1:{_free_port()}")
        others = [_start(directory, config, rank) for rank in range(1, mesh.world)]
        threading.Thread(target=_watch_others, args=(others,), name="tokenspeed-ranks", daemon=True).start()
    device = rank_device(config, 0)
    return Ranks(mesh, device, join_ranks(mesh, device, config.rendezvous), StepChannel())


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank: the CPU, or one of this machine's GPUs, dealt out in order of rank."""
    device = pick_device(config.device)
    return torch.device("cuda", rank % torch.cuda.device_count()) if device.type == "cuda" else device


def follow(directory: Path, config: EngineConfig, rank: int) -> None:
    """Run what rank 0 sends, until it sends the end. Raises RuntimeError where another rank is lost."""
    mesh, device = Mesh(config.tensor_parallel_size, config.expert_parallel_size, rank), rank_device(config, rank)
    communicator = join_ranks(mesh, device, config.rendezvous)
    channel = StepChannel()
    runner, _ = load_runner(directory, config, device, communicator, channel.smallest, progress=False)
    inbox = Inbox(channel)
    running: Launched | None = None
    while (message := inbox.get()) is not None:
        assert isinstance(message, Step)
        running = _run(runner, message, inbox, running)


def _run(runner: Runner, step: Step, inbox: Inbox, before: Launched | None) -> Launched:
    launched = runner.launch(step)
    edits = inbox.get() if any(sample.edited for sample in step.samples) else ()
    launched.sample(edits or ())
    (launched if runner.device.type == "cpu" else before or launched).read()  # a GPU runs one Step ahead
    return launched


def _start(directory: Path, config: EngineConfig, rank: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tokenspeed.engine.ranks"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    process.stdin.write(msgspec.json.encode(RankSettings(str(directory), config, rank)))
    process.stdin.close()
    return process


def _watch_others(others: list[subprocess.Popen]) -> None:
    while True:
        for rank, process in enumerate(others, start=1):
            if process.poll() is not None:
                if process.returncode == 0:  # told to end
                    return
                time.sleep(_GRACE_SECONDS)
                _end(f"rank {rank} ended with status {process.returncode}; the other ranks end with it.")
        time.sleep(_CHECK_SECONDS)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_CHECK_SECONDS)
    time.sleep(_GRACE_SECONDS)
    _end("rank 0 is gone; this rank ends with it.")


def _end(reason: str) -> None:
    """The main thread may stand in a collective that never returns: nothing but the process's end helps."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSettings)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    try:
        follow(Path(settings.directory), settings.config, settings.rank)
    except KeyboardInterrupt:  # Ctrl-C goes to every rank; rank 0 says so
        return 130
    except (TokenSpeedError, ConfigError, RuntimeError) as error:
        print(f"error: rank {settings.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of the process group may never end
    return 0


if __name__ == "__main__":
    sys.exit(main())
