"""Hit rates and speed of the prefix cache, without a model.

`--trace FILE` replays a conversation trace; `--agents N` makes N agent sessions; `--speed` times the calls of one
100,000-token prompt.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from tokenspeed.engine.schedule.cache import CacheConfig, Policy

from . import agents, speed, trace
from .replay import replay

PAGE = 64


def show(row: dict) -> None:
    print(f"{row['label']:<34} hit_rate {row['hit_rate']:.4f}  kv_ideal {row['kv_ideal']:.4f}", end="")
    if "clairvoyant" in row:
        print(f"  clairvoyant {row['clairvoyant']:.4f}", end="")
    stats = row["stats"]
    print(
        f"  share of ideal {row['hit_rate'] / max(row['kv_ideal'], 1e-9):.3f}"
        f"\n    recomputed though KV matched {row['recomputed_though_matched']:,} tokens, snapshots written "
        f"{stats['snapshots_published'] + stats['snapshots_donated']:,}, evicted {stats['snapshots_evicted']:,}, "
        f"pages evicted {stats['pages_evicted']:,}, refused {row['refused']}"
        + (f", moved out {stats['moved_out']:,}, back {stats['moved_in']:,}" if row["host_slots"] else "")
        + "\n    microseconds per call "
        + ", ".join(f"{name} {value}" for name, value in row["microseconds"].items()),
        flush=True,
    )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for policy, hosted in dict.fromkeys((row["policy"], row["host_slots"] > 0) for row in rows):
        own = [row for row in rows if (row["policy"], row["host_slots"] > 0) == (policy, hosted)]
        points = sorted((row["slots"], row["hit_rate"]) for row in own)
        axes.plot(*zip(*points, strict=True), marker="o", label=policy + " and a host tier" * hosted)
    if bound := sorted(
        (row["slots"], row["clairvoyant"]) for row in rows if "clairvoyant" in row and not row["host_slots"]
    ):
        axes.plot(*zip(*bound, strict=True), marker=".", linestyle="--", label="clairvoyant bound")
    axes.axhline(rows[0]["kv_ideal"], linestyle=":", color="grey", label="unlimited KV and states")
    axes.set(xscale="log", xlabel="state slots", ylabel="hit rate (tokens resumed / prompt tokens)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix_cache", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE", help="JSONL with input_length and hash_ids per line")
    source.add_argument("--agents", type=int, metavar="N", help="make this many agent sessions")
    source.add_argument("--speed", action="store_true", help="time the calls of one 100,000-token prompt")
    parser.add_argument("--kv-tokens", type=int, metavar="N", help="KV capacity; enough for everything when left out")
    parser.add_argument("--state-slots", type=int, nargs="+", metavar="N", help="one replay each; 0: as many as wanted")
    parser.add_argument("--host-tokens", type=int, default=0, metavar="N", help="KV capacity of a host tier; 0: none")
    parser.add_argument("--host-slots", type=int, metavar="N", help="its state slots (default: one for 8,192 tokens)")
    parser.add_argument("--policy", choices=["value", "lru"], help="only this one; lru keeps prompt ends alone")
    parser.add_argument("--grid-tokens", type=int, default=8192, help="grid of optional snapshots; 0: none")
    parser.add_argument("--edits", type=float, default=0.05, help="share of agent turns that edit the last message")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows there")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw hit rate against slots")
    options = parser.parse_args()
    if options.host_tokens < 0 or any(slots < 0 for slots in options.state_slots or []):
        parser.error("slots cannot be negative")

    if options.speed:
        rows = speed.measure()
        speed.show(rows)
    else:
        rows = replays(options)
        if options.plot:
            plot(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def replays(options: argparse.Namespace) -> list[dict]:
    if options.trace:
        records = trace.read(options.trace)
        count = len(records)
        everything = sum(PAGE * (record.length // PAGE + 1) for record in records)
    else:
        shape = agents.Shape(sessions=options.agents, edits=options.edits, seed=options.seed)
        made = list(agents.turns(shape))
        count = len(made)
        everything = sum(len(turn.prompt) + len(turn.output) + PAGE for turn in made)
    pages = (options.kv_tokens or everything) // PAGE + 1
    rows = []
    for slots in options.state_slots or ([64, 256, 1024, 0] if options.trace else [2 * options.agents, 0]):
        name = "unlimited" if slots == 0 else str(slots)
        actual = slots or 4 * count + 8
        tiers = [(0, 0)]
        if options.host_tokens:
            tiers.append((options.host_tokens // PAGE, options.host_slots or max(options.host_tokens // 8192, 1)))
        policies = [options.policy] if options.policy else ["value", "lru"]
        for policy, (host_pages, host_slots) in itertools.product(policies, tiers):
            config = CacheConfig(
                pages=pages,
                slots=actual,
                host_pages=host_pages,
                host_slots=host_slots,
                ghost_nodes=pages,
                grid_tokens=options.grid_tokens if policy == "value" else 0,
                policy=Policy.VALUE if policy == "value" else Policy.LRU,
                branch_points=policy == "value",
            )
            source = trace.turns(records) if options.trace else made
            beside = f" + {host_slots} in host memory" if host_slots else ""
            row = replay(config, source, count, f"{name} slots{beside}, {policy}")
            row |= {
                "slots": actual,
                "policy": policy,
                "kv_tokens": pages * PAGE,
                "host_slots": host_slots,
                "host_tokens": host_pages * PAGE,
            }
            if options.trace and policy == "value":
                row["clairvoyant"] = trace.clairvoyant(records, actual + host_slots)
            show(row)
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
