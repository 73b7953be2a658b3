"""Rows of the benchmark: how a case becomes one, how it is printed, stored and plotted."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from .cases import Case, Inputs, torch_implementation
from .timing import Ceilings, Timing, clock_mhz, input_sets, time_interleaved


def run_once(case: Case, device: str) -> None:
    """Call the operator three times on one set of inputs."""
    arguments = case.inputs(Inputs(device))
    for _ in range(3):
        case.run(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, device: str, ceilings: Ceilings) -> dict:
    """Time a case beside its peers. Returns the row: plain values, ready for JSON."""
    with torch.inference_mode():
        sets = input_sets(lambda: case.inputs(Inputs(device)), device)
        contenders = {"tokenspeed": case.run, **{name: peer for name, peer in case.peers.items() if peer}}
        if case.compiled and device == "cuda":
            contenders["torch.compile"] = torch.compile(torch_implementation(case.kernel), dynamic=False)
        results = time_interleaved(contenders, sets, device)
    ours = results.pop("tokenspeed")
    row: dict = {"kernel": case.kernel, "shape": case.shape, "device": device, "input_sets": len(sets)}
    if isinstance(ours, str):
        return row | {"failed": ours}
    clock = clock_mhz(device)
    reached = case.flops / ours.median / 1e6 if case.ceiling == "matmul" else case.bytes / ours.median / 1e3
    peers = {name: _peer(results.get(name, "missing"), ours) for name in [*case.peers, *results]}
    ranked = {name: peer["ratio"] for name, peer in peers.items() if "ratio" in peer}
    best = min(ranked, key=ranked.get) if ranked else None
    return row | {
        "us": round(ours.median, 3),
        "fastest_us": round(ours.fastest, 3),
        "method": ours.method,
        "cycles": round(ours.median * clock) if clock else None,
        "gb_per_s": round(case.bytes / ours.median / 1e3, 1),
        "tflops": round(case.flops / ours.median / 1e6, 2) if case.flops else None,
        "ceiling": case.ceiling,
        "percent_of_ceiling": round(100 * reached / getattr(ceilings, case.ceiling), 1),
        "peers": peers,
        "best_peer": best,
        "ratio": ranked[best] if best else "unranked",
    }


def _peer(result: Timing | str, ours: Timing) -> dict:
    if isinstance(result, str):
        return {"missing": True} if result == "missing" else {"failed": result}
    # Above 1: ours is faster.
    return {"us": round(result.median, 3), "ratio": round(result.median / ours.median, 3), "method": result.method}


def table_line(row: dict) -> str:
    head = f"{row['kernel']:<24} {row['shape']:<34}"
    if "failed" in row:
        return f"{head} FAILED {row['failed']}"
    rate = f"{row['tflops']:8.1f} TF" if row["ceiling"] == "matmul" else f"{row['gb_per_s']:8.1f} GB"
    peers = ", ".join(
        f"{name} {peer['ratio']:.2f}x" if "ratio" in peer else f"{name} {'missing' if 'missing' in peer else 'failed'}"
        for name, peer in row["peers"].items()
    )
    percent = f"{row['percent_of_ceiling']:5.1f}% of {row['ceiling']}"
    return f"{head} {row['us']:10.2f} us {rate}/s {percent:<17} {peers or 'unranked'}"


def markdown(rows: Iterable[dict]) -> str:
    """A heading and a table for each kernel, in the order of its first row; a peer marked * has its launches timed."""
    kernels: dict[str, list[dict]] = {}
    for row in rows:
        if "kernel" in row:
            kernels.setdefault(row["kernel"], []).append(row)
    lines = []
    for kernel, group in kernels.items():
        flops = any(row.get("tflops") for row in group)
        columns = ["shape", "time", "GB/s", *["TFLOP/s"] * flops, "% of ceiling", "peers"]
        lines += [f"### {kernel}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in group:
            if "failed" in row:
                cells = [row["failed"], *[""] * (len(columns) - 2)]
            else:
                time = f"{row['us']:.1f} us" if row["us"] < 1000 else f"{row['us'] / 1000:.2f} ms"
                rates = [f"{row['gb_per_s']:.0f}", *[f"{row['tflops'] or 0:.1f}"] * flops]
                peers = (
                    f"{name} {peer['ratio']:.2f}x{'*' * (peer['method'] != row['method'])}"
                    if "ratio" in peer
                    else f"{name} failed"
                    for name, peer in row["peers"].items()
                    if "missing" not in peer
                )
                cells = [time, *rates, f"{row['percent_of_ceiling']:.0f}% of {row['ceiling']}", ", ".join(peers)]
            lines.append(f"| {' | '.join([row['shape'], *cells])} |")
        lines.append("")
    return "\n".join(lines)


def header(device: str, ceilings: Ceilings) -> dict:
    """The first row: the machine and its ceilings."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rounded = {key: round(value, 3) for key, value in asdict(ceilings).items()}
    return {"machine": name, "torch": torch.__version__, "clock_mhz": clock_mhz(device), "ceilings": rounded}


def append(path: Path, row: dict) -> None:
    """Add one row to a JSONL file, so that what is measured survives whatever happens next."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def plot(rows: Iterable[dict], path: Path) -> None:
    """Bars of the share of the ceiling, one per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "us" in row]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.24 * len(rows)), layout="constrained")
    labels = [f"{row['kernel']}  {row['shape']}" for row in rows]
    axes.barh(range(len(rows)), [row["percent_of_ceiling"] for row in rows], color="#3b6ea5")
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the ceiling measured in the same run")
    for number, row in enumerate(rows):
        ratio = row["ratio"]
        note = ratio if isinstance(ratio, str) else f"{ratio:.2f}x {row['best_peer']}"
        axes.text(row["percent_of_ceiling"] + 1, number, f"{row['us']:.1f} us, {note}", va="center", fontsize=6)
    axes.set_xlim(0, max(140, *(row["percent_of_ceiling"] + 45 for row in rows)) if rows else 140)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
