"""The small operators around a decode step that keep the sequences' progress: latency alone."""

from collections.abc import Iterator

import torch

from ..cases import Case, Inputs, Sizes, operator_case

BATCHES, DRAFTS, STOPS, PAGES, FREQUENCIES = ((1, 1), (1, 4), (64, 4), (256, 8)), 8, 4, 512, 32


def frequencies(draw: Inputs) -> torch.Tensor:
    return (1e7 ** -(torch.arange(FREQUENCIES) / FREQUENCIES)).to(draw.device)


def cases(sizes: Sizes) -> Iterator[Case]:
    """One to many sequences of one to eight tokens, deep in their contexts."""
    for sequences, width in BATCHES if len(sizes.decode) > 1 else BATCHES[:2]:
        shape = f"{sequences} x {width} tokens"

        def column(draw: Inputs, low: int, high: int, sequences=sequences, dtype=torch.int32):
            return draw.integers(torch.randint(low, high, (sequences,)).tolist(), dtype)

        def table(draw: Inputs, columns: int, high: int, dtype=torch.int64, sequences=sequences):
            return draw.integers(torch.randint(high, (sequences, columns)).tolist(), dtype)

        def index(draw: Inputs, sequences=sequences):
            return draw.integers(torch.randperm(sequences).tolist(), torch.int64)

        def following(draw: Inputs, sequences=sequences, width=width, column=column, table=table) -> tuple:
            index, slots = torch.randperm(sequences).tolist(), [list(range(sequences))] * 2
            packed, progress = draw.integers([index, *slots], torch.int32), [column(draw, 1, 9999) for _ in range(3)]
            pages, inv_freq = table(draw, PAGES, 9999, torch.int32), frequencies(draw)
            capacity = torch.full_like(progress[0], PAGES * 64)
            return packed, *progress, table(draw, DRAFTS, 9999), pages, capacity, inv_freq, width, 1.0, 64

        def places(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            first, pages = column(draw, 0, PAGES * 64 - width), table(draw, PAGES, 9999, torch.int32)
            return index(draw), first, pages, torch.full_like(first, PAGES * 64), frequencies(draw), width, 1.0, 0, 64

        def verdict(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            chosen, tokens, outputs = (table(draw, width, high) for high in (2, 2, 9999))
            rules = column(draw, 0, 9), table(draw, STOPS, 9999)
            progress = column(draw, 1, 9999), column(draw, 10**9, 2**30), table(draw, DRAFTS, 9999)
            return chosen, tokens, outputs, column(draw, 1, 9999), index(draw), *rules, *progress

        def behind(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            return index(draw), *(column(draw, 0, 9999) for _ in range(3)), table(draw, DRAFTS, 9999), width

        rows = sequences * width
        moved = (52 + 8 * PAGES) * sequences + (24 + 8 * FREQUENCIES + 8) * rows
        yield operator_case("decode_rows", shape, moved, following)
        yield operator_case("paged_rows", shape, 20 * sequences + (8 * FREQUENCIES + 8) * rows, places)
        yield operator_case("draft_rows", shape, 36 * sequences + 12 * rows, behind)
        yield operator_case("accept_tokens", shape, (48 + 8 * STOPS) * sequences + 24 * rows, verdict)
