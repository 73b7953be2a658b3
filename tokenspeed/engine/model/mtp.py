"""The MTP head: from a token's final state and the token after it to logits of the one after that, as a program of
stages that shares the trunk's embedding and head.

At position t, with h the trunk's state after its final norm and E the embedding:

    x = fc [RMS1(E[token_{t+1}]); RMS1(h_t)];  x = layer(x), full attention with keys and values of its own
    hidden = RMS1(x);  logits = W_lm_head hidden        of token_{t+2}

Further drafts take the head's own hidden in the place of h, one position on.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.fp8 import BLOCK, FP8, blocks, quantise_blocks
from ..config import ModelConfig
from ..errors import ConfigError
from ..parallel.comm import Communicator
from ..parallel.compile import compile_program, link
from ..parallel.mesh import Mesh
from ..parallel.placement import Replicate
from .inputs import Batch
from .layers import Embedding, GatedAttention, LMHead, Norm, Stage, feed_forward
from .parameters import Source, Weight, by_columns, source, weight

_QUANTISED_ROWS = 8 * BLOCK  # of the head at a time: on the way they take memory beside it, in fp32 several times


class Output(NamedTuple):
    """What a forward pass gives: logits of the L tokens that are wanted, the state of all N tokens after the norm."""

    logits: Tensor  # [L, the rank's vocabulary]
    hidden: Tensor | None  # [N, hidden]; None of a trunk without an MTP head


class JoinTokens(Stage):
    """The embedding of the next token beside the state of this one, each under its norm, brought to one width.

    The residual stream holds the states; the stream of the head starts here. Every rank does all of it.
    """

    absorbs_reduce = True

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__(mesh)
        self.eps = config.eps
        self.embedding_norm, self.hidden_norm = (weight(mesh, config.hidden) for _ in range(2))
        self.fc = weight(mesh, config.hidden, 2 * config.hidden)

    def sources(self):
        named = {
            "pre_fc_norm_embedding": self.embedding_norm,
            "pre_fc_norm_hidden": self.hidden_norm,
            "fc": self.fc,
        }
        for name, part in named.items():
            yield source(f"{name}.weight", part, self.mesh, *part.dims)

    def lay_out_by_columns(self):
        by_columns(self.fc)

    def forward(self, x, residual, batch):
        parts = ops.rms_norm(x, self.embedding_norm, self.eps), ops.rms_norm(residual, self.hidden_norm, self.eps)
        return ops.linear(torch.cat(parts, dim=1), self.fc), None


class DraftHead(Stage):
    """The head from a copy that costs less: of some ids alone, in FP8, or both. Logits are [L, vocabulary], so that a
    column is an id as ever, and minus infinity for ids that are left out."""

    output = LMHead.output

    def __init__(self, head: LMHead, ids: Tensor | None, fp8: bool):
        super().__init__(head.mesh)
        self.vocab, self.ids = len(head.weight), ids
        rows, hidden = head.weight.dims if ids is None else (len(ids), head.weight.shape[1])
        scale = None
        with head.weight.device:
            data = weight(head.mesh, rows, hidden, dtype=FP8 if fp8 else head.weight.dtype)
            if fp8:
                scale = weight(head.mesh, blocks(len(data)), blocks(hidden), dtype=torch.float32)
                scale.dims = ()
        for first in range(0, len(data), _QUANTISED_ROWS):
            some = slice(first, first + _QUANTISED_ROWS)
            copied = head.weight[some] if ids is None else head.weight[ids[some]]
            if scale is None:
                data[some] = copied
            else:
                data[some], scale[first // BLOCK : blocks(some.stop)] = quantise_blocks(copied)
        self.weight = Weight(data, scale)

    def forward(self, x, residual, batch):
        logits, normed = x.linear_of(batch.logit_rows, *self.weight)
        if self.ids is None:
            return logits, normed
        return logits.new_full((len(logits), self.vocab), -torch.inf).index_copy_(1, self.ids, logits), normed


class StoreKeys(Stage):
    """Of an attention layer the keys and values alone. What they are made of is passed on."""

    def __init__(self, attention: GatedAttention):
        super().__init__(attention.mesh)
        self.attention = attention

    def forward(self, x, residual, batch):
        a = self.attention
        queries, *rest = a.widths
        keys, _, _ = x.linear(*a.qkv.part.split([queries, sum(rest)])[1])
        kv = batch.layers[a.layer]
        ops.attention_prologue(keys, a.q_norm, a.k_norm, batch.cos_sin, kv, batch.kv_slots, a.eps)
        return x.x, residual


class MtpHead(nn.Module):
    """One MTP head, or a rank's part of it; its keys and values are the layer behind the trunk's last of the pages.

    What is made of token t + 1 and the state at t stands in row t + 1 of the pages, at position t: so a row depends on
    no token behind it, and is shared with a prefix like any other. Row 0 stays empty, and nobody attends to it.
    """

    def __init__(self, config: ModelConfig, communicator: Communicator, embedding: Embedding, head: LMHead):
        super().__init__()
        self.communicator, self.head = communicator, head
        mesh = communicator.mesh
        own: list[tuple[str, Stage]] = [
            ("", JoinTokens(config, mesh)),
            ("layers.0.input_layernorm.", Norm(config, mesh, first=True)),
            ("layers.0.self_attn.", GatedAttention(config, mesh, len(config.layer_types), first_key=1)),
            ("layers.0.post_attention_layernorm.", Norm(config, mesh)),
            ("layers.0.mlp.", feed_forward(config, mesh)),
            ("norm.", Norm(config, mesh)),
        ]
        self.names = [name for name, _ in own]
        self.program = nn.ModuleList((embedding, *(stage for _, stage in own), head))
        self.link()

    def link(self, communicator: Communicator | None = None) -> None:
        """Make the program's callables; again where a stage or its `forward` was replaced, or as `Qwen3_5.link`."""
        self.communicator = communicator or self.communicator
        names = ("embed_tokens", *(name.removesuffix(".") or "join_tokens" for name in self.names), "lm_head")
        named, mesh = list(zip(names, self.program, strict=True)), self.communicator.mesh
        self.compiled = compile_program(named, mesh, self.program[-1].output)
        self._calls = link(self.compiled, self.communicator)
        keys = [*named[:3], ("keys", StoreKeys(named[3][1]))]
        self._stores = link(compile_program(keys, mesh, Replicate()), self.communicator)

    def sources(self) -> Iterator[Source]:
        """Every checkpoint tensor of the head's own, with what this rank takes."""
        for name, stage in zip(self.names, self.program[1:-1], strict=True):
            for each in stage.sources():
                yield each._replace(key=f"mtp.{name}{each.key}")

    def forward(self, batch: Batch, hidden: Tensor) -> Output:
        """Logits of the token after the next for the tokens that are wanted, and what a further draft takes as hidden.

        batch: N tokens in rows of the pages as for the trunk, those of rows r at position r - 1; hidden: [N, hidden],
        the trunk's state at r - 1 after its final norm, or in further drafts the head's own output. Mutates the batch's
        pages: keys and values of the rows.
        """
        x, residual = None, hidden
        for call in self._calls:
            x, residual = call(x, residual, batch)
        return Output(x, residual)

    def store(self, batch: Batch, hidden: Tensor) -> None:
        """As `forward`, but for the keys and values alone. Mutates the batch's pages."""
        x, residual = None, hidden
        for call in self._stores:
            x, residual = call(x, residual, batch)

    @property
    def draft_ids(self) -> Tensor | None:
        """What the vocabulary was reduced to, [V'] int64; None where it is whole."""
        last = self.program[-1]
        return last.ids if isinstance(last, DraftHead) else None

    @property
    def drafts_in_fp8(self) -> bool:
        last = self.program[-1]
        return isinstance(last, DraftHead) and last.weight.scale is not None

    def copy_head(self, ids: Tensor | None = None, fp8: bool = False) -> None:
        """From now on draft by a copy of the head, made once the weights are loaded: of these ids alone, logits of all
        others being minus infinity, in FP8, or both. Text does not change by it: drafts are verified by the head.

        ids: [V'] int64, on any device, None for all. Raises ConfigError for ids that are not distinct ones of the
        vocabulary, and for ids where the head is split over ranks.
        """
        if ids is not None:
            self._check_ids(ids)
            ids = ids.to(self.head.weight.device)
        self.program[-1] = DraftHead(self.head, ids, fp8)
        self.link()

    def _check_ids(self, ids: Tensor) -> None:
        if self.communicator.mesh.world > 1:
            raise ConfigError(
                f"a reduced draft vocabulary needs the whole head on one rank; there are "
                f"{self.communicator.mesh.world}."
            )
        vocab = len(self.head.weight)
        if ids.dim() != 1 or ids.dtype != torch.int64 or not len(ids):
            raise ConfigError(f"a draft vocabulary is a list of ids, not {ids.dtype} of shape {list(ids.shape)}.")
        if ids.min() < 0 or ids.max() >= vocab or len(ids.unique()) < len(ids):
            raise ConfigError(
                f"a draft vocabulary of {len(ids)} ids from {ids.min()} to {ids.max()} does not hold distinct ids of "
                f"the vocabulary of {vocab}."
            )
