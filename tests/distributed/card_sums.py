"""One rank on one GPU: `python -m tests.distributed.card_sums RANK RANKS ADDRESS` compares sums by peer memory with
those of NCCL, and draws with those of one rank, one by one and in CUDA graphs, with ranks that come late."""

import faulthandler
import random
import sys
import time

import torch

from tokenspeed import ops
from tokenspeed.engine.parallel import sampling
from tokenspeed.engine.parallel.comm import join_ranks
from tokenspeed.engine.parallel.mesh import Mesh

WIDTH = 5120


def main(rank: int, ranks: int, address: str) -> None:
    faulthandler.dump_traceback_later(90, exit=True)
    device = torch.device("cuda", rank)
    communicator = join_ranks(Mesh(ranks, 1, rank), device, address, timeout_s=60)
    communicator.prepare(WIDTH, device)
    assert communicator.describe().endswith(" and peer memory"), communicator.describe()
    nccl = communicator.without_peers()
    late = random.Random(rank)
    generator = torch.Generator(device).manual_seed(rank)
    for rows, width in ((1, WIDTH), (3, 2048), (8, WIDTH), (9, 1032), (64, WIDTH), (128, 4096), (1, 64)):
        shape, bf16 = (rows, width), {"device": device, "dtype": torch.bfloat16}
        weight, residual = torch.ones(width, **bf16), torch.full(shape, 0.5, **bf16)
        x = torch.randn(shape, generator=generator, **bf16)
        work = x.clone()
        communicator.all_reduce(work, "tp")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work.copy_(x)
            communicator.all_reduce(work, "tp")
            normed = communicator.add_rms_norm(x, residual, weight, 1e-6, "tp")
        for _ in range(30):
            x.normal_(generator=generator)
            expected = nccl.all_reduce(x.float(), "tp").bfloat16()
            if late.random() < 0.3:
                time.sleep(0.01 * late.random())
            for _ in range(2):
                graph.replay()
            assert torch.equal(work, expected) or (work.float() - expected.float()).abs().max() < 0.05
            if rows > 8:
                norm, total = ops.add_rms_norm(work, residual, weight, 1e-6)
                assert torch.equal(total, normed[1])
                assert (norm.float() - normed[0].float()).abs().max() < 0.05
        everybody = nccl.all_gather(work[None], 0, "tp")
        assert all(torch.equal(everybody[0], each) for each in everybody), "ranks must not drift apart by a bit"
    draws(communicator, nccl, device)
    communicator.check()
    del graph
    communicator.close()
    print("equal")


def draws(communicator, nccl, device: torch.device) -> None:
    """Ids of rows that are split over the ranks are those of one rank with the whole rows, also in a graph."""
    torch.manual_seed(7 + communicator.mesh.rank)
    late = random.Random(communicator.mesh.rank)
    for rows, width, spread in ((1, 31040, 3.0), (8, 31040, 0.3), (64, 124160, 3.0), (200, 4000, 30.0)):
        logits = spread * torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        whole = nccl.all_gather(logits, 1, "tp")
        row = torch.arange(rows, device=device)
        temperature = torch.where(row % 5 == 4, 0.0, 0.5 + 0.1 * (row % 7))
        top_k = torch.tensor([0, 20, 0, 500], device=device)[row % 4].int()
        top_p = torch.tensor([1.0, 0.95, 0.9, 0.99], device=device)[row % 4]
        min_p, seed, output = 0.02 * (row % 3), 7919 * row, row.clone()
        values = (temperature, top_k, top_p, min_p, seed, output)
        sampling.sample(logits, *values, communicator)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            ids = sampling.sample(logits, *values, communicator)
            likeliest = sampling.greedy(logits, communicator)
        for _ in range(20):
            output += 1
            if late.random() < 0.3:
                time.sleep(0.01 * late.random())
            graph.replay()
            assert torch.equal(ids, ops.sample(whole, *values)), (rows, width)
            assert torch.equal(likeliest, ops.sample(whole, 0 * temperature, *values[1:]))
        assert torch.equal(ids, sampling.sample(logits, *values, nccl)), "by reductions ids are the same"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
