"""Claims about the host side of csrc/kernels/launch.h, on a runtime of pretence: see host/launch_limits.cpp."""

import os
import subprocess

from tests.kernels.test_kernel_tools import HERE, ROOT
from tools.cuda_paths import cuda_include_dirs


def test_threads_that_launch_one_kernel_with_different_sizes_never_lower_each_others_limit(tmp_path):
    program = tmp_path / "launch_limits"
    includes = [f"-I{path}" for path in (ROOT / "csrc" / "kernels", *cuda_include_dirs())]
    source = HERE / "host" / "launch_limits.cpp"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", "-O1", "-pthread", *includes, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2000 launches, 0 failures, 4 attributes set\n"  # two of each function
