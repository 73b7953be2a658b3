"""Batched copies inside the two arenas: whole state slots, and leading rows of KV pages."""

import torch
from torch import Tensor

from .library import operator


@operator(fake=lambda slots, source, destination: None, mutates=("slots",))
def copy_states(slots: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy whole state slots, every layer at once.

    slots: [slots, bytes] uint8, the state arena; source, destination: [M] int32, a negative entry of either skips
    the pair. No destination may be another pair's source or destination. Mutates slots.
    """
    kept = ((source >= 0) & (destination >= 0)).nonzero().squeeze(1)
    slots[destination[kept].long()] = slots[source[kept].long()]


@operator(fake=lambda pages, source, destination, rows: None, mutates=("pages",))
def copy_pages(pages: Tensor, source: Tensor, destination: Tensor, rows: Tensor) -> None:
    """Copy the first `rows` tokens of KV pages, every layer at once.

    pages: [pages, layers, 2, kv_heads, page, D], the KV arena; source, destination, rows: [M] int32, a negative entry
    of source or destination skips the pair. No destination may be another pair's source or destination. Mutates pages.
    """
    kept = ((source >= 0) & (destination >= 0)).nonzero().squeeze(1)
    source, destination = source[kept].long(), destination[kept].long()
    copied = torch.arange(pages.shape[4], device=pages.device) < rows[kept, None]
    copied = copied[:, None, None, None, :, None]
    pages[destination] = torch.where(copied, pages[source], pages[destination])
