"""The published mathematics of every operator, token by token, in double precision on the CPU.

Nothing here is shared with the implementations: loops where they batch, complex numbers where they split halves.
"""

import math

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = exact(x), exact(weight)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, exact(weight) - 1, eps) * silu(exact(gate))


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """x: [N, heads, D]; angles: [N, R / 2]. Pair (j, j + R/2) is one complex number, turned by its angle."""
    x, half = exact(x), angles.shape[1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = pairs * torch.exp(1j * exact(angles))[:, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q: [T, q_heads, D], the last T of the L tokens in k, v: [L, kv_heads, D]. Dense softmax, one head at a time."""
    q, k, v = exact(q), exact(k), exact(v)
    tokens, heads, length, group = q.shape[0], q.shape[1], k.shape[0], q.shape[1] // k.shape[1]
    future = torch.ones(tokens, length).triu(length - tokens + 1).bool()
    out = torch.empty_like(q)
    for head in range(heads):
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(future, -math.inf)
        out[:, head] = torch.softmax(scores, dim=-1) @ v[:, head // group]
    return out


def causal_conv(x: Tensor, weight: Tensor, history: Tensor) -> Tensor:
    """x: [T, C]; weight: [C, taps]; history: [taps - 1, C], the inputs before x. An explicit window per token."""
    inputs, weight = torch.cat([exact(history), exact(x)]), exact(weight)
    taps = weight.shape[1]
    windows = [inputs[t : t + taps] for t in range(len(x))]
    return torch.stack([silu((window * weight.T).sum(0)) for window in windows]) if windows else exact(x)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def log_decay(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    shifted = exact(a) + exact(dt_bias)
    return -exact(a_log).exp() * torch.logaddexp(shifted, torch.zeros_like(shifted))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-exact(x)))


def delta_rule(qkv: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor):
    """The gated delta rule, one token after the other.

    qkv: [T, 2 nk dk + nv dv] after convolution; a, b: [T, nv]; state: [nv, dv, dk] before the first token.
    Returns outputs [T, nv, dv] and the states after 0 .. T tokens, [T + 1, nv, dv, dk].
    """
    heads, value_dim, key_dim = state.shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    q, k, v = exact(qkv).split([key_heads * key_dim, key_heads * key_dim, heads * value_dim], dim=1)
    q, k = (unit(x.reshape(-1, key_heads, key_dim)).repeat_interleave(heads // key_heads, 1) for x in (q, k))
    v = v.reshape(-1, heads, value_dim)
    alpha, beta = log_decay(a, a_log, dt_bias).exp(), sigmoid(b)
    states, outputs = [exact(state)], []
    for t in range(len(qkv)):
        decayed = alpha[t, :, None, None] * states[-1]
        error = v[t] - torch.einsum("hvk,hk->hv", decayed, k[t])
        states.append(decayed + torch.einsum("h,hv,hk->hvk", beta[t], error, k[t]))
        outputs.append(torch.einsum("hvk,hk->hv", states[-1], q[t]) / math.sqrt(key_dim))
    return torch.stack(outputs) if outputs else exact(v), torch.stack(states)


def fold(state: Tensor, ring: Tensor, cursor: Tensor, context: int) -> Tensor:
    """The state a slot stands for after `context` tokens: its ring rows from the cursor on, applied in order.

    state: [nv, dv, dk]; ring: [R, nk dk + nv dv + nv]; cursor: [nv]. Returns [nv, dv, dk].
    """
    heads, value_dim, key_dim = state.shape
    state = exact(state).clone()
    for head in range(heads):
        for token in range(int(cursor[head]), context):
            row = exact(ring[token % len(ring)])
            k, u, g = row.split([len(row) - heads * value_dim - heads, heads * value_dim, heads])
            k = k.reshape(-1, key_dim)
            outer = torch.outer(u.reshape(heads, value_dim)[head], k[head // (heads // len(k))])
            state[head] = g[head].exp() * state[head] + outer
    return state


def route(logits: Tensor, top_k: int):
    """Weights [N, top_k] and experts [N, top_k] (lists of the choices by falling probability, the lower expert first
    among equals), and the choices token * top_k + rank grouped by expert."""
    probabilities = torch.softmax(exact(logits), dim=-1)
    rows = [
        sorted(range(logits.shape[1]), key=lambda e, row=row: (-row[e], e))[:top_k] for row in exact(logits).tolist()
    ]
    experts = torch.tensor(rows, dtype=torch.int64).reshape(-1, top_k)
    weights = probabilities.gather(1, experts)
    groups = [[c for c, e in enumerate(experts.flatten().tolist()) if e == expert] for expert in range(logits.shape[1])]
    return weights / weights.sum(-1, keepdim=True), experts, groups


def mixture(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The sum over a token's experts, one token and one expert at a time."""
    x, weights, gate_up, down = exact(x), exact(weights), exact(gate_up), exact(down)
    width, out = gate_up.shape[1] // 2, torch.zeros_like(x)
    for token in range(len(x)):
        for rank, expert in enumerate(experts[token].tolist()):
            hidden = gate_up[expert] @ x[token]
            out[token] += weights[token, rank] * (down[expert] @ (silu(hidden[:width]) * hidden[width:]))
    return out
