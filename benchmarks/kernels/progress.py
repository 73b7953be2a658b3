"""The small operators around a decode step that keep the sequences' progress: latency alone."""

from collections.abc import Iterator

import torch

from ..cases import Case, Inputs, Sizes, operator_case

BATCHES, DRAFTS, STOPS, PAGES, FREQUENCIES = ((1, 1), (1, 4), (64, 4), (256, 8)), 8, 4, 512, 32


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

        def following(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            slots, progress = [column(draw, 0, 64)] * 2, [column(draw, 1, 9999) for _ in range(3)]
            return index(draw), *slots, *progress, table(draw, DRAFTS, 9999), width

        def places(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            first, pages = column(draw, 0, PAGES * 64 - width), table(draw, PAGES, 9999, torch.int32)
            inv_freq = (1e7 ** -(torch.arange(FREQUENCIES) / FREQUENCIES)).to(draw.device)
            return index(draw), first, pages, torch.full_like(first, PAGES * 64), inv_freq, width, 1.0, 0, 64

        def verdict(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            chosen, tokens, outputs = (table(draw, width, high) for high in (2, 2, 9999))
            rules = column(draw, 0, 9), table(draw, STOPS, 9999)
            progress = column(draw, 1, 9999), column(draw, 10**9, 2**30), table(draw, DRAFTS, 9999)
            return chosen, tokens, outputs, column(draw, 1, 9999), index(draw), *rules, *progress

        def behind(draw: Inputs, width=width, column=column, table=table, index=index) -> tuple:
            return index(draw), *(column(draw, 0, 9999) for _ in range(3)), table(draw, DRAFTS, 9999), width

        rows = sequences * width
        yield operator_case("next_tokens", shape, 40 * sequences + 24 * rows, following)
        yield operator_case("paged_rows", shape, 20 * sequences + (8 * FREQUENCIES + 8) * rows, places)
        yield operator_case("draft_rows", shape, 36 * sequences + 12 * rows, behind)
        yield operator_case("accept_tokens", shape, (48 + 8 * STOPS) * sequences + 24 * rows, verdict)
