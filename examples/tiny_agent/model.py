"""A trainable Qwen3.5-MoE in plain torch; parameter names are those of `Qwen3_5MoeForCausalLM`.

Made for speed of training on one CPU core: whole sequences, no cache. T below is the padded sequence length.
"""

import torch
import torch.nn.functional as F
from torch import nn

from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.gated_delta_net import GatedDeltaNet
from examples.tiny_agent.layers import RMSNorm, linear

Rope = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Grouped-query attention with normed q and k, partial rope and a sigmoid output gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden = config.hidden_size
        self.q_proj = linear(hidden, 2 * self.heads * self.head_dim)
        self.k_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.v_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, hidden, gain=0.5)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, self.heads, 2 * self.head_dim).chunk(2, -1)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        q = rotate(self.q_norm(q).transpose(1, 2), rope)
        group = self.heads // self.kv_heads
        k = rotate(self.k_norm(k).transpose(1, 2), rope).repeat_interleave(group, 1)
        v = v.transpose(1, 2).repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o_proj((out * gate.sigmoid()).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = linear(hidden, intermediate)
        self.up_proj = linear(hidden, intermediate)
        self.down_proj = linear(intermediate, hidden, gain=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts' weights, fused over experts."""

    def __init__(self, count: int, hidden: int, intermediate: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * intermediate, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, intermediate) * 0.5 * intermediate**-0.5)

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """x [rows, hidden], sorted by expert, `counts` rows each -> [rows, hidden]."""
        outputs = []
        for expert, rows in enumerate(x.split(counts)):
            if len(rows):
                gate, up = F.linear(rows, self.gate_up_proj[expert]).chunk(2, -1)
                outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        return torch.cat(outputs)


class MoE(nn.Module):
    """Top-k routed experts with renormalised weights, plus a gated shared expert.

    `balance_loss` of the last forward is 1 when the experts are used evenly and more when they are not.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, self.experts_per_token = config.hidden_size, config.num_experts_per_tok
        self.gate = linear(hidden, config.num_experts, gain=0.2)
        self.experts = Experts(config.num_experts, hidden, config.moe_intermediate_size)
        self.shared_expert = MLP(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        probabilities = self.gate(x).softmax(-1)
        weights, chosen = probabilities.topk(self.experts_per_token, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = chosen.flatten()
        counts = chosen.bincount(minlength=probabilities.shape[-1])
        self.balance_loss = len(counts) * (counts / len(chosen) * probabilities.mean(0)).sum()
        order = chosen.argsort(stable=True)
        token = order // self.experts_per_token
        routed = self.experts(x[token], counts.tolist()) * weights.flatten()[order, None]
        shared = self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return shared.index_add(0, token, routed).view(shape)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer_type: str):
        super().__init__()
        if layer_type == "full_attention":
            self.self_attn = Attention(config)
        else:
            self.linear_attn = GatedDeltaNet(config)
        self.mlp = MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        h = self.input_layernorm(x)
        x = x + (self.self_attn(h, rope) if hasattr(self, "self_attn") else self.linear_attn(h))
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config, layer_type) for layer_type in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class TinyAgent(nn.Module):
    """The whole network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [batch, T] -> normed hidden states fp32 [batch, T, hidden]."""
        rope = rope_table(ids.shape[1], self.config, ids.device)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, rope)
        return self.model.norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [batch, T] -> logits fp32 [batch, T, vocabulary]."""
        return self.lm_head(self.hidden(ids))

    def balance_loss(self) -> torch.Tensor:
        """Mean over layers of the last forward's expert imbalance."""
        return torch.stack([layer.mlp.balance_loss for layer in self.model.layers]).mean()


def rope_table(length: int, config: ModelConfig, device: torch.device) -> Rope:
    """cos and sin [T, rotary_dim] of the half-split rotary embedding."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.rotary_dim, 2, device=device) / config.rotary_dim)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Turns the first rotary_dim dimensions of x [batch, heads, T, head_dim]; the rest passes."""
    cos, sin = rope
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, kept], -1)
