"""One rank as a process: `python -m tests.distributed.ranks RANK DIRECTORY` runs every case of DIRECTORY/cases.json
whose mesh has that rank, over gloo, and leaves its results beside it. Where the case says so, sums of tokens are made
in parts."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tokenspeed.engine.parallel.comm import Communicator, join_ranks
from tokenspeed.engine.parallel.costs import always_in_parts
from tokenspeed.engine.parallel.mesh import GROUPS, Mesh

from . import models


def collectives(communicator: Communicator) -> dict[str, torch.Tensor]:
    """Every collective over every group, of a tensor that names its rank."""
    ranks = communicator.mesh.world
    x = torch.arange(4.0 * ranks * ranks).view(2 * ranks, 2 * ranks) + 1000 * communicator.mesh.rank
    results = {}
    for group in GROUPS:
        results[f"sum.{group}"] = communicator.all_reduce(x.clone(), group)
        results[f"largest.{group}"] = communicator.all_reduce(x.clone(), group, largest=True)
        for dim in (0, 1):
            results[f"gather{dim}.{group}"] = communicator.all_gather(x, dim, group)
            results[f"scatter{dim}.{group}"] = communicator.reduce_scatter(x, dim, group)
    return results


def outcome(communicator: Communicator, checkpoint: str) -> dict[str, torch.Tensor]:
    ran = models.run(communicator, Path(checkpoint))
    named = {"logits": ran.logits, "greedy": ran.greedy, "sampled": ran.sampled, "drafts": ran.drafts}
    return {f"{name}.{i}": tensor for name, tensors in named.items() for i, tensor in enumerate(tensors)}


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    for number, (checkpoint, tp, ep, in_parts) in enumerate(json.loads((directory / "cases.json").read_text())):
        if rank >= max(tp, ep):
            continue
        mesh = Mesh(tp, ep, rank)
        communicator = join_ranks(mesh, models.CPU, f"file://{directory / f'meeting-{number}'}", timeout_s=60)
        assert communicator.describe() == f"rank {rank} of {mesh.world} over gloo"
        if in_parts:
            communicator.costs = always_in_parts(mesh)
        results = outcome(communicator, checkpoint) if checkpoint else collectives(communicator)
        contiguous = {name: tensor.contiguous() for name, tensor in results.items()}
        save_file(contiguous, directory / f"case-{number}-rank-{rank}.safetensors")
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
