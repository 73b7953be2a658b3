"""The stages of the network. Each is one callable of the flat program:

    forward(x, residual, batch) -> (x, residual)

x: [N, hidden], what the stage works on; residual: [N, hidden], the stream that mixers and feed-forwards add to through
the norm that follows them. Every stage declares the placement of its input, output and weights over a group of ranks,
and which checkpoint tensors fill which part of its parameters.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ..batch import Batch
from ..config import DenseConfig, ModelConfig, MoeConfig
from ..memory import StateViews
from ..parallel.placement import Partial, Placement, Replicate, Shard

Flow = tuple[Tensor, Tensor | None]


class Stage(nn.Module):
    """input, output: placement of x over the ranks of a group."""

    input: Placement = Replicate()
    output: Placement = Replicate()

    def sources(self) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint keys below the stage's own prefix, each with the part of a parameter it fills."""
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor | None, batch: Batch) -> Flow:
        raise NotImplementedError


def _weight(*shape: int, placement: Placement, dtype: torch.dtype | None = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    parameter.placement = placement
    return parameter


class Embedding(Stage):
    """Token ids to the residual stream."""

    output = Partial()

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = _weight(config.vocab, config.hidden, placement=Shard(0))

    def sources(self):
        yield "weight", self.weight

    def forward(self, x, residual, batch):
        return F.embedding(batch.tokens, self.weight), None


class Norm(Stage):
    """Adds x to the residual stream and normalises the stream; the first norm finds the stream in x."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.eps
        self.weight = _weight(config.hidden, placement=Replicate())

    def sources(self):
        yield "weight", self.weight

    def forward(self, x, residual, batch):
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps), residual


class FinalNorm(Norm):
    """The last norm, for the tokens whose logits are wanted."""

    def forward(self, x, residual, batch):
        return super().forward(x[batch.logit_rows], residual[batch.logit_rows], batch)


class GatedAttention(Stage):
    """Full attention with normalised, partly rotated queries and keys and a sigmoid output gate."""

    output = Partial()

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.layer, self.eps, self.head_dim, self.scale = layer, c.eps, c.head_dim, c.head_dim**-0.5
        self.query_width, self.kv_width = 2 * c.q_heads * c.head_dim, c.kv_heads * c.head_dim
        self.qkv = _weight(self.query_width + 2 * self.kv_width, c.hidden, placement=Shard(0))
        self.out = _weight(c.hidden, c.q_heads * c.head_dim, placement=Shard(1))
        self.q_norm, self.k_norm = (_weight(c.head_dim, placement=Replicate()) for _ in range(2))

    def sources(self):
        q, k, v = self.qkv.split([self.query_width, self.kv_width, self.kv_width])
        yield from (("q_proj.weight", q), ("k_proj.weight", k), ("v_proj.weight", v))
        yield from (("o_proj.weight", self.out), ("q_norm.weight", self.q_norm), ("k_norm.weight", self.k_norm))

    def forward(self, x, residual, batch):
        kv = batch.memory.layers[self.layer]
        qkv = ops.linear(x, self.qkv)
        q = ops.attention_prologue(qkv, self.q_norm, self.k_norm, batch.cos_sin, kv, batch.kv_slots, self.eps)
        gate = qkv[:, : self.query_width].unflatten(1, (-1, 2, self.head_dim))[:, :, 1]
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

    output = Partial()

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.layer, self.eps, self.heads = layer, c.eps, (c.value_heads, c.value_dim)
        self.widths = [c.conv_channels, c.value_heads * c.value_dim, c.value_heads, c.value_heads]
        self.in_proj = _weight(sum(self.widths), c.hidden, placement=Shard(0))
        self.conv = _weight(c.conv_channels, c.conv_taps, placement=Shard(0))
        # The decay is an exponential of an exponential: its two parameters stay fp32, like the state they act on.
        fp32 = {"placement": Shard(0), "dtype": torch.float32}
        self.a_log, self.dt_bias = (_weight(c.value_heads, **fp32) for _ in range(2))
        self.norm = _weight(c.value_dim, placement=Replicate())
        self.out = _weight(c.hidden, c.value_heads * c.value_dim, placement=Shard(1))

    def sources(self):
        names = ("in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight")
        yield from zip(names, self.in_proj.split(self.widths), strict=True)
        yield from (("conv1d.weight", self.conv[:, None]), ("A_log", self.a_log), ("dt_bias", self.dt_bias))
        yield from (("norm.weight", self.norm), ("out_proj.weight", self.out))

    def forward(self, x, residual, batch):
        views: StateViews = batch.memory.layers[self.layer]
        qkv, z, b, a = ops.linear(x, self.in_proj).split(self.widths, dim=1)
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
    """SwiGLU."""

    output = Partial()

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_up = _weight(2 * intermediate, hidden, placement=Shard(0))
        self.down = _weight(hidden, intermediate, placement=Shard(1))

    def sources(self):
        gate, up = self.gate_up.chunk(2)
        yield from (("gate_proj.weight", gate), ("up_proj.weight", up), ("down_proj.weight", self.down))

    def forward(self, x, residual, batch):
        return ops.linear(ops.silu_mul(ops.linear(x, self.gate_up)), self.down), residual


class MoE(Stage):
    """Routed experts and one shared expert behind a sigmoid gate."""

    output = Partial()

    def __init__(self, hidden: int, moe: MoeConfig):
        super().__init__()
        self.top_k = moe.top_k
        self.router = _weight(moe.experts, hidden, placement=Replicate())
        self.gate_up = _weight(moe.experts, 2 * moe.intermediate, hidden, placement=Shard(0, "ep"))
        self.down = _weight(moe.experts, hidden, moe.intermediate, placement=Shard(0, "ep"))
        self.shared = DenseFFN(hidden, moe.shared_intermediate)
        self.shared_gate = _weight(1, hidden, placement=Replicate())

    def sources(self):
        yield from (("gate.weight", self.router), ("shared_expert_gate.weight", self.shared_gate))
        yield from ((f"shared_expert.{key}", part) for key, part in self.shared.sources())
        # Checkpoints hold the experts either fused or one by one; whichever is there fills the same memory.
        yield from (("experts.gate_up_proj", self.gate_up), ("experts.down_proj", self.down))
        gate, up = self.gate_up.chunk(2, dim=1)
        for name, parts in (("gate_proj", gate), ("up_proj", up), ("down_proj", self.down)):
            for expert, part in enumerate(parts):
                yield f"experts.{expert}.{name}.weight", part

    def forward(self, x, residual, batch):
        routing = ops.moe_route(ops.linear(x, self.router), self.top_k)
        y = ops.moe_experts(x, *routing, self.gate_up, self.down)
        shared, _ = self.shared(x, None, batch)
        ops.add_sigmoid_gated(y, shared, ops.linear(x, self.shared_gate))
        return y, residual


class LMHead(Stage):
    """Logits of the rows the final norm kept, [L, vocab]."""

    output = Shard(1)

    def __init__(self, config: ModelConfig, tied: Embedding | None):
        super().__init__()
        self.tied = tied is not None
        self.weight = tied.weight if tied else _weight(config.vocab, config.hidden, placement=Shard(0))

    def sources(self):
        if not self.tied:
            yield "weight", self.weight

    def forward(self, x, residual, batch):
        return ops.linear(x, self.weight), None


def feed_forward(config: ModelConfig) -> Stage:
    if isinstance(config.ffn, DenseConfig):
        return DenseFFN(config.hidden, config.ffn.intermediate)
    return MoE(config.hidden, config.ffn)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
