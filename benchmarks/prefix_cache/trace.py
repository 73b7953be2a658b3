"""Conversation traces: one JSON object per line with input_length and hash_ids, one id per block of 512 tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .replay import Turn

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Record:
    length: int  # tokens of the prompt
    blocks: tuple[int, ...]

    @property
    def end(self) -> int:
        """Whole blocks below the last token. The prompt's own last block is ragged and almost never comes back, so this
        is the boundary that stands for the end of the prompt."""
        return min((self.length - 1) // BLOCK, len(self.blocks))


def read(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            records.append(Record(int(entry["input_length"]), tuple(map(int, entry["hash_ids"]))))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}:{number}: expected an object with input_length and hash_ids ({error!r})"
            ) from error
    return records


def turns(records: list[Record]) -> Iterator[Turn]:
    """Every block id becomes 512 tokens of its own. Outputs are unknown to the trace and not replayed."""
    inside = np.arange(BLOCK, dtype=np.int32)
    nothing = np.empty(0, np.int32)
    for record in records:
        blocks = np.asarray(record.blocks, np.int32)[:, None] * BLOCK + inside
        boundary = record.end * BLOCK
        yield Turn(blocks.ravel()[: record.length], (boundary,) if boundary else (), nothing, donate=False)


def clairvoyant(records: list[Record], slots: int) -> float:
    """Hit rate of a bound that knows the future: it keeps a state only where a later prompt will leave what is known,
    and lets go of the one with the least gain per distance to its next use. KV is unlimited."""
    seen: set[int] = set()
    matched = []  # whole blocks of each prompt that were seen before it
    for record in records:
        depth = 0
        while depth < record.end and record.blocks[depth] in seen:
            depth += 1
        matched.append(depth)
        seen.update(record.blocks)
    uses: dict[int, list[int]] = {}  # block -> times at which a prompt resumes at its end, latest first
    for time in range(len(records) - 1, -1, -1):
        if matched[time]:
            uses.setdefault(records[time].blocks[matched[time] - 1], []).append(time)

    rows = slots + 1
    node, next_use = np.full(rows, -1), np.full(rows, np.inf)
    depth_of, gain = np.zeros(rows), np.full(rows, np.inf)
    row_of: dict[int, int] = {}
    base: dict[int, int] = {}
    free = list(range(rows))

    def evict(row: int) -> None:
        gone = int(node[row])
        for other, its_base in base.items():
            if its_base == gone and other != gone:
                base[other] = base[gone]
                gain[row_of[other]] += gain[row]
        del row_of[gone], base[gone]
        node[row], gain[row], next_use[row] = -1, np.inf, np.inf
        free.append(row)

    hit = total = 0
    for time, (record, known) in enumerate(zip(records, matched, strict=True)):
        total += record.length
        blocks = record.blocks
        hit += BLOCK * max((d + 1 for d in range(known) if blocks[d] in row_of), default=0)
        previous, previous_depth = -1, 0
        for depth in range(record.end):
            block = blocks[depth]
            times = uses.get(block)
            while times and times[-1] <= time:
                times.pop()
            if block in row_of and not times:
                evict(row_of[block])  # never used again
            elif times:
                if block not in row_of:
                    row = free.pop()
                    row_of[block], base[block], node[row], depth_of[row] = row, previous, block, depth + 1
                    gain[row] = depth + 1 - previous_depth
                    for deeper in blocks[depth + 1 : record.end]:  # those on this path are measured from here now
                        if deeper in row_of:
                            base[deeper] = block
                            gain[row_of[deeper]] = depth_of[row_of[deeper]] - (depth + 1)
                            break
                next_use[row_of[block]] = times[-1]
                if not free:
                    evict(int(np.argmin(gain / np.maximum(next_use - time, 0.5))))
                if block in row_of:
                    previous, previous_depth = block, depth + 1
    return hit / total
