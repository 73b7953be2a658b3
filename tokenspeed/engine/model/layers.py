"""The stages of the network. Each is one callable of the flat program:

    forward(x, residual, batch) -> (x, residual)

x: [N, hidden], what the stage works on; residual: [N, hidden], the stream that mixers and feed-forwards add to through
the norm that follows them. Behind a norm x is the norm still to be done, and the stream is in it: the stage that takes
it begins with a product, and in a decode batch sum, norm and product are one launch. A stage is built for one rank of a
mesh and holds that rank's part of its weights. It declares the placement of the x it takes and gives, and which regions
of checkpoint tensors fill its parameters. The x it gives is its own to lose: a collective may overwrite it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops.moe_block import MOE_BLOCK_ROWS, moe_block_scratch
from ..batch import Batch
from ..config import DenseConfig, ModelConfig
from ..memory import StateViews
from ..parallel import sharding
from ..parallel.mesh import Mesh
from ..parallel.placement import Keep, Partial, Placement, Replicate, Shard
from ..parallel.sharding import Split
from .parameters import Source, elsewhere, source, weight


class PendingNorm(NamedTuple):
    """A block's output, the residual stream without it (None: x is the stream), and the norm of their sum."""

    x: Tensor
    residual: Tensor | None
    norm_weight: Tensor
    eps: float

    def linear(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The product of the norm with a weight, the norm, and the residual stream."""
        if self.residual is None:
            normed = ops.rms_norm(self.x, self.norm_weight, self.eps)
            return ops.linear(normed, weight), normed, self.x
        return ops.add_rms_norm_linear(self.x, self.residual, self.norm_weight, self.eps, weight)


Flow = tuple[Tensor | PendingNorm, Tensor | None]


class Stage(nn.Module):
    """input, output: placement of x over the ranks; absorbs_reduce: an all-reduce of x belongs into the stage's own
    callable; picks_rows: x has a row per logit row after it, not per token."""

    input: Placement = Replicate()
    output: Placement = Replicate()
    absorbs_reduce = False
    picks_rows = False

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.mesh = mesh

    def sources(self) -> Iterator[Source]:
        """What fills the stage's parameters; keys are below the stage's own prefix."""
        return iter(())

    def forward(self, x: Tensor | PendingNorm, residual: Tensor | None, batch: Batch) -> Flow:
        raise NotImplementedError


class Embedding(Stage):
    """Token ids to the residual stream: each rank looks up the ids of its part of the vocabulary."""

    output = Partial("tp")

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__(mesh)
        vocab = sharding.vocab(config)
        self.weight = weight(mesh, vocab, config.hidden)
        self.first, self.whole = vocab.slice(mesh).start, mesh.size("tp") == 1

    def sources(self):
        yield source("weight", self.weight, self.mesh, *self.weight.dims)

    def forward(self, x, residual, batch):
        if self.whole:
            return F.embedding(batch.tokens, self.weight), None
        local = batch.tokens - self.first
        elsewhere = (local < 0) | (local >= len(self.weight))
        rows = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return rows.masked_fill_(elsewhere[:, None], 0), None


class Norm(Stage):
    """Adds x to the residual stream and normalises the stream; the first norm finds the stream in x."""

    absorbs_reduce = True

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__(mesh)
        self.eps = config.eps
        self.weight = weight(mesh, config.hidden)

    def sources(self):
        yield source("weight", self.weight, self.mesh, *self.weight.dims)

    def forward(self, x, residual, batch):
        return PendingNorm(x, residual, self.weight, self.eps), None


class LogitRows(Stage):
    """Keeps the tokens whose logits are wanted. Terms of a sum stay terms, so a reduce can wait for fewer rows."""

    input = output = Keep()
    picks_rows = True

    def forward(self, x, residual, batch):
        if batch.logit_rows is None:
            return x, residual
        return x[batch.logit_rows], residual[batch.logit_rows]


class GatedAttention(Stage):
    """Full attention with normalised, partly rotated queries and keys and a sigmoid output gate."""

    output = Partial("tp")

    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int):
        super().__init__(mesh)
        c = config
        self.layer, self.eps, self.head_dim, self.scale = layer, c.eps, c.head_dim, c.head_dim**-0.5
        q_heads, kv = sharding.q_heads(c), sharding.kv_heads(c).of(c.head_dim)
        self.blocks = (q_heads.of(2 * c.head_dim), kv, kv)  # a head's queries and its gate are neighbours
        self.widths = [block.local(mesh) for block in self.blocks]
        self.qkv = weight(mesh, self.blocks, c.hidden)
        self.out = weight(mesh, c.hidden, q_heads.of(c.head_dim))
        self.q_norm, self.k_norm = (weight(mesh, c.head_dim) for _ in range(2))

    def sources(self):
        hidden = self.qkv.shape[1]
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        for name, part, block in zip(names, self.qkv.split(self.widths), self.blocks, strict=True):
            yield source(name, part, self.mesh, block, hidden)
        for name, part in (("o_proj", self.out), ("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            yield source(f"{name}.weight", part, self.mesh, *part.dims)

    def forward(self, x, residual, batch):
        kv = batch.memory.layers[self.layer]
        qkv, _, residual = x.linear(self.qkv)
        q = ops.attention_prologue(qkv, self.q_norm, self.k_norm, batch.cos_sin, kv, batch.kv_slots, self.eps)
        gate = qkv[:, : self.widths[0]].unflatten(1, (-1, 2, self.head_dim))[:, :, 1]
        cut, outputs = batch.decode_tokens, []
        if d := batch.decode:
            outputs.append(
                ops.paged_attention_decode(q[:cut], gate[:cut], kv, d.page_table, d.context_lens, self.scale)
            )
        if p := batch.prefill:
            lengths = (p.cu_seqlens, p.context_lens, p.max_seqlen)
            outputs.append(ops.paged_attention_prefill(q[cut:], gate[cut:], kv, p.page_table, *lengths, self.scale))
        return ops.linear(_joined(outputs), self.out), residual


class GatedDeltaNet(Stage):
    """Linear attention by the gated delta rule, behind a short convolution and before a gated norm."""

    output = Partial("tp")

    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int):
        super().__init__(mesh)
        c = config
        self.layer, self.eps = layer, c.eps
        gates = sharding.value_heads(c)
        keys, values = sharding.key_heads(c).of(c.key_dim), gates.of(c.value_dim)
        self.heads = (gates.pieces(mesh), c.value_dim)
        # q | k | v, each by head, then z, b and a by value head: a rank's blocks are those of a smaller model.
        channels = (keys, keys, values)
        self.blocks = {"in_proj_qkv": channels, "in_proj_z": (values,), "in_proj_b": (gates,), "in_proj_a": (gates,)}
        self.widths = [sum(split.local(mesh) for split in block) for block in self.blocks.values()]
        # Few heads leave odd widths, and kernels read the rows of the product in vectors of 8 elements.
        self.in_proj = weight(mesh, sum(self.blocks.values(), ()), c.hidden, multiple=8)
        self.widths.append(self.in_proj.padding)
        self.conv = weight(mesh, channels, c.conv_taps)
        # The decay is an exponential of an exponential: its two parameters stay fp32, like the state they act on.
        self.a_log, self.dt_bias = (weight(mesh, gates, dtype=torch.float32) for _ in range(2))
        self.norm = weight(mesh, c.value_dim)
        self.out = weight(mesh, c.hidden, values)

    def sources(self):
        hidden = self.in_proj.shape[1]
        for (name, block), part in zip(self.blocks.items(), self.in_proj.split(self.widths), strict=False):
            yield source(f"{name}.weight", part, self.mesh, block, hidden)
        channels, taps = self.conv.dims
        yield source("conv1d.weight", self.conv[:, None], self.mesh, channels, 1, taps)
        named = {"A_log": self.a_log, "dt_bias": self.dt_bias, "norm.weight": self.norm, "out_proj.weight": self.out}
        for name, part in named.items():
            yield source(name, part, self.mesh, *part.dims)

    def forward(self, x, residual, batch):
        views: StateViews = batch.memory.layers[self.layer]
        projected, _, residual = x.linear(self.in_proj)
        qkv, z, b, a, _ = projected.split(self.widths, dim=1)
        gates = (self.a_log, self.dt_bias)
        cut, outputs = batch.decode_tokens, []
        if d := batch.decode:
            raw = (qkv[:cut], z[:cut], a[:cut], b[:cut])
            weights = (self.conv, *gates, self.norm, self.eps)
            outputs.append(
                ops.gated_delta_rule_decode(*raw, *weights, *views, d.context_lens, d.read_slot, d.write_slot)
            )
        if p := batch.prefill:
            rows = (p.cu_seqlens, p.context_lens, p.read_slot, p.write_slot, p.snapshots)
            mixed = ops.causal_conv1d(qkv[cut:], self.conv, views.window, *rows)
            raw = (mixed, a[cut:], b[cut:], *gates)
            heads = ops.gated_delta_rule_prefill(*raw, *views[:3], *rows, p.max_seqlen)
            gate = z[cut:].unflatten(1, self.heads)
            outputs.append(ops.gated_rms_norm(heads, gate, self.norm, self.eps).flatten(1))
        return ops.linear(_joined(outputs), self.out), residual


class DenseFFN(Stage):
    """SwiGLU, its columns split over the group of `intermediate`."""

    def __init__(self, hidden: int, intermediate: Split, mesh: Mesh):
        super().__init__(mesh)
        self.output = Partial(intermediate.group)
        self.gate_up = weight(mesh, (intermediate, intermediate), hidden)
        self.down = weight(mesh, hidden, intermediate)

    def sources(self):
        hidden, intermediate = self.down.dims
        for name, part in zip(("gate_proj", "up_proj"), self.gate_up.chunk(2), strict=True):
            yield source(f"{name}.weight", part, self.mesh, intermediate, hidden)
        yield source("down_proj.weight", self.down, self.mesh, hidden, intermediate)

    def forward(self, x, residual, batch):
        gate_up, _, residual = x.linear(self.gate_up)
        return ops.silu_mul_linear(gate_up, self.down), residual


class MoE(Stage):
    """Routed experts and one shared expert behind a sigmoid gate.

    Every rank routes every token alike, runs the experts it holds and its columns of the shared expert; the rest is in
    the sum over ranks.
    """

    output = Partial("world")

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__(mesh)
        moe, hidden = config.ffn, config.hidden
        self.top_k = moe.top_k
        self.experts, intermediate = sharding.experts(moe), sharding.expert_intermediate(moe)
        # What every token is multiplied with is one weight: the shared expert's gate and up, the router, its own gate.
        shared = sharding.shared_intermediate(moe)
        self.blocks = {
            "shared_expert.gate_proj": shared,
            "shared_expert.up_proj": shared,
            "gate": moe.experts,
            "shared_expert_gate": 1,
        }
        self.in_proj = weight(mesh, tuple(self.blocks.values()), hidden, multiple=8)
        self.widths = [shared.local(mesh), shared.local(mesh), moe.experts, 1, self.in_proj.padding]
        self.shared_down = weight(mesh, hidden, shared)
        self.gate_up = weight(mesh, self.experts, (intermediate, intermediate), hidden)
        self.down = weight(mesh, self.experts, hidden, intermediate)
        # What the kernel of a small decode batch leaves for the next; the model's layers share one.
        size = moe_block_scratch(self.experts.count, self.top_k, hidden)
        self.register_buffer("scratch", torch.zeros(size, dtype=torch.int32), persistent=False)
        held = self.experts.slice(mesh)
        self.first_expert, self.bounds = held.start, slice(held.start, held.stop + 1)

    def sources(self):
        for (name, block), part in zip(self.blocks.items(), self.in_proj.split(self.widths), strict=False):
            yield source(f"{name}.weight", part, self.mesh, block, self.in_proj.shape[1])
        yield source("shared_expert.down_proj.weight", self.shared_down, self.mesh, *self.shared_down.dims)
        # Checkpoints hold the experts either fused or one by one; whichever is there fills the same memory.
        yield source("experts.gate_up_proj", self.gate_up, self.mesh, *self.gate_up.dims)
        yield source("experts.down_proj", self.down, self.mesh, *self.down.dims)
        _, hidden, intermediate = self.down.dims
        gate, up = self.gate_up.chunk(2, dim=1)
        columns, rows = (intermediate, hidden), (hidden, intermediate)
        for name, parts, dims in (
            ("gate_proj", gate, columns),
            ("up_proj", up, columns),
            ("down_proj", self.down, rows),
        ):
            for expert in range(self.experts.count):
                key, local = f"experts.{expert}.{name}.weight", expert - self.first_expert
                held = 0 <= local < len(parts)
                yield source(key, parts[local], self.mesh, *dims) if held else elsewhere(key, *dims)

    def forward(self, x, residual, batch):
        if batch.prefill is None and x.residual is not None and len(x.x) <= MOE_BLOCK_ROWS:
            experts = (self.in_proj, self.experts.count, self.top_k, self.gate_up, self.down, self.shared_down)
            return ops.moe_block(*x, *experts, self.scratch, self.first_expert)
        projected, x, residual = x.linear(self.in_proj)
        gate, up, *others = self.widths
        shared, logits, shared_gate, _ = projected.split((gate + up, *others), dim=1)
        weights, experts, order, offsets = ops.moe_route(logits, self.top_k)
        held = (order, offsets[self.bounds], self.gate_up, self.down, self.first_expert)
        y = ops.moe_experts(x, weights, experts, *held)
        ops.add_gated_silu_mul_linear(y, shared, self.shared_down, shared_gate)
        return y, residual


class LMHead(Stage):
    """Logits of the rows that are left, [L, the rank's vocabulary]."""

    output = Shard(1, "tp")

    def __init__(self, config: ModelConfig, mesh: Mesh, tied: Embedding | None):
        super().__init__(mesh)
        self.tied = tied is not None
        self.weight = tied.weight if tied else weight(mesh, sharding.vocab(config), config.hidden)

    def sources(self):
        if not self.tied:
            yield source("weight", self.weight, self.mesh, *self.weight.dims)

    def forward(self, x, residual, batch):
        logits, _, _ = x.linear(self.weight)
        return logits, None


def feed_forward(config: ModelConfig, mesh: Mesh) -> Stage:
    if isinstance(config.ffn, DenseConfig):
        return DenseFFN(config.hidden, sharding.intermediate(config.ffn), mesh)
    return MoE(config, mesh)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
