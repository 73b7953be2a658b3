"""Two processes on one GPU, or on two: the decoder copies out of the prefiller's memory by itself."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from wire import IDENTITY

from tokenspeed.engine.transfer import cuda_ipc
from tokenspeed.engine.transfer.arenas import Arenas
from tokenspeed.engine.transfer.endpoint import Endpoint, address_of

PAGES, SLOTS, PAGE_BYTES, SLOT_BYTES = 64, 4, 1 << 20, 5 << 20

DECODER = """
import sys, time
sys.path[:0] = sys.argv[1:3]
import torch
from test_cuda_ipc import IDENTITY, PAGES, arenas
from tokenspeed.engine.transfer.endpoint import Endpoint
from tokenspeed.engine.transfer.pull import Source, Targets

here = arenas(2, sys.argv[4])
end = Endpoint("127.0.0.1", None, 20.0)
end.register(here, IDENTITY)
end.pull(Source(sys.argv[3], "room", b"prompt"), lambda: Targets({i: PAGES - 1 - i for i in range(PAGES)}, 3))
while not (ended := end.poll()):
    time.sleep(0.001)
mapped = any(peer.arenas is not None for peer in end.pulls._peers.values())
page, slot = here.row_bytes
pages = here.flat[0].view(PAGES, page).flip(0).sum(1).tolist()
print(ended[0].error, mapped, pages, here.flat[1][3 * slot :].sum().item(), sep="|")
end.close()
"""


def arenas(seed: int, device: str) -> Arenas:
    """On a GPU, filled at random."""
    torch.cuda.set_device(device)
    generator = torch.Generator("cuda").manual_seed(seed)
    layout = SimpleNamespace(page_bytes=PAGE_BYTES, slot_bytes=SLOT_BYTES)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device="cuda")

    return Arenas(SimpleNamespace(kv=noise(PAGES, PAGE_BYTES), slots=noise(SLOTS, SLOT_BYTES), layout=layout))


def test_arenas_on_a_cpu_are_not_shared_so():
    layout = SimpleNamespace(page_bytes=8, slot_bytes=8)
    memory = SimpleNamespace(kv=torch.zeros(2, 8), slots=torch.zeros(2, 8, dtype=torch.uint8), layout=layout)
    assert cuda_ipc.readable(Arenas(memory)) == () and cuda_ipc.export(Arenas(memory), ("GPU-1",)) == ()


def test_where_memory_cannot_be_shared_bytes_go_over_the_socket(monkeypatch):
    def refused(storage):
        raise RuntimeError("CUDA error: operation not supported")

    layout = SimpleNamespace(page_bytes=8, slot_bytes=8)
    memory = SimpleNamespace(kv=torch.zeros(2, 8), slots=torch.zeros(2, 8, dtype=torch.uint8), layout=layout)
    monkeypatch.setattr(cuda_ipc, "card", lambda arenas: "GPU-1")
    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", refused)
    assert cuda_ipc.export(Arenas(memory), ("GPU-1",)) == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_unit_is_copied_from_another_process(device):
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = arenas(1, "cuda:0")
    torch.cuda.synchronize()
    end = Endpoint("127.0.0.1", 0, 20.0)
    end.register(there, IDENTITY)
    try:
        end.offer("room", b"prompt", range(PAGES), 2, 0)
        paths = str(Path(__file__).parent), str(Path(__file__).parents[2])
        command = [sys.executable, "-c", DECODER, *paths, address_of(end.host, end.port), device]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        out, _ = child.communicate(timeout=120)
        error, mapped, pages, slot = out.strip().split("|")
        assert error == "None" and mapped == "True", "it went over the socket"
        assert pages == str(there.flat[0].view(PAGES, PAGE_BYTES).sum(1).tolist())
        assert int(slot) == there.flat[1][2 * SLOT_BYTES : 3 * SLOT_BYTES].sum().item()
        time.sleep(0.1)
        assert end.poll() == [("room", None)]
    finally:
        end.close()
