"""Checks and measures the kernels on this machine's GPU, within ten minutes: `python3 tools/gpu_check.py`.

In this order, each in processes of their own with a time limit, results appended as they come: clocks and ceilings; the
self-tests of the PTX wrappers, recorded; the GPU tests; the benchmarks; compute-sanitizer on a few tests; the two
kernels furthest from their ceiling under ncu. It needs no network, and but for the self-tests no compiler: it runs the
extension that stands in tokenspeed/, built here or elsewhere.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("ceilings", "goldens", "tests", "benchmarks", "sanitizer", "profile")
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-o",
    "addopts=--import-mode=importlib",
    "-q",
    "-p",
    "no:cacheprovider",
    "--every-case",
]
TEST_SECONDS, TEST_PROCESSES = 120, 14
SANITIZER_SECONDS = 150
# Short tests with shared memory, ragged ends, or writes at computed places.
SANITIZED = {
    "memcheck": ("test_norm.py", "test_conv.py", "test_copies.py", "test_moe.py", "test_attention_inputs.py"),
    "racecheck": ("test_norm.py", "test_moe.py"),
}
SANITIZER_FILTER = "cuda and not any_batch and not every_length and not experts"
CEILINGS = (
    "import json; from dataclasses import asdict; from benchmarks.timing import clock_mhz, measure_ceilings; "
    "print(json.dumps(asdict(measure_ceilings('cuda')) | {'clock_mhz': clock_mhz('cuda')}))"
)


@dataclass(frozen=True, slots=True)
class Run:
    """Where results go, and when the whole check must be over."""

    output: Path
    deadline: float

    def seconds_left(self, at_most: float) -> float:
        return max(min(at_most, self.deadline - time.monotonic()), 0)

    def append(self, file: str, row: dict) -> None:
        with (self.output / file).open("a") as out:
            out.write(json.dumps(row) + "\n")


def execute(command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit code and output of a command in an environment with `variables`; None where it ran into its time limit."""
    if seconds <= 1:
        return None, "no time was left to start it"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | variables
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, timeout=seconds, check=False, **options)
    except subprocess.TimeoutExpired as expired:
        out = expired.stdout or b""
        return None, out.decode(errors="replace") if isinstance(out, bytes) else out
    return done.returncode, done.stdout


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on the PATH or in the places where the toolkit puts it."""
    places = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*"))]
    return shutil.which(name) or next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None)


def report_ceilings(run: Run) -> bool:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    smi = find_tool("nvidia-smi")
    card = execute([smi, f"--query-gpu={query}", "--format=csv"], run.seconds_left(20))[1] if smi else "no nvidia-smi"
    code, out = execute([sys.executable, "-c", CEILINGS], run.seconds_left(90))
    row = {"nvidia_smi": card.strip().splitlines(), "exit": code}
    last = out.strip().splitlines()[-1] if out.strip() else ""
    row |= json.loads(last) if code == 0 else {"output": out[-2000:]}
    print(json.dumps(row, indent=1))
    run.append("machine.jsonl", row)
    return code == 0


def record_goldens(run: Run) -> bool:
    """The self-tests of the PTX wrappers on the card; what it computes is kept, for machines without one to replay."""
    tests = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_ptx_*.py"))
    code, out = execute([*PYTEST, "--device", "cuda", "--record-golden", *tests], run.seconds_left(150))
    print(out[-3000:])
    golden = ROOT / "tests" / "kernels" / "golden.npz"
    if golden.exists():
        shutil.copy(golden, run.output)
    return code == 0


def gpu_tests(run: Run) -> dict[str, list[str]]:
    """The test functions that have a case on the GPU, by file."""
    _, out = execute([*PYTEST, "--collect-only", "-k", "cuda", "tests/ops", "tests/kernels"], run.seconds_left(120))
    functions = {line.split("[")[0] for line in out.splitlines() if "::" in line and "cuda" in line}
    by_file: dict[str, list[str]] = {}
    for function in sorted(functions):
        by_file.setdefault(function.split("::")[0], []).append(function)
    return by_file


def run_test(run: Run, test: str) -> dict:
    """Run a file or a function of the GPU tests in a process of its own."""
    start = time.monotonic()
    code, out = execute([*PYTEST, "-k", "cuda", test], run.seconds_left(TEST_SECONDS))
    summary = out.strip().splitlines()[-1] if out.strip() else ""
    outcome = "failed" if code != 0 else "passed" if " passed" in summary else "skipped"
    row = {"test": test, "outcome": outcome, "exit": code, "summary": summary}
    row["seconds"] = round(time.monotonic() - start, 1)
    return row | ({"output": out[-6000:]} if outcome == "failed" else {})


def run_tests(run: Run) -> bool:
    """Each file in a process; the functions of a file that fails, one by one, since a fault ends the whole process."""
    by_file = gpu_tests(run)
    with ThreadPoolExecutor(min(TEST_PROCESSES, os.cpu_count() or 1)) as pool:
        files = list(pool.map(lambda file: run_test(run, file), by_file))
        again = [function for row in files if row["outcome"] == "failed" for function in by_file[row["test"]]]
        functions = list(pool.map(lambda function: run_test(run, function), again))
    for row in files + functions:
        run.append("tests.jsonl", row)
        print(f"{row['outcome']} {row['test']} {row['summary']}")
        if "::" in row["test"] and "output" in row:
            print(row["output"][-1500:], flush=True)
    return bool(files) and not any(row["outcome"] == "failed" for row in files)


def run_benchmarks(run: Run) -> bool:
    rows, figure = run.output / "benchmarks.jsonl", run.output / "benchmarks.png"
    command = [sys.executable, "-m", "benchmarks", "--json", str(rows), "--plot", str(figure)]
    code, out = execute(command, run.seconds_left(270))
    print(out[-9000:])
    return code == 0


def run_sanitizer(run: Run) -> bool:
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not installed")
        return True

    def check(tool_and_file: tuple[str, str]) -> bool:
        tool, file = tool_and_file
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += [*PYTEST, "-k", SANITIZER_FILTER, f"tests/ops/{file}"]
        # Without torch's cache each tensor is an allocation of its own, whose borders memcheck knows.
        code, out = execute(command, run.seconds_left(SANITIZER_SECONDS), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        print(f"{tool} {file}: {'clean' if code == 0 else f'exit {code}'}", flush=True)
        run.append("sanitizer.jsonl", {"tool": tool, "file": file, "exit": code, "output": out[-4000:]})
        return code == 0

    jobs = [(tool, file) for tool, files in SANITIZED.items() for file in files]
    with ThreadPoolExecutor(4) as pool:
        return all(list(pool.map(check, jobs)))


def furthest_from_ceiling(rows: Iterable[dict], count: int = 2) -> list[dict]:
    """The worst row of each of the worst kernels, among those long enough for bandwidth to matter."""
    worst: dict[str, dict] = {}
    for row in rows:
        if row.get("us", 0) >= 10:
            known = worst.get(row["kernel"])
            if known is None or row["percent_of_ceiling"] < known["percent_of_ceiling"]:
                worst[row["kernel"]] = row
    return sorted(worst.values(), key=lambda row: row["percent_of_ceiling"])[:count]


def run_profiler(run: Run) -> bool:
    profiler, rows = find_tool("ncu"), run.output / "benchmarks.jsonl"
    if profiler is None or not rows.exists():
        print("ncu: not installed" if profiler is None else "ncu: there are no benchmark rows to choose from")
        return True
    ok = True
    for row in furthest_from_ceiling(json.loads(line) for line in rows.read_text().splitlines()):
        command = [profiler, "--clock-control", "none", "--set", "detailed", "--kernel-name-base", "demangled"]
        command += ["--kernel-name", "regex:tokenspeed", "--launch-count", "2", sys.executable, "-m", "benchmarks"]
        command += [row["kernel"], "--shape", row["shape"], "--once"]
        code, out = execute(command, run.seconds_left(90))
        with (run.output / "profile.txt").open("a") as file:
            file.write(f"==== {row['kernel']} {row['shape']} (exit {code})\n{out[-60000:]}\n")
        print(f"ncu {row['kernel']} {row['shape']}: exit {code}")
        ok &= code == 0
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu-check", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="the whole check ends within this time")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="leave out what is not named")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    run = Run(options.output.resolve(), time.monotonic() + 60 * options.minutes)
    if execute([sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"], run.seconds_left(60))[0] != 0:
        print("gpu-check needs a GPU that torch can use, and there is none here")
        return 2
    functions = (report_ceilings, record_goldens, run_tests, run_benchmarks, run_sanitizer, run_profiler)
    by_name = dict(zip(STEPS, functions, strict=True))
    outcome = {}
    for step in options.steps:
        start = time.monotonic()
        outcome[step] = by_name[step](run)
        print(f"---- {step}: {'ok' if outcome[step] else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return 0 if all(outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
