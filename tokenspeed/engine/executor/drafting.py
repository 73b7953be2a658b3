"""What is drafted behind the ids that were chosen: by the checkpoint's MTP head, or by looking up what stood behind the
same ids before. A draft that is not what the model itself would choose is dropped, so text does not depend on it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ... import ops
from ..model.inputs import Batch, DecodeRows, PrefillRows, Rows
from ..model.mtp import MtpHead
from ..schedule.step import Begin
from .batch import Rotary, Tables, paged, prefill_rows, to_device
from .memory import Memory
from .sampling import Sampler

_PATTERN = 3  # ids that must have stood there before


class Chosen(NamedTuple):
    """A Step's rows and what was chosen behind them.

    batch, hidden: of the forward pass, hidden [N, hidden] or None; ids: [B, T] int64, behind the tokens of its decode
    rows, 0 where none could be chosen, of which counts [B] int64 are accepted; first: a prefill row's index, of those
    that end with an id, [P] int64, and their working slots, [P] int32: to draft behind; greedy: as
    in `Sampler.draw`.
    """

    batch: Batch
    hidden: Tensor | None
    ids: Tensor
    counts: Tensor
    first: tuple[Tensor, Tensor] | None
    greedy: bool = False


class Drafter(Protocol):
    def begin(self, begins: Sequence[Begin]) -> None:
        """Sequences take their indices."""

    def follow(self, chosen: Chosen, drafts: int) -> None:
        """Take note of what a Step consumed, and put drafts of the next ids into `Tables.ids`. Every Step comes here,
        in order. Reads nothing on the host."""


class MtpDrafter:
    """Drafts of the MTP head. Its keys and values follow the trunk's token by token, drafts or not, so that whoever
    resumes from a prefix finds them; what it needs of the last token stands in the state slot."""

    def __init__(self, head: MtpHead, memory: Memory, tables: Tables, sampler: Sampler, rotary: Rotary):
        self._head, self._memory, self._tables = head, memory, tables
        self._sampler, self._rotary = sampler, rotary

    def begin(self, begins: Sequence[Begin]) -> None:
        pass  # the head knows tokens by their rows

    def follow(self, chosen: Chosen, drafts: int) -> None:
        batch, hidden = chosen.batch, chosen.hidden
        index, context, slots, tables = [], [], [], []
        if d := batch.decode:
            self._follow_decode(d, hidden[: batch.decode_tokens], chosen)
            index, slots, tables = [d.index], [d.write_slot], [d.page_table]
            context = [torch.where(chosen.counts > 0, d.context_lens + chosen.counts, -1).int()]
        if p := batch.prefill:
            self._follow_prefill(p, batch, hidden[batch.decode_tokens :])
        if chosen.first is not None:
            new, places = chosen.first
            index.append(new)
            context.append(self._tables.length[new])
            slots.append(places)
            width = max(rows.page_table.shape[1] for rows in (batch.decode, batch.prefill) if rows)
            tables = [self._tables.pages[_joined(index), :width]]
        if drafts and index:
            self._draft(_joined(index), _joined(context), _joined(slots), tables[0], drafts, chosen.greedy)

    def _follow_decode(self, rows: DecodeRows, hidden: Tensor, chosen: Chosen) -> None:
        """Rows of the last id, the drafts and the id behind them; those that were not accepted are stored over."""
        states = torch.cat([self._kept(rows.read_slot)[:, None], hidden.view(*rows.tokens.shape, -1)], dim=1)
        tokens = torch.cat([rows.tokens[:, :1], chosen.ids], dim=1)
        entries = paged(self._memory, self._tables, self._rotary, rows, rows.index, tokens, -1)
        self._head.store(entries, states.flatten(0, 1))
        last = chosen.counts[:, None, None].expand(-1, 1, states.shape[2])
        self._keep(rows.write_slot, states.gather(1, last)[:, 0])

    def _follow_prefill(self, rows: PrefillRows, batch: Batch, hidden: Tensor) -> None:
        """Rows of the prompt's own tokens, each behind the state before it. A sequence's very first token has none, and
        no row."""
        starts, before = rows.cu_seqlens[:-1].long(), hidden.roll(1, 0)
        before[starts] = self._kept(rows.read_slot)
        entries = prefill_rows(rows, self._tables, self._rotary, torch.where(rows.stored > 0, rows.stored, -1), -1)
        tokens = batch.tokens[batch.decode_tokens :]
        self._head.store(Batch(self._memory.layers, tokens, *entries, None, None, 0, rows), before)
        self._keep(rows.write_slot, hidden[rows.cu_seqlens[1:].long() - 1])
        if len(rows.snapshots):
            row, count, slot = rows.snapshots.long().unbind(1)
            self._keep(slot, hidden[starts[row] + count - rows.context_lens.long()[row] - 1])

    def _draft(
        self, index: Tensor, context: Tensor, slots: Tensor, page_table: Tensor, drafts: int, greedy: bool
    ) -> None:
        """Draft behind the last id of B sequences, which stands at row `context`, negative for padding."""
        tables, drafted = self._tables, []
        # What is known of every draft is made before the first: a launch each, and not one more for each draft.
        parameters = None if greedy else self._sampler.parameters(index)
        token, places, outputs = ops.draft_rows(index, context, tables.capacity, tables.prompt, tables.ids, drafts)
        hidden = self._kept(slots)
        for k in range(drafts):
            rows = Rows(page_table, places[k], slots, slots)
            batch = paged(self._memory, tables, self._rotary, rows, index, token[:, None], -1)
            logits, hidden = self._head(batch, hidden)
            token = self._sampler.draw_by(parameters, logits, outputs[k]).clamp_(min=0)  # a draft may be any id
            drafted.append(token)
        tables.ids[index, 1 : 1 + drafts] = torch.stack(drafted, dim=1)

    def _kept(self, slots: Tensor) -> Tensor:
        """The trunk's last state of slots, [B, hidden]."""
        return self._memory.hidden[slots.long()]

    def _keep(self, slots: Tensor, states: Tensor) -> None:
        self._memory.hidden[slots.long()] = states


class LookupDrafter:
    """Drafts of what stood behind the same ids before: a quoted file or tool result is said again word for word
    (Saxena 2023, prompt lookup decoding)."""

    def __init__(self, tables: Tables, max_tokens: int):
        self._tables = tables
        self._history = torch.zeros(tables.nobody + 1, max_tokens + 1, dtype=torch.int32, device=tables.device)

    def begin(self, begins: Sequence[Begin]) -> None:
        """Sequences take their indices."""
        for begin in begins:
            ids = to_device(np.array(begin.history, dtype=np.int32), self._tables.device)
            self._history[begin.index, : len(ids)] = ids

    def follow(self, chosen: Chosen, drafts: int) -> None:
        tables, index = self._tables, []
        longest = self._history.shape[1] - 1
        if d := chosen.batch.decode:
            places = d.context_lens.long()[:, None] + torch.arange(1 + chosen.ids.shape[1], device=tables.device)
            rows = torch.where(d.context_lens < 0, tables.nobody, d.index)
            # Ids that were not accepted stand behind the end, where nobody looks.
            ids = torch.cat([d.tokens[:, :1], chosen.ids], dim=1).int()
            self._history[rows[:, None], places.clamp(0, longest)] = ids
            index.append(d.index)
        if chosen.first is not None:
            new = chosen.first[0]
            self._history[new, tables.length[new].long()] = tables.ids[new, 0].int()
            index.append(new)
        if drafts and index:
            index = _joined(index)
            tables.ids[index, 1 : 1 + drafts] = self._look_up(index, tables.length[index].long(), drafts)

    def _look_up(self, index: Tensor, last: Tensor, drafts: int) -> Tensor:
        """What follows the latest place at which the last ids stood before, [B, drafts] int64; 0 where there is none.

        last: [B] int64, where the last id stands."""
        width = self._history.shape[1] if last.is_cuda else max(int(last.max()), _PATTERN) + 1
        history = self._history[index, :width]
        starts = torch.arange(width, device=last.device)
        pattern = history.gather(1, (last[:, None] - starts[:_PATTERN].flip(0)).clamp(min=0))
        found = starts[: width - _PATTERN] + _PATTERN <= last[:, None]  # with something behind it
        for k in range(_PATTERN):
            found = found & (history[:, k : width - _PATTERN + k] == pattern[:, k, None])
        latest = torch.where(found, starts[: width - _PATTERN], -1).amax(1, keepdim=True)
        places = latest + _PATTERN + torch.arange(drafts, device=last.device)
        drafted = history.gather(1, torch.minimum(places, last[:, None])).long()
        return torch.where(latest < 0, 0, drafted)


def _joined(parts: list[Tensor]) -> Tensor:
    """`torch.cat`, without a launch where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
