"""The stored programs of the published sizes: `python -m tests.distributed.programs` writes them anew."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tokenspeed.engine.commands.info import Parts, head_needs, needs, program
from tokenspeed.engine.config import MoeConfig
from tokenspeed.engine.executor.memory import MemoryLayout
from tokenspeed.engine.model.qwen3_5 import Qwen3_5
from tokenspeed.engine.parallel.comm import Communicator
from tokenspeed.engine.parallel.mesh import Mesh
from tokenspeed.engine.sizes import PUBLISHED

DIRECTORY = Path(__file__).parent / "programs"
RANKS = (1, 2, 4, 8)


def stored(size: str, ranks: int) -> Path:
    return DIRECTORY / f"{size}-{ranks}.txt"


def empty_model(size: str, ranks: int, mtp: bool = False) -> Qwen3_5:
    """A rank's part of a published size, without memory; experts over as many ranks as heads. mtp: with its head."""
    config = PUBLISHED[size]
    mesh = Mesh(ranks, ranks if isinstance(config.ffn, MoeConfig) else 1)
    return Qwen3_5.empty(config, torch.bfloat16, torch.device("meta"), Communicator(mesh), mtp)


def program_lines(size: str, ranks: int) -> Iterator[str]:
    """What `info --size SIZE --tp RANKS --ep RANKS --program` prints of it on any machine; dense models have no ep."""
    parts = Parts(empty_model(size, ranks), empty_model(size, ranks, mtp=True))
    plain = MemoryLayout(parts.trunk.share, torch.bfloat16)
    yield from needs(size, parts.trunk, plain)
    yield from head_needs(parts, plain)
    yield from program(parts.whole)


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for size in PUBLISHED:
        for ranks in RANKS:
            stored(size, ranks).write_text("\n".join(program_lines(size, ranks)) + "\n", encoding="utf-8")
