"""Finds the CUDA compiler and headers: an installed toolkit, else the packages on PyPI.

The packages are nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl for the headers, with nvidia-cuda-nvcc and
nvidia-nvvm for the compiler.
"""

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

HEADERS_HINT = (
    "the CUDA headers were not found: install the CUDA toolkit, or "
    "`pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl`"
)
COMPILER_HINT = (
    "nvcc was not found: install the CUDA toolkit, or "
    "`pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl`"
)

DISASSEMBLER_HINT = (
    "cuobjdump and nvdisasm were not found: install the CUDA toolkit, or "
    "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
)


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of PATH, of /usr/local/cuda, or of the PyPI package (with its front end); else None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for root in _pypi_roots():
        if (root / "nvvm" / "bin" / "cicc").exists():  # without nvidia-nvvm, nvcc cannot compile
            candidates.append(root / "bin" / "nvcc")
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def wants_kernels() -> bool:
    """Whether a build here is to compile the CUDA kernels, as far as TOKENSPEED_CUDA and nvcc say."""
    mode = os.environ.get("TOKENSPEED_CUDA", "auto")
    return mode == "1" or (mode == "auto" and find_nvcc() is not None)


def find_cuda_tool(name: str) -> Path | None:
    """A program such as cuobjdump: on PATH, of an installed toolkit, or of its PyPI package; else None."""
    on_path = shutil.which(name)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", *_pypi_roots()]
    candidates = [Path(on_path)] if on_path is not None else []
    candidates += [Path(home) / "bin" / name for home in homes if home]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def cuda_include_dirs() -> list[Path]:
    """The folders that hold cuda_runtime.h, cuda_bf16.h and nv/target, in the order to search them; [] if none do."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    roots = [Path(home) for home in homes if home] + _pypi_roots()
    for root in roots:
        include = root / "include"
        if (include / "cuda_runtime.h").exists() and (include / "crt" / "host_defines.h").exists():
            return [path for path in (include, include / "cccl") if path.is_dir()]
    return []


def _pypi_roots() -> list[Path]:
    """Where NVIDIA's wheels of CUDA 13 and later put their files: site-packages/nvidia/cu<major>."""
    packages = {Path(sysconfig.get_paths()["purelib"]), *map(Path, site.getsitepackages()), *map(Path, sys.path)}
    roots = [root for folder in packages for root in (folder / "nvidia").glob("cu[0-9]*")]
    return sorted(set(roots), key=lambda root: int(root.name.removeprefix("cu")), reverse=True)
