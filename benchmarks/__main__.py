"""Each kernel beside its floor and its peers: `python -m benchmarks [kernel ...] [--json FILE] [--markdown FILE]`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tokenspeed.ops import extension

from .cases import CPU_SIZES, GPU_SIZES, all_cases
from .report import append, header, markdown, measure, plot, run_once, table_line
from .timing import measure_ceilings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("kernel", nargs="*", help="operators to measure; all of them when none is named")
    parser.add_argument("--shape", help="measure only the case of this shape, as a row prints it")
    parser.add_argument("--once", action="store_true", help="run each case three times without timing, for a profiler")
    parser.add_argument("--json", type=Path, help="append each row to this JSONL file as soon as it is measured")
    parser.add_argument("--markdown", type=Path, help="write a table of each kernel into this file")
    parser.add_argument("--plot", type=Path, help="draw the share of the ceiling of each row into this file")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes seconds a row")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = list(all_cases(GPU_SIZES if device == "cuda" else CPU_SIZES))
    unknown = set(options.kernel) - {case.kernel for case in cases}
    if unknown:
        parser.error(f"no benchmark for {', '.join(sorted(unknown))}; there are {sorted({c.kernel for c in cases})}")
    if options.kernel:
        cases = [case for case in cases if case.kernel in options.kernel]
    if options.shape:
        cases = [case for case in cases if case.shape == options.shape]

    built = extension.load()
    if device == "cpu":
        print("No CUDA device: these rows measure the torch implementations on the CPU, not the kernels.")
    elif not built:
        print("The compiled extension is missing: these rows measure the torch implementations on the GPU.")
    if options.once:
        for case in cases:
            run_once(case, device)
        return 0
    ceilings = measure_ceilings(device)
    rows = [header(device, ceilings) | {"compiled_kernels": built and device == "cuda"}]
    print(rows[0])
    if options.json:
        append(options.json, rows[0])
    for case in cases:
        if options.no_compile and case.compiled:
            case = replace(case, compiled=False)
        row = measure(case, device, ceilings)
        rows.append(row)
        print(table_line(row), flush=True)
        if options.json:
            append(options.json, row)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    if options.plot:
        plot(rows, options.plot)
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
