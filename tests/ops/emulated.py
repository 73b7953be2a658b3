"""`torch.ops.tokenspeed_emulated.*`: the kernels compiled for the host, with the signatures of the real operators."""

import functools
from importlib.util import find_spec
from pathlib import Path

import torch

import tokenspeed.ops
from tokenspeed.ops import extension
from tools.build_emulator import build

ROOT = Path(__file__).resolve().parents[2]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"

_library = torch.library.Library("tokenspeed_emulated", "DEF")


def build_library() -> Path:
    """Every kernel and its binding for the emulated device; only what changed is compiled."""
    torch_home = Path(find_spec("torch").origin).parent
    kernels = ROOT / "csrc" / "kernels"
    flags = ["-DTOKENSPEED_EMULATED", STABLE_ABI, "-isystem", str(torch_home / "include"), f"-L{torch_home / 'lib'}"]
    link = ["-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    sources = sorted([*kernels.rglob("*.cu"), *kernels.rglob("*.cpp")])
    return build(sources, ROOT / "build" / "emulator" / "libkernels.so", [*flags, *link])


@functools.cache
def load(library: Path | None = None) -> frozenset[str]:
    """Declare and load the emulated operators; returns the names of those that have a kernel.

    What a kernel does not serve goes to the torch implementation, as it does on a GPU.
    """
    library = library or build_library()
    extension.declare_torch_implementations()
    for name in tokenspeed.ops.__all__:
        schema = str(getattr(torch.ops.tokenspeed, name).default._schema)
        _library.define(schema.removeprefix("tokenspeed::"))
    torch.ops.load_library(library)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name for name in tokenspeed.ops.__all__ if has_kernel(f"tokenspeed_emulated::{name}", "CPU"))
