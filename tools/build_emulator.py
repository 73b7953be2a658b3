"""Builds a shared library of kernels for the emulated device: kernel sources and csrc/emulator, by the host compiler.

`python tools/build_emulator.py --asan` builds the self-test library with AddressSanitizer and runs the emulator's tests
against it (the Makefile's emulator-asan).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.cuda_paths import HEADERS_HINT, cuda_include_dirs  # noqa: E402

EMULATOR = ROOT / "csrc" / "emulator"
SELF_TESTS = ROOT / "tests" / "kernels" / "cuda"
ASAN = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g"]


def compile_flags() -> list[str]:
    """What every object for the emulated device is compiled with; a RuntimeError where the CUDA headers are missing."""
    includes = cuda_include_dirs()
    if not includes:
        raise RuntimeError(HEADERS_HINT)
    return [
        *["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
        *[f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'kernels'}"],
        *[argument for path in includes for argument in ("-isystem", str(path))],
    ]


def build(sources: list[Path], output: Path, own_flags: Sequence[str] = (), common_flags: Sequence[str] = ()) -> Path:
    """Compiles what changed among `sources` (.cu or .cpp) and csrc/emulator/*.cpp, links `output`, and returns it.

    own_flags: not for the emulator's objects, which every library in this folder shares.
    """
    compiler, flags = [os.environ.get("CXX", "g++")], [*compile_flags(), *common_flags]
    own = _objects(output.parent / f"{output.stem}.objects", sources, [*compiler, *flags, *own_flags])
    common = _objects(output.parent / "emulator.objects", sorted(EMULATOR.glob("*.cpp")), [*compiler, *flags])

    def compile_one(stale: tuple[Path, list[str]]) -> None:
        target, command = stale
        subprocess.run([*command, "-o", str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, [(t, c) for t, c in (own | common).items() if not _is_fresh(t)]))  # raises a failure
    built = [*own, *common]
    newest = max(target.stat().st_mtime for target in built)
    if not output.exists() or output.stat().st_mtime < newest:
        link = [*compiler, "-shared", *common_flags, *own_flags, *map(str, built), "-ldl", "-o", str(output)]
        subprocess.run(link, check=True)
    return output


def _objects(folder: Path, sources: list[Path], command: list[str]) -> dict[Path, list[str]]:
    """How each object of a folder is made; those that were made otherwise are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, made = folder / "flags", " ".join(command)
    if not stamp.exists() or stamp.read_text() != made:
        for old in folder.glob("*.o"):
            old.unlink()
        stamp.write_text(made)
    targets = {folder / f"{source.name}.o": source for source in sources}
    return {t: [*command, "-MMD", "-MF", f"{t}.d", "-x", "c++", "-c", str(source)] for t, source in targets.items()}


def build_self_tests(asan: bool = False) -> Path:
    """The library of tests/kernels/cuda, in build/emulator or build/emulator-asan."""
    folder = ROOT / "build" / ("emulator-asan" if asan else "emulator")
    return build(sorted(SELF_TESTS.rglob("*.cu")), folder / "libselftest.so", common_flags=ASAN if asan else ())


def _is_fresh(target: Path) -> bool:
    """Whether the object is newer than everything its dependency file names."""
    dependencies = Path(f"{target}.d")
    if not target.exists() or not dependencies.exists():
        return False
    words = dependencies.read_text().replace("\\\n", " ").split()[1:]
    made = target.stat().st_mtime
    return all(Path(word).exists() and Path(word).stat().st_mtime <= made for word in words)


def run_with_asan() -> int:
    """Builds with AddressSanitizer and runs the emulator's tests in a Python that has its runtime preloaded."""
    library = build_self_tests(asan=True)
    compiler = os.environ.get("CXX", "g++")
    # libstdc++ too, or the runtime finds no exception machinery to intercept in a Python without C++.
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # The interpreter's own allocations never leave; a stack that a fiber abandons is no leak either.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    }
    folder = ROOT / "tests" / "kernels"
    tests = [str(path) for pattern in ("test_emulator*.py", "test_ptx*.py") for path in sorted(folder.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-x", f"--self-test-library={library}", *tests]
    return subprocess.call(command, cwd=ROOT, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asan", action="store_true", help="build with AddressSanitizer and run the emulator's tests")
    arguments = parser.parse_args()
    if arguments.asan:
        sys.exit(run_with_asan())
    print(build_self_tests())


if __name__ == "__main__":
    main()
