"""Builds and runs the C++ fuzz driver: `python -m tests.cache.fuzz --operations 100000000 [--seed 1]`."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build() -> Path:
    """Compiles the driver with sanitizers and assertions where a source is newer than the binary."""
    target = ROOT / "build" / "cache_fuzz"
    sources = [path for path in sorted((ROOT / "csrc/cache").glob("*.cpp")) if path.name != "bindings.cpp"]
    sources.append(ROOT / "tests/cache/fuzz.cpp")
    inputs = [*sources, *(ROOT / "csrc/cache").glob("*.h")]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-g", *SANITIZERS, f"-I{ROOT / 'csrc/cache'}"]
        whole = "".join(f'#include "{path}"\n' for path in sources)  # headers are read once
        subprocess.run([*compiler, "-x", "c++", "-", "-o", str(partial)], input=whole, text=True, check=True)
        partial.replace(target)
    return target


def run(operations: int, seed: int, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(build()), str(operations), str(seed)], text=True, **options)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cache.fuzz", description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    return run(options.operations, options.seed).returncode


if __name__ == "__main__":
    sys.exit(main())
