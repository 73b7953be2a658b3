"""Builds the native code with ninja: `tokenspeed._cache` (C++, always) and `tokenspeed._C` (CUDA kernels).

The kernels are built where nvcc and a CUDA build of torch are present; TOKENSPEED_CUDA=1 forces them (also on a machine
without a GPU), TOKENSPEED_CUDA=0 forbids them. Torch is found without importing it, which saves seconds; the cache
needs none.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from tools.cuda_paths import cuda_include_dirs, find_nvcc, wants_kernels  # noqa: E402

CUDA_MODE = os.environ.get("TOKENSPEED_CUDA", "auto")
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"  # torch 2.11: the oldest this binary loads on


def package_folder(name: str) -> Path | None:
    """Found without importing it."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_for_kernels() -> Path | None:
    """Torch's folder where kernels are to be built, else None."""
    torch = package_folder("torch") if wants_kernels() else None
    built_for_cuda = torch and re.search(r"^cuda[^=]*= *'", (torch / "version.py").read_text(), re.M)
    return torch if built_for_cuda or CUDA_MODE == "1" else None


def missing() -> str | None:
    """What a build here lacks, as a sentence; asked when something is to be compiled, as metadata needs none of it."""
    needed = ["pybind11", "ninja", *(["torch"] if CUDA_MODE == "1" else [])]
    for name in needed:
        if package_folder(name) is None:
            return (
                f"the build needs {name}, and this environment has none: run `pip install {name}` first, leave out "
                "--no-build-isolation, or run `make`, which does it all."
            )
    if CUDA_MODE not in ("auto", "0", "1"):
        return f"TOKENSPEED_CUDA is {CUDA_MODE!r}; it may be 0 (no kernels), 1 (always) or unset (auto)."
    if CUDA_MODE == "1" and find_nvcc() is None:
        return "TOKENSPEED_CUDA=1, but there is no nvcc: run `pip install nvidia-cuda-nvcc` or put nvcc on the PATH."
    torch = torch_for_kernels()
    version = (
        re.search(r"^__version__[^=]*= *'((\d+)\.(\d+)[^']*)", (torch / "version.py").read_text(), re.M)
        if torch
        else None
    )
    if version and (int(version[2]), int(version[3])) < (2, 11):
        return f"the CUDA kernels need torch 2.11 or later, and {torch} is {version[1]}: upgrade it."
    return None


class CleanBuild(build):
    """Starts from nothing: what an earlier build left (a module since renamed, kernels since switched off) would enter
    the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    """Each extension becomes one ninja file; a rebuild without changes takes under a second."""

    def run(self) -> None:
        if problem := missing():
            sys.exit(f"error: {problem}")
        super().run()

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = ROOT / "build" / "objects" / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(extension, objects, target))
        command = [sys.executable, "-m", "ninja", "-C", str(objects)]
        if subprocess.call(command) != 0:
            sys.exit(f"error: building {extension.name} failed: the compiler's message stands above.")


def ninja_file(extension: Extension, objects: Path, target: Path) -> str:
    includes = [f"-I{path}" for path in extension.include_dirs]
    cxx = os.environ.get("CXX", "g++")
    flags = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", *extension.extra_compile_args, *includes]
    flags += os.environ.get("CXXFLAGS", "").split()
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
        include_dirs=[
            sysconfig.get_paths()["include"],
            f"{package_folder('pybind11')}/include",
            str(ROOT / "csrc/cache"),
        ],
        extra_compile_args=["-std=c++20"],
    )
    torch = torch_for_kernels()
    if torch is None:
        return [cache]
    toolkit = cuda_include_dirs()
    libraries = [path.parent / name for path in toolkit for name in ("lib64", "lib")]
    kernels = Extension(
        "tokenspeed._C",
        sources("csrc/kernels/*/*.cu") + sources("csrc/kernels/*/*.cpp"),
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


setup(ext_modules=extensions(), cmdclass={"build": CleanBuild, "build_ext": NinjaBuild})
