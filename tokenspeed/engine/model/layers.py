"""The stages of the network. Each is one callable of the flat program:

    forward(x, residual, batch) -> (x, residual)

x: [N, hidden], what the stage works on; residual: [N, hidden], the stream that mixers and feed-forwards add to through
the norm that follows them. Behind a norm x is the norm still to be done, and the stream is in it: the stage that takes
it begins with a product, and in a decode batch sum, norm and product are one launch. A stage is built for one rank of a
mesh and holds that rank's part of its weights. It declares the placement of the x it takes and gives, and which regions
of checkpoint tensors fill its parameters. The x it gives is its own to lose: a collective may overwrite it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops.ffn_block import FFN_BLOCK_BYTES, FFN_BLOCK_FEWEST, FFN_BLOCK_ROWS, ffn_block_scratch
from ...ops.moe_block import MOE_BLOCK_ROWS, moe_block_scratch
from ...ops.strict import KERNEL_ROWS, LINEAR_STAGED_ROWS
from ..config import DenseConfig, ModelConfig
from ..parallel import sharding
from ..parallel.comm import Communicator
from ..parallel.mesh import Mesh
from ..parallel.placement import Keep, Partial, Placement, Replicate, Shard
from .inputs import Batch, StateViews
from .parameters import Source, Weight, by_columns, in_fp8, matrix, not_held, source, stacked, weight
from .products import DoneNorm, Joined, PendingNorm

Flow = tuple[Tensor | PendingNorm | DoneNorm, Tensor | None]


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

    def lay_out_by_columns(self) -> None:
        """See `parameters.by_columns`; once the weights are loaded."""
        for each in self.modules():
            if isinstance(each, Weight):
                by_columns(each.data)

    def forward(self, x: Tensor | PendingNorm, residual: Tensor | None, batch: Batch) -> Flow:
        raise NotImplementedError

    def reduce_into(self, x: Tensor, residual: Tensor | None, batch: Batch, communicator: Communicator, group: str):
        """`forward` behind the sum of x over a group, of a stage that absorbs it."""
        return self.forward(communicator.all_reduce(x, group), residual, batch)

    def reduce_in_parts(self, x: Tensor, residual: Tensor | None, batch: Batch, communicator: Communicator, group: str):
        """The same with the residual stream in parts over the group, before and behind it."""
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
            return F.embedding(batch.tokens, self.weight), residual
        local = batch.tokens - self.first
        not_held_here = (local < 0) | (local >= len(self.weight))
        rows = F.embedding(local.masked_fill_(not_held_here, 0), self.weight)
        return rows.masked_fill_(not_held_here[:, None], 0), residual


class Norm(Stage):
    """Adds x to the residual stream and normalises the stream; the first norm finds the stream in x.

    first: whether it is that one. A few rows are then added to a stream of zeros: the sum and the product behind it are
    one launch, as for any other norm."""

    absorbs_reduce = True

    def __init__(self, config: ModelConfig, mesh: Mesh, first: bool = False):
        super().__init__(mesh)
        self.eps = config.eps
        self.weight = weight(mesh, config.hidden)
        rows = LINEAR_STAGED_ROWS if first else 0
        self.register_buffer("zeros", torch.zeros(rows, config.hidden), persistent=False)

    def sources(self):
        yield source("weight", self.weight, self.mesh, *self.weight.dims)

    def forward(self, x, residual, batch):
        if residual is None and len(x) <= len(self.zeros):
            residual = self.zeros[: len(x)]
        return PendingNorm(x, residual, self.weight, self.eps), None

    def reduce_into(self, x, residual, batch, communicator, group):
        if residual is not None:
            done = communicator.add_rms_norm(x, residual, self.weight, self.eps, group)
            if done is not None:
                return DoneNorm(*done), None
        return super().reduce_into(x, residual, batch, communicator, group)

    def reduce_in_parts(self, x, residual, batch, communicator, group):
        return DoneNorm(*communicator.add_rms_norm_in_parts(x, residual, self.weight, self.eps, group)), None


class LogitRows(Stage):
    """Keeps the tokens whose logits are wanted. Terms of a sum stay terms, so a reduce can wait for fewer rows."""

    input = output = Keep()
    picks_rows = True

    def forward(self, x, residual, batch):
        if batch.logit_rows is None:
            return x, residual
        return x[batch.logit_rows], residual[batch.logit_rows]


class GatedAttention(Stage):
    """Full attention with normalised, partly rotated queries and keys and a sigmoid output gate. first_key: rows of a
    sequence's pages before it are empty."""

    output = Partial("tp")

    def __init__(self, config: ModelConfig, mesh: Mesh, layer: int, first_key: int = 0):
        super().__init__(mesh)
        c = config
        self.first_key = first_key
        self.layer, self.eps, self.head_dim, self.scale = layer, c.eps, c.head_dim, c.head_dim**-0.5
        q_heads, kv = sharding.q_heads(c), sharding.kv_heads(c).of(c.head_dim)
        self.blocks = (q_heads.of(2 * c.head_dim), kv, kv)  # a head's queries and its gate are neighbours
        self.widths = [block.local(mesh) for block in self.blocks]
        rows = {name: block.size for name, block in zip(("q_proj", "k_proj", "v_proj"), self.blocks, strict=True)}
        self.qkv = matrix(mesh, self.blocks, c.hidden, fp8=in_fp8(c, "self_attn", rows))
        out = in_fp8(c, "self_attn", {"o_proj": c.hidden})
        self.out = matrix(mesh, c.hidden, q_heads.of(c.head_dim), fp8=out)
        self.q_norm, self.k_norm = (weight(mesh, c.head_dim) for _ in range(2))

    def sources(self):
        hidden = self.qkv.dims[1]
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        for name, part, block in zip(names, self.qkv.part.split(self.widths), self.blocks, strict=True):
            yield source(name, part, self.mesh, block, hidden)
        for name, part in (("o_proj", self.out), ("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            yield source(f"{name}.weight", part, self.mesh, *part.dims)

    def forward(self, x, residual, batch):
        kv = batch.layers[self.layer]
        qkv, _, residual = x.linear(*self.qkv)
        q = ops.attention_prologue(qkv, self.q_norm, self.k_norm, batch.cos_sin, kv, batch.kv_slots, self.eps)
        gate = qkv[:, : self.widths[0]].unflatten(1, (-1, 2, self.head_dim))[:, :, 1]
        cut, outputs = batch.decode_tokens, []
        if d := batch.decode:
            places = (kv, d.page_table, d.context_lens, self.scale, self.first_key)
            # The prologue is the kernel ahead: it writes from the context on, and waits for all that came before.
            outputs.append(ops.paged_attention_decode(q[:cut], gate[:cut], *places, settled=True))
        if p := batch.prefill:
            places = (kv, p.page_table, p.cu_seqlens, p.context_lens, p.max_seqlen, self.scale)
            outputs.append(ops.paged_attention_prefill(q[cut:], gate[cut:], *places))
        return ops.linear(_joined(outputs), *self.out), residual


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
        rows = {"in_proj_qkv": channels, "in_proj_z": (values,), "in_proj_b": (gates,), "in_proj_a": (gates,)}
        self.in_proj = Joined(c, mesh, "linear_attn", [{name: sections} for name, sections in rows.items()])
        self.conv = weight(mesh, channels, c.conv_taps)
        # The decay is an exponential of an exponential: its two parameters stay fp32, like the state they act on.
        self.a_log, self.dt_bias = (weight(mesh, gates, dtype=torch.float32) for _ in range(2))
        self.norm = weight(mesh, c.value_dim)
        self.out = matrix(mesh, c.hidden, values, fp8=in_fp8(c, "linear_attn", {"out_proj": c.hidden}))

    def sources(self):
        yield from self.in_proj.sources()
        channels, taps = self.conv.dims
        yield source("conv1d.weight", self.conv[:, None], self.mesh, channels, 1, taps)
        named = {"A_log": self.a_log, "dt_bias": self.dt_bias, "norm.weight": self.norm, "out_proj.weight": self.out}
        for name, part in named.items():
            yield source(name, part, self.mesh, *part.dims)

    def lay_out_by_columns(self):
        super().lay_out_by_columns()
        by_columns(self.conv)

    def forward(self, x, residual, batch):
        views: StateViews = batch.layers[self.layer]
        (qkv, z, b, a), _, residual = self.in_proj(x)
        gates = (self.a_log, self.dt_bias)
        cut, outputs = batch.decode_tokens, []
        if d := batch.decode:
            raw = (qkv[:cut], z[:cut], a[:cut], b[:cut])
            weights = (self.conv, *gates, self.norm, self.eps)
            rows = (d.context_lens, d.read_slot, d.write_slot)
            # The projection is the kernel ahead, and the records were written long before it.
            outputs.append(ops.gated_delta_rule_decode(*raw, *weights, *views, *rows, settled=True))
        if p := batch.prefill:
            rows = (p.cu_seqlens, p.context_lens, p.read_slot, p.write_slot, p.snapshots)
            mixed = ops.causal_conv1d(qkv[cut:], self.conv, views.window, *rows)
            raw = (mixed, a[cut:], b[cut:], *gates)
            heads = ops.gated_delta_rule_prefill(*raw, *views[:3], *rows, p.max_seqlen)
            gate = z[cut:].unflatten(1, self.heads)
            return ops.gated_rms_norm_linear(heads, gate, self.norm, self.eps, *self.out, *outputs), residual
        return ops.linear(*outputs, *self.out), residual


class DenseFFN(Stage):
    """SwiGLU, its columns split over the group of `intermediate`."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__(mesh)
        intermediate, hidden = sharding.intermediate(config.ffn), config.hidden
        self.output = Partial(intermediate.group)
        fp8 = in_fp8(config, "mlp", dict.fromkeys(("gate_proj", "up_proj"), intermediate.size))
        self.gate_up = matrix(mesh, (intermediate, intermediate), hidden, fp8=fp8)
        self.down = matrix(mesh, hidden, intermediate, fp8=in_fp8(config, "mlp", {"down_proj": hidden}))
        # What the kernel of a small decode batch leaves for the next; the model's layers share one.
        size = ffn_block_scratch(intermediate.local(mesh))
        self.register_buffer("scratch", torch.zeros(size, dtype=torch.int32), persistent=False)
        used = (self.gate_up, self.down)
        few = sum(weight.data.nbytes for weight in used) <= FFN_BLOCK_BYTES
        self.in_one = few and all(weight.scale is None for weight in used)  # whose kernel takes no FP8

    def sources(self):
        hidden, intermediate = self.down.dims
        halves = self.gate_up.part.split([intermediate.local(self.mesh)] * 2)
        for name, part in zip(("gate_proj", "up_proj"), halves, strict=True):
            yield source(f"{name}.weight", part, self.mesh, intermediate, hidden)
        yield source("down_proj.weight", self.down, self.mesh, hidden, intermediate)

    def forward(self, x, residual, batch):
        pays = FFN_BLOCK_FEWEST <= len(x.x) <= FFN_BLOCK_ROWS
        if self.in_one and batch.prefill is None and x.residual is not None and pays:
            return ops.ffn_block(*x, self.gate_up.data, self.down.data, self.scratch)
        gate_up, _, residual = x.linear(*self.gate_up)
        return ops.silu_mul_linear(gate_up, *self.down), residual


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
        # What every token is multiplied with is joined: the shared expert's gate and up, the router, its own gate.
        shared = sharding.shared_intermediate(moe)
        both = dict.fromkeys(("shared_expert.gate_proj", "shared_expert.up_proj"), (shared,))
        self.in_proj = Joined(config, mesh, "mlp", [both, {"gate": (moe.experts,)}, {"shared_expert_gate": (1,)}])
        down = in_fp8(config, "mlp", {"shared_expert.down_proj": hidden})
        self.shared_down = matrix(mesh, hidden, shared, fp8=down)
        # An expert's gate and up have blocks of their own, so any width will do.
        fp8 = all(f"mlp.experts.{name}" in config.fp8 for name in ("gate_proj", "up_proj"))
        self.gate_up = matrix(mesh, self.experts, (intermediate, intermediate), hidden, fp8=fp8, halves=True)
        down = in_fp8(config, "mlp", {"experts.down_proj": hidden})
        self.down = matrix(mesh, self.experts, hidden, intermediate, fp8=down)
        # What the kernel of a small decode batch leaves for the next; the model's layers share one.
        size = moe_block_scratch(self.experts.count, self.top_k, hidden)
        self.register_buffer("scratch", torch.zeros(size, dtype=torch.int32), persistent=False)
        # The kernel takes all of them in FP8, but for the router, or none.
        used = (self.in_proj[0], self.shared_down, self.gate_up, self.down)
        self.in_one = len({weight.scale is None for weight in used}) == 1
        held = self.experts.slice(mesh)
        self.first_expert, self.bounds = held.start, slice(held.start, held.stop + 1)

    def sources(self):
        yield from self.in_proj.sources()
        yield source("shared_expert.down_proj.weight", self.shared_down, self.mesh, *self.shared_down.dims)
        # Checkpoints hold the experts either fused or one by one; whichever is there fills the same memory.
        _, hidden, intermediate = self.down.dims
        gate, up = self.gate_up.part.split([intermediate.local(self.mesh)] * 2)
        yield stacked("experts.gate_up_proj", [gate, up], self.mesh, self.experts, intermediate, hidden)
        yield source("experts.down_proj", self.down, self.mesh, *self.down.dims)
        columns, rows = (intermediate, hidden), (hidden, intermediate)
        for name, parts, dims in (
            ("gate_proj", gate, columns),
            ("up_proj", up, columns),
            ("down_proj", self.down.part, rows),
        ):
            for expert in range(self.experts.count):
                key, local = f"experts.{expert}.{name}.weight", expert - self.first_expert
                held = 0 <= local < len(parts.data)
                yield source(key, parts.expert(local), self.mesh, *dims) if held else not_held(key, *dims)

    def lay_out_by_columns(self):
        super().lay_out_by_columns()
        by_columns(self.down.data, first=1)  # so that all experts' products, each weighed, are one

    def forward(self, x, residual, batch):
        padded = batch.decode if batch.prefill is None else None  # a batch with prefills holds no padding
        contexts = padded.context_lens if padded else None
        # Rows that the kernel serves; on a CPU there is none.
        few = batch.prefill is None and (x.x.is_cpu or len(x.x) <= MOE_BLOCK_ROWS)
        many = self.gate_up.scale is not None and len(x.x) > KERNEL_ROWS  # whose norm is quantised once
        if self.in_one and x.residual is not None and (few or many):
            (first, in_scale), *others = self.in_proj
            experts = (first, self.experts.count, self.top_k, self.gate_up.data, self.down.data)
            router = others[0].data if others else None
            scales = (in_scale, self.gate_up.scale, self.down.scale, self.shared_down.scale)
            rest = (self.shared_down.data, self.scratch, self.first_expert, router, *scales, contexts)
            return ops.moe_block(*x, *experts, *rest)
        (shared, logits, shared_gate), x, residual = self.in_proj(x)
        weights, experts, order, offsets = ops.moe_route(logits, self.top_k, contexts)
        held = (order, offsets[self.bounds], self.gate_up.data, self.down.data, self.first_expert)
        scales = (self.gate_up.scale, self.down.scale)
        y = ops.moe_experts(x, weights, experts, *held, *scales, self.experts.count)
        down, scale = self.shared_down
        ops.add_gated_silu_mul_linear(y, shared, down, shared_gate, scale)
        return y, residual


class LMHead(Stage):
    """Logits [L, the rank's vocabulary], and in place of the residual stream the normed rows that they come from.

    picks_rows: every token's row arrives, because the MTP head wants them normed, and logits are those of `logit_rows`;
    else the rows were picked before the norm.
    """

    output = Shard(1, "tp")

    def __init__(self, config: ModelConfig, mesh: Mesh, tied: Embedding | None, picks_rows: bool):
        super().__init__(mesh)
        self.picks_rows = picks_rows
        self.tied = tied is not None
        self.weight = tied.weight if tied else weight(mesh, sharding.vocab(config), config.hidden)

    def sources(self):
        if not self.tied:
            yield source("weight", self.weight, self.mesh, *self.weight.dims)

    def lay_out_by_columns(self):
        if not self.tied:
            by_columns(self.weight)

    def forward(self, x, residual, batch):
        return x.linear_of(batch.logit_rows if self.picks_rows else None, self.weight)


def feed_forward(config: ModelConfig, mesh: Mesh) -> Stage:
    if isinstance(config.ffn, DenseConfig):
        return DenseFFN(config, mesh)
    return MoE(config, mesh)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
