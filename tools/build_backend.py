"""The build backend: setuptools', which also asks for torch where the CUDA kernels will be built.

So an isolated `pip install .` compiles the kernels on a machine with nvcc, and downloads no torch to build on others.
"""

import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.cuda_paths import wants_kernels


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + (["torch>=2.11"] if wants_kernels() else [])


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + (["torch>=2.11"] if wants_kernels() else [])
