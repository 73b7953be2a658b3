"""Holds kernels to the dialect in which one source runs on the card and in the emulator (csrc/kernels/README.md)."""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What may not stand in a kernel or a shared header, outside comments and strings, and what to write instead.
RULES = [
    (r"<<<", "start kernels with launch()"),
    (r"\b__shared__\b", "shared memory comes from DYNAMIC_SHARED"),
    (r"\b__CUDA_ARCH__\b", "one source for every machine: no __CUDA_ARCH__"),
    (r"\bcooperative_groups\b", "use ptx.h and warp intrinsics, not cooperative_groups"),
    (r"\basm\b", "PTX belongs in ptx.h, ptx_tma.h or ptx_wgmma.h"),
    (r"^\s*#\s*(if|ifdef|ifndef|elif|else)\b", "no conditional compilation in a kernel"),
    (r"\bprintf\s*\(", "no printf in a kernel"),
    (r"\b__activemask\b", "name the lanes that take part"),
    (r"\b(cudaMalloc|cudaFree|cudaDeviceSynchronize|cudaStreamSynchronize)", "a launcher neither allocates nor waits"),
    (r"\bwhile\s*\([^;{]*\b(load_acquire|mbarrier_test)\b", "wait with wait_at_least or mbarrier_wait"),
    (r"\bvolatile\b", "share memory between blocks through load_acquire and store_release"),
    (r"\bload_16_read_only\((?![^;]*[wW]eight)", "read-only loads are for weights: the kernel ahead may still write"),
    (r"\b(cudaLaunchKernel\w*|cudaFuncSetAttribute)\b", "start kernels with launch()"),
]
INCLUDES = [
    (r'#include\s+"(ptx|launch|vector|reduce|tensor_layout)', "include shared headers with <>: the path picks them"),
    (r"#include\s+[<\"](torch|ATen|c10)/", "only the files of bindings/ know torch"),
]
WRAPPERS = {"ptx.h", "ptx_tma.h", "ptx_wgmma.h"}
HOST_ONLY = {"launch.h", "launch_config.h"}  # the launch helper itself


def without_comments_and_strings(source: str) -> str:
    """The source with comments and literals blanked, line breaks kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), source, flags=re.DOTALL)


def lint(path: Path) -> list[str]:
    source = path.read_text()
    faults = []

    def search(rules: list[tuple[str, str]], text: str) -> None:
        for pattern, advice in rules:
            for match in re.finditer(pattern, text, re.MULTILINE):
                line = text.count("\n", 0, match.start()) + 1
                faults.append(f"{path.relative_to(ROOT)}:{line}: {match[0].strip()!r}: {advice}")

    search(INCLUDES, source)
    if path.name not in WRAPPERS | HOST_ONLY:
        search(RULES, without_comments_and_strings(source))
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="by default csrc/kernels and the self-tests")
    files = [path.resolve() for path in parser.parse_args().files] or [
        *sorted((ROOT / "csrc" / "kernels").rglob("*.cu")),
        *sorted(path for path in (ROOT / "csrc" / "kernels").rglob("*.h") if not path.name.startswith("binding")),
        *sorted((ROOT / "tests" / "kernels" / "cuda").rglob("*.cu")),
    ]
    faults = [fault for path in files for fault in lint(path)]
    print("\n".join(faults) if faults else f"{len(files)} kernel files keep the dialect")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
