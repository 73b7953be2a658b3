"""Compiles every kernel for sm_90a without a GPU and holds it to the budget that its file declares (`make kernels`).

A budget stands in the kernel's file, one line for each kernel function, for all its instantiations:

    // budget: rms_norm_kernel registers<=64 shared<=1K hot sass=HMMA

`registers` is per thread; `shared` is what ptxas sees, which excludes dynamic shared memory; `hot` forbids spills and
local memory; `sass` names an instruction that the machine code must hold (checked where cuobjdump is found). Results
go to build/kernels.json and, as a table, to the terminal. Fails past a budget, on a kernel without one, on a budget
without a kernel, on any ptxas warning C75xx (wgmma serialised), and on a bulk copy whose operand ptxas moves to its
uniform register under another predicate than the copy's (stale_operands). Unchanged files are not compiled again.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.cuda_paths import (  # noqa: E402
    COMPILER_HINT,
    DISASSEMBLER_HINT,
    cuda_include_dirs,
    find_cuda_tool,
    find_nvcc,
)

KERNELS = ROOT / "csrc" / "kernels"
SELF_TESTS = ROOT / "tests" / "kernels" / "cuda"
BUILD = ROOT / "build"
FLAGS = [
    *["-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr"],
    *["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage", "-cubin"],
]


@dataclass
class Kernel:
    """One compiled kernel function; sizes in bytes, registers per thread."""

    name: str
    symbol: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0


@dataclass
class Report:
    file: str
    key: str
    seconds: float = 0.0
    failed: bool = False
    log: str = ""
    kernels: list[Kernel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Budget:
    registers: int
    shared: int
    hot: bool
    instruction: str | None


def function_name(symbol: str) -> str:
    """The unqualified name in a mangled symbol: _ZN10tokenspeed8rms_normI6__halfEEvPKT_ -> rms_norm."""
    match = re.match(r"_Z(N?)", symbol)
    if match is None:
        return symbol  # extern "C"
    position, name = match.end(), symbol
    while found := re.match(r"L?(\d+)", symbol[position:]):
        start = position + found.end()
        position = start + int(found[1])
        name = symbol[start:position]
    return name


def parse_ptxas(log: str) -> list[Kernel]:
    """What `ptxas -v` says of each entry function."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    properties_of = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for", line):
            current = kernels.setdefault(match[1], Kernel(function_name(match[1]), match[1]))
        elif match := re.search(r"Function properties for (\S+)", line):
            properties_of = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            owner = kernels.get(properties_of, current)
            if owner is not None:  # a device function that was not inlined counts for its kernel
                owner.stack = max(owner.stack, int(match[1]))
                owner.spill_stores += int(match[2])
                owner.spill_loads += int(match[3])
        elif (match := re.search(r"Used (\d+) registers(.*)", line)) and current is not None:
            current.registers = int(match[1])
            shared = re.search(r"(\d+)(?:\+(\d+))? bytes smem", match[2])
            current.shared = sum(int(part) for part in shared.groups() if part) if shared else 0
    return list(kernels.values())


def parse_budgets(source: str) -> dict[str, Budget]:
    """The `// budget:` lines of a file, by kernel name. Raises ValueError on one that says something unknown."""
    budgets = {}
    for line in re.findall(r"^\s*// budget: *(.*)$", source, re.MULTILINE):
        name, *words = line.split()
        limits: dict[str, int] = {}
        instruction = None
        for word in words:
            if match := re.fullmatch(r"(registers|shared)<=(\d+)(K?)", word):
                limits[match[1]] = int(match[2]) * (1024 if match[3] else 1)
            elif word.startswith("sass="):
                instruction = word.removeprefix("sass=")
            elif word != "hot":
                raise ValueError(f"budget of {name}: {word!r} is none of registers<=N, shared<=N[K], sass=NAME, hot")
        if "registers" not in limits:
            raise ValueError(f"budget of {name}: registers<=N is missing")
        budgets[name] = Budget(limits["registers"], limits.get("shared", 0), "hot" in words, instruction)
    return budgets


def compile_file(nvcc: Path, source: Path, key: str) -> Report:
    report = Report(str(source.relative_to(ROOT)), key)
    cubin = BUILD / "cubin" / f"{source.stem}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{KERNELS}", *(f"-I{path}" for path in cuda_include_dirs())]
    started = time.monotonic()
    done = subprocess.run(
        [str(nvcc), *FLAGS, *includes, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
    )
    report.seconds = round(time.monotonic() - started, 1)
    report.failed = done.returncode != 0
    report.log = (done.stdout + done.stderr) if report.failed else ""
    report.kernels = parse_ptxas(done.stderr)
    report.warnings = [line.strip() for line in done.stderr.splitlines() if "warning" in line.lower() or "C75" in line]
    return report


# What ptxas 13.0 makes of a cache policy beside a shared address of which a part is in a uniform register.
_MISENCODED = re.compile(r"LDGSTS\S* \[R\d+\+UR0\b[^]]*\], desc\[UR1\]")


def check(report: Report, budgets: dict[str, Budget], sass: str | None) -> list[str]:
    """What is wrong with a compiled file, as a sentence."""
    faults = [f"{report.file}: does not compile"] if report.failed else []
    faults += [f"{report.file}: {line}" for line in report.warnings if re.search(r"C75\d\d", line)]
    for kernel in report.kernels:
        where = f"{report.file}: {kernel.name}"
        budget = budgets.get(kernel.name)
        if budget is None:
            faults.append(f"{where} declares no budget (// budget: {kernel.name} registers<=N ...)")
            continue
        if kernel.registers > budget.registers:
            faults.append(f"{where} uses {kernel.registers} registers, budget {budget.registers}")
        if kernel.shared > budget.shared:
            faults.append(f"{where} uses {kernel.shared} bytes of shared memory, budget {budget.shared}")
        if budget.hot and (kernel.spill_stores or kernel.spill_loads or kernel.stack):
            faults.append(
                f"{where} is hot but spills {kernel.spill_stores} + {kernel.spill_loads} bytes and has {kernel.stack} "
                "bytes of stack"
            )
        body = _function_body(sass, kernel.symbol) if sass is not None else None
        if budget.instruction and body is not None and budget.instruction not in body:
            faults.append(f"{where} holds no {budget.instruction} instruction")
        faults += [f"{where}: operand set under another predicate: {line}" for line in stale_operands(body or "")]
    if sass is not None and _MISENCODED.search(sass):
        faults.append(
            f"{report.file}: a cp.async with a cache policy has lost a register in ptxas, and the card will not take "
            "it: its shared address must be ptx::opaque"
        )
    compiled = {kernel.name for kernel in report.kernels}
    if not report.failed:
        faults += [f"{report.file}: budget of {name}, which is no kernel" for name in budgets if name not in compiled]
    return faults


def _function_body(sass: str, symbol: str) -> str:
    body = re.search(rf"Function : {re.escape(symbol)}\n(.*?)(?:Function : |\Z)", sass, re.DOTALL)
    return body[1] if body is not None else ""


def stale_operands(body: str) -> list[str]:
    """Bulk copies and prefetches of a function's machine code whose operand may be what the register held before.

    Where ptxas 13.0 makes predicates of the branch around such an instruction, it may move an operand to its uniform
    register (`@P1 R2UR UR8, R42`) before P1 is the branch's condition. The instruction has the condition in a uniform
    predicate, which VOTEU makes of P1 or its copy: this finds moves whose predicate is written between them and VOTEU.
    """
    code = re.findall(r"^[ \t]+(?:/\*([0-9a-f]+)\*/[ \t]+)?(?:@(!?U?P\w+)[ \t]+)?(\S+)(.*?)[ \t]*;", body, re.MULTILINE)
    places = {int(place, 16): i for i, (place, *_) in enumerate(code) if place}
    in_loop = set()  # over the values that a warp's lanes have: predicates there are the loop's own
    for i, (_, _, name, operands) in enumerate(code):
        if name == "BRA.U.ANY":
            in_loop.update(range(places.get(int(operands.split()[-1], 16), i), i))
    stale = []
    for i, (_, predicate, name, operands) in enumerate(code):
        if not predicate or not name.startswith("R2UR") or i in in_loop:
            continue
        register = operands.split(",")[0].strip()
        written, after = False, set[str]()  # uniform predicates made after the move's predicate was written anew
        for _, guard, use, arguments in code[i + 1 :]:
            results = [word.strip() for word in arguments.split(",")[:2]]
            if use.startswith(("UTMA", "UBLK")) and re.search(rf"\b{register}\b", arguments):
                if guard.lstrip("!") in after:
                    stale.append(f"{use}{arguments}: @{predicate} {name}{operands}")
                break
            if use in ("BRA", "BRA.U", "EXIT", "RET"):
                break
            if not guard and use.startswith(("ISETP", "PLOP3", "FSETP")) and predicate.lstrip("!") in results:
                written = True
            elif use.startswith("VOTEU") and written:
                after.add(results[0])
    return stale


def _disassemble(cubin: Path) -> str | None:
    tool = find_cuda_tool("cuobjdump")
    if tool is None or find_cuda_tool("nvdisasm") is None:  # cuobjdump calls the other
        print(f"{cubin.stem}: instructions not checked: {DISASSEMBLER_HINT}")
        return None
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def table(reports: list[Report]) -> str:
    head = f"{'kernel':<56} {'regs':>5} {'shared':>7} {'stack':>6} {'spill st/ld':>12} {'seconds':>8}"
    lines = [head, "-" * len(head)]
    for report in reports:
        lines.append(f"{report.file:<56} {'':>5} {'':>7} {'':>6} {'':>12} {report.seconds:>8}")
        for kernel in report.kernels:
            spills = f"{kernel.spill_stores}/{kernel.spill_loads}"
            numbers = f"{kernel.registers:>5} {kernel.shared:>7} {kernel.stack:>6} {spills:>12}"
            lines.append(f"  {kernel.name[:54]:<54} {numbers}")
        lines += [f"  {warning}" for warning in report.warnings]
    return "\n".join(lines)


def _previous() -> dict[str, Report]:
    path = BUILD / "kernels.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {
        entry["file"]: Report(**{**entry, "kernels": [Kernel(**kernel) for kernel in entry["kernels"]]})
        for entry in stored
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these files, by stem; all by default")
    names = parser.parse_args().names
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit(COMPILER_HINT)
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    headers = b"".join(path.read_bytes() for path in sorted(KERNELS.rglob("*.h")))
    previous = _previous()
    reports, faults = [], []
    for source in [*sorted(KERNELS.rglob("*.cu")), *sorted(SELF_TESTS.glob("*.cu"))]:
        if names and source.stem not in names:
            continue
        key = hashlib.sha256(headers + source.read_bytes() + " ".join([*FLAGS, version]).encode()).hexdigest()
        report = previous.get(str(source.relative_to(ROOT)))
        if report is None or report.key != key or report.failed:
            report = compile_file(nvcc, source, key)
        reports.append(report)
        if report.failed:
            print(report.log)
        if source.parent == SELF_TESTS:
            faults += [f"{report.file}: does not compile"] if report.failed else []
            continue
        try:
            budgets = parse_budgets(source.read_text())
        except ValueError as error:
            faults.append(f"{report.file}: {error}")
            continue
        wants_sass = not report.failed and any(budget.instruction for budget in budgets.values())
        faults += check(report, budgets, _disassemble(BUILD / "cubin" / f"{source.stem}.cubin") if wants_sass else None)
    BUILD.mkdir(exist_ok=True)
    kept = {**previous, **{report.file: report for report in reports}}
    (BUILD / "kernels.json").write_text(json.dumps([asdict(report) for report in kept.values()], indent=1) + "\n")
    print(table(reports))
    for fault in faults:
        print(f"FAULT {fault}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
