"""The trainable MTP head: one decoder layer that guesses the token after the next from the trunk's state, on a trunk
that stays as it is. Parameter names are the published ones below `mtp.`.
"""

import math

import torch
from torch import nn

from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.layers import RMSNorm, linear
from examples.tiny_agent.model import Layer, Rope, TinyAgent, rope_table, rotate


class MtpHead(nn.Module):
    """x = fc [norm(E[token_{t+1}]); norm(h_t)]; a full-attention layer at position t; norm. h: the trunk's state after
    its final norm, or the head's own output in further drafts. E and the output matrix are the trunk's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.fc = linear(2 * config.hidden_size, config.hidden_size)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )
        self.layers = nn.ModuleList([Layer(config, "full_attention")])

    def start_from(self, trunk: TinyAgent) -> None:
        """Starts as the trunk's last layer once more, with the next token's embedding beside the state."""
        self.layers[0].load_state_dict(trunk.model.layers[-1].state_dict())
        with torch.no_grad():
            self.fc.weight[:, self.config.hidden_size :] = torch.eye(self.config.hidden_size)

    def forward(self, following: torch.Tensor, hidden: torch.Tensor, drafts: int) -> list[torch.Tensor]:
        """States [batch, T, hidden] of each draft 1 .. drafts, all positions at once.

        following: embeddings of the next token of each position; hidden: the trunk's states, both [batch, T, hidden].
        Draft d at position t stands for the d-th of a chain that began at position t - d + 1, with true tokens since:
        it takes the state of draft d - 1 at t - 1, and sees the keys that the chain would have, those of draft 1 up to
        where the chain began and one of each draft since. Its first d - 1 positions stand for nothing.
        """
        rope = rope_table(hidden.shape[1], self.config, hidden.device)
        embedded = self.pre_fc_norm_embedding(following)
        states, chain = [], []
        for _ in range(drafts):
            x = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(hidden)], -1))
            layer = self.layers[0]
            x = x + self._attention(layer.input_layernorm(x), rope, chain)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            states.append(self.norm(x))
            hidden = states[-1].roll(1, dims=1)
        return states

    def _attention(self, x: torch.Tensor, rope: Rope, chain: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """chain: keys and values [batch, heads, T, head_dim] of the drafts before; gets this one's."""
        attention = self.layers[0].self_attn
        batch, length, _ = x.shape
        q, gate = attention.q_proj(x).view(batch, length, attention.heads, -1).chunk(2, -1)
        k, v = (
            projection(x).view(batch, length, attention.kv_heads, attention.head_dim)
            for projection in (attention.k_proj, attention.v_proj)
        )
        q = rotate(attention.q_norm(q).transpose(1, 2), rope)
        group = attention.heads // attention.kv_heads
        k = rotate(attention.k_norm(k).transpose(1, 2), rope).repeat_interleave(group, 1)
        chain.append((k, v.transpose(1, 2).repeat_interleave(group, 1)))
        out = attend(q, chain).transpose(1, 2)
        return attention.o_proj((out * gate.sigmoid()).reshape(batch, length, -1))


def attend(q: torch.Tensor, chain: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """q [batch, heads, T, head_dim] of draft d sees draft 1 up to d - 1 positions before, then one key of each."""
    (keys, values), *others = chain
    depth, length, scale = len(chain), q.shape[2], 1 / math.sqrt(q.shape[3])
    if depth == 1:
        return nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(2 - depth)
    scores = [(q @ keys.mT * scale).masked_fill(hidden, -torch.inf)]
    shifted = [[x.roll(depth - draft, dims=2) for x in pair] for draft, pair in enumerate(others, start=2)]
    scores += [(q * key).sum(-1, keepdim=True) * scale for key, _ in shifted]
    first, *rest = torch.cat(scores, -1).softmax(-1).split([length] + [1] * len(shifted), -1)
    return first @ values + sum(share * value for share, (_, value) in zip(rest, shifted, strict=True))
