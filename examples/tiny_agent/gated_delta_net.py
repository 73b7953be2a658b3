"""The Gated DeltaNet mixer in its chunked form, differentiable."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from examples.tiny_agent.config import ModelConfig
from examples.tiny_agent.layers import GatedRMSNorm, linear

# Tokens per chunk: the cheapest on a CPU, and few steps one after the other on a GPU.
CHUNK_SIZES = {"cpu": 16, "cuda": 64}


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.sizes = [keys, keys, values]
        hidden, channels, width = config.hidden_size, 2 * keys + values, config.linear_conv_kernel_dim
        self.in_proj_qkv = linear(hidden, channels)
        self.in_proj_z = linear(hidden, values)
        self.in_proj_b = linear(hidden, self.value_heads)
        self.in_proj_a = linear(hidden, self.value_heads)
        self.out_proj = linear(values, hidden, gain=0.5)
        self.conv1d = nn.Conv1d(channels, channels, width, groups=channels, bias=False)
        # Decays start slow, so that memory reaches over hundreds of tokens: softplus(dt_bias) in [1e-3, 0.1].
        steps = torch.exp(torch.empty(self.value_heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus of it gives `steps`
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 16).log())
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, T, hidden] -> [batch, T, hidden]; starts from an empty state."""
        batch, length, _ = x.shape
        chunk = CHUNK_SIZES[x.device.type]
        x = F.pad(x, (0, 0, 0, -length % chunk))  # at the end: later tokens never reach earlier ones
        padded = x.shape[1]
        q, k, v = F.silu(self._convolve(self.in_proj_qkv(x))).split(self.sizes, -1)
        q = _normalise(q.view(batch, padded, self.key_heads, self.key_dim)) * self.key_dim**-0.5
        k = _normalise(k.view(batch, padded, self.key_heads, self.key_dim))
        v = v.view(batch, padded, self.value_heads, self.value_dim)
        group = self.value_heads // self.key_heads
        q, k = (t.repeat_interleave(group, 2) for t in (q, k))
        beta = self.in_proj_b(x).sigmoid()
        log_decay = -self.A_log.exp() * F.softplus(self.in_proj_a(x) + self.dt_bias)
        out = gated_delta_rule(*(t.transpose(1, 2) for t in (q, k, v, log_decay, beta)), chunk).transpose(1, 2)
        z = self.in_proj_z(x).view(batch, padded, self.value_heads, self.value_dim)
        return self.out_proj(self.norm(out, z).reshape(batch, padded, -1))[:, :length]

    def _convolve(self, y: torch.Tensor) -> torch.Tensor:
        """Depthwise causal convolution of y [batch, T, channels], as one product per tap: faster than conv1d here."""
        taps = self.conv1d.weight[:, 0]
        width, length = taps.shape[1], y.shape[1]
        y = F.pad(y, (0, 0, width - 1, 0))
        out = y[:, :length] * taps[:, 0]
        for i in range(1, width):
            out = out + y[:, i : i + length] * taps[:, i]
        return out


def gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, chunk: int
) -> torch.Tensor:
    """S <- e^log_decay S; S <- S + k (beta (v - S^T k))^T; o = S^T q, in chunks of `chunk` tokens.

    q, k [batch, heads, T, key_dim]; v [batch, heads, T, value_dim]; log_decay, beta [batch, heads, T]; T a multiple of
    chunk. Returns o like v. With G the running sum of log_decay inside a chunk and P_ij = e^(G_i - G_j) for j <= i:
    (I + L) [U | W] = [beta v | beta k e^G] where L = strict_lower(beta_i k_i.k_j P_ij), then V' = U - W S,
    o = (q e^G) S + (q k^T P) V' and S <- e^G_C S + (k e^(G_C - G))^T V'.
    """
    batch, heads, length, value_dim = v.shape
    q, k, v = (t.reshape(batch * heads, length // chunk, chunk, -1) for t in (q, k, v))
    log_decay, beta = (t.reshape(batch * heads, length // chunk, chunk, 1) for t in (log_decay, beta))
    total = log_decay.cumsum(-2)
    grown = total.exp()
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~lower, float("-inf")).exp()
    weighted_k = k * beta
    power = -((weighted_k @ k.mT) * decay).tril(-1)
    scores = (q @ k.mT) * decay
    solved = torch.cat([v * beta, weighted_k * grown], -1)
    for exponent in range((chunk - 1).bit_length()):  # (I - N)^-1 = (I + N)(I + N^2)(I + N^4)..., as N^chunk = 0
        if exponent:
            power = power @ power
        solved = solved + power @ solved
    u, w = solved.split([value_dim, k.shape[-1]], -1)
    k_to_end = (k * (total[..., -1:, :] - total).exp()).mT
    state = q.new_zeros(batch * heads, k.shape[-1], value_dim)
    states, updates = [], []
    chunks = zip(u.unbind(1), w.unbind(1), k_to_end.unbind(1), grown[..., -1:, :].unbind(1), strict=True)
    for chunk_u, chunk_w, chunk_k, chunk_decay in chunks:
        update = torch.baddbmm(chunk_u, chunk_w, state, alpha=-1)
        states.append(state)
        updates.append(update)
        state = torch.baddbmm(state * chunk_decay, chunk_k, update)
    out = (q * grown) @ torch.stack(states, 1) + scores @ torch.stack(updates, 1)
    return out.reshape(batch, heads, length, value_dim)


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
