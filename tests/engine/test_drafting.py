"""What is looked up as drafts: what stood behind the latest place of the same three ids, and nothing of others. What an
MTP head reads to draft."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import CPU

from tokenspeed.engine.executor.batch import Tables
from tokenspeed.engine.executor.drafting import Chosen, LookupDrafter, MtpDrafter
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.request import SamplingParams
from tokenspeed.engine.schedule.step import Begin

PREDECESSOR = (*range(1, 6), 1, 2, 3, *range(20, 50))
LOOKED_UP = {
    "behind the same three": ((1, 2, 3, 4, 5, 1, 2), 3, [4, 5, 1]),
    "behind the latest of them": ((1, 2, 3, 9, 1, 2, 3, 8, 1, 2), 3, [8, 1, 2]),
    "nothing where they did not stand": ((1, 2, 3, 4, 8, 2), 3, [0, 0, 0]),
    "nothing where too little was said": ((1,), 2, [0, 0, 0]),
    "up to the last id and no further": ((7, 7, 7), 7, [7, 7, 7]),
    "nothing of who was there before": ((1, 2), 3, [0, 0, 0]),
}


def looked_up(history: tuple[int, ...], id: int) -> list[int]:
    """The drafts behind a prompt and its first output, at an index where others were before."""
    tables = Tables(2, 4, CPU, drafts=3)
    drafter = LookupDrafter(tables, 60)
    for each in (PREDECESSOR, history):
        drafter.begin([Begin(1, 0.0, 0, 1.0, 0.0, 0, history=each)])
    tables.length[1], tables.ids[1, 0] = len(history), id
    first = torch.tensor([1]), torch.tensor([0], dtype=torch.int32)
    drafter.follow(Chosen(SimpleNamespace(decode=None), None, None, None, first), 3)
    return tables.ids[1, 1:].tolist()


@pytest.mark.parametrize("name", LOOKED_UP)
def test_drafts_are(name):
    history, id, drafts = LOOKED_UP[name]
    assert looked_up(history, id) == drafts


def test_drafting_reads_the_pages_that_its_sequences_hold(monkeypatch):
    """Also behind the first id of a prompt, where a table as wide as the context would make it slow."""
    widths, draft = [], MtpDrafter._draft

    def seen(self, index, context, slots, page_table, *rest):
        widths.append(page_table.shape[1])
        draft(self, index, context, slots, page_table, *rest)

    monkeypatch.setattr(MtpDrafter, "_draft", seen)
    llm = LLM(progress=False, device="cpu")
    llm.generate([[5] * 70, [6] * 10], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert 2 in widths and set(widths) <= {1, 2}, "the long one, and where it has ended the short one alone"
