"""Builds the native code with ninja: `tokenspeed._cache` (C++, always) and `tokenspeed._C` (CUDA kernels).

The kernels are built where nvcc and a CUDA build of torch are present; TOKENSPEED_CUDA=1 forces them (also on a machine
without a GPU), TOKENSPEED_CUDA=0 forbids them. Torch is found without importing it, which saves seconds.
"""

import os
import re
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from tools.cuda_paths import cuda_include_dirs, find_nvcc  # noqa: E402

ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11: the oldest this binary loads on


def torch_directory() -> Path:
    spec = find_spec("torch")
    if spec is None:
        sys.exit(
            "tokenspeed needs torch to build: run `pip install torch==2.13.0` first (or `make`, which does it all)."
        )
    return Path(spec.origin).parent


def wants_kernels(torch: Path) -> bool:
    mode = os.environ.get("TOKENSPEED_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"TOKENSPEED_CUDA is {mode!r}; it may be 0 (never build kernels), 1 (always) or unset (auto).")
    cuda_torch = re.search(r"^cuda[^=]*= *'", (torch / "version.py").read_text(), re.MULTILINE)
    return mode == "1" or (mode == "auto" and cuda_torch is not None and find_nvcc() is not None)


class NinjaBuild(build_ext):
    """Each extension becomes one ninja file; a rebuild without changes takes under a second."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = ROOT / "build" / "objects" / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(extension, objects, target))
        command = [sys.executable, "-m", "ninja", "-C", str(objects)]
        if subprocess.call(command) != 0:
            sys.exit(f"building {extension.name} failed: the compiler's message stands above.")


def ninja_file(extension: Extension, objects: Path, target: Path) -> str:
    includes = [f"-I{path}" for path in extension.include_dirs]
    cxx = os.environ.get("CXX", "g++")
    flags = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", *extension.extra_compile_args, *includes]
    # NDEBUG matters to nvcc too: with assertions in, ptxas serialises wgmma.
    cuda_flags = ["-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    compile_one = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    lines = [
        "ninja_required_version = 1.5",
        "pool heavy\n  depth = 2",
        f"rule cxx\n  command = {cxx} {' '.join(flags)} {compile_one}",
        f"rule nvcc\n  command = {find_nvcc()} {' '.join([*cuda_flags, ARCHITECTURE, *includes])} {compile_one}"
        "\n  pool = heavy",
        f"rule link\n  command = {cxx} -shared -o $out $in {' '.join(extension.extra_link_args)}",
    ]
    built = []
    for source in extension.sources:
        built.append(str(objects / (Path(source).name + ".o")))
        lines.append(f"build {built[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ROOT / source}")
    lines.append(f"build {target}: link {' '.join(built)}")
    return "\n".join(lines) + "\n"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extensions() -> list[Extension]:
    cache = Extension(
        "tokenspeed._cache",
        sources("csrc/cache/*.cpp"),
        include_dirs=[sysconfig.get_paths()["include"], pybind11.get_include(), str(ROOT / "csrc/cache")],
        extra_compile_args=["-std=c++20"],
    )
    torch = torch_directory()
    if not wants_kernels(torch):
        return [cache]
    if find_nvcc() is None:
        sys.exit("TOKENSPEED_CUDA=1, but there is no nvcc: run `pip install nvidia-cuda-nvcc` or put nvcc on the PATH.")
    toolkit = cuda_include_dirs()
    libraries = [path.parent / name for path in toolkit for name in ("lib64", "lib")]
    kernels = Extension(
        "tokenspeed._C",
        sources("csrc/kernels/*.cu") + sources("csrc/kernels/*.cpp"),
        include_dirs=[str(ROOT / "csrc/kernels"), *map(str, toolkit), str(torch / "include")],
        extra_compile_args=["-std=c++20", "-DUSE_CUDA", STABLE_ABI],
        extra_link_args=[
            f"-L{torch / 'lib'}",
            *(f"-L{path}" for path in libraries if path.is_dir()),
            "-ltorch_cpu -lc10 -lcudart_static -ldl -lrt -lpthread",
        ],
        py_limited_api=True,
    )
    return [cache, kernels]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
