"""The operators inside a loaded `transformers` model of the Qwen3.5 family: `use_operators(model)`.

Each module of a kind known here gets a forward pass of operators, as transformers' own kernel hooks give it one; its
parameters, its name and the model's cache stay what they are. Norms, products, the feed-forward blocks, the mixture of
experts and the Gated DeltaNet mixer are swapped. Attention over keys and values stays transformers'.
"""

from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


def use_operators(model: nn.Module, strict: bool = False) -> Counter[str]:
    """Swap the operators into a model, in place. Undone by `restore`; a second call changes `strict` alone.

    model: of transformers' Qwen3.5 or Qwen3.5-MoE classes, with or without its head; strict: raise
    `ops.NoKernel` from a forward pass where a compiled kernel does not serve an operator. Returns how many modules of
    each kind were swapped. Call the model under torch.inference_mode() or torch.no_grad().

    Raises ValueError where the model has no module of a known kind, or products of another kind than nn.Linear (a
    quantised model). A forward pass raises ValueError for a cache that
    records the past (assisted generation), which the mixer's state cannot be cut back in.
    """
    swapped: Counter[str] = Counter()
    for module in model.modules():
        kind = _kind(module)
        if kind is not None:
            if kind in STACKED:
                _stacked(*(getattr(module, name) for name in STACKED[kind]))
            module.forward = MethodType(_strictly(FORWARDS[kind]) if strict else FORWARDS[kind], module)
            swapped[kind] += 1
    if not swapped:
        raise ValueError(f"{type(model).__name__} has none of the modules {', '.join(FORWARDS)} of Qwen3.5.")
    return swapped


def restore(model: nn.Module) -> None:
    """Give every swapped module its own forward pass back."""
    for module in model.modules():
        if _kind(module) is not None:
            module.__dict__.pop("forward", None)


def _kind(module: nn.Module) -> str | None:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "Linear" if type(module) is nn.Linear and module.bias is None else None
    if not name.startswith("Qwen3_5"):
        return None
    kind = name.removeprefix("Qwen3_5").removeprefix("Moe")
    return kind if kind in FORWARDS else None


def _strictly(forward: Callable) -> Callable:
    def call(self, *args, **kwargs):
        with ops.strict():
            return forward(self, *args, **kwargs)

    return call


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return ops.rms_norm(rows, self.weight, self.eps).view(hidden_states.shape)


def _gated_rms_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    rows = (-1, 1, hidden_states.shape[-1])
    normed = ops.gated_rms_norm(hidden_states.reshape(rows), gate.reshape(rows), self.weight, self.variance_epsilon)
    return normed.view(hidden_states.shape)


def _linear(self: Any, x: Tensor) -> Tensor:
    return ops.linear(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def _stacked(first: nn.Linear, *others: nn.Linear) -> Tensor:
    """The weights of products of one operand as one matrix. They become views of it, so nothing is held twice; where
    they were moved since, it is made anew."""
    for layer in (first, *others):
        if type(layer) is not nn.Linear or layer.bias is not None:
            raise ValueError(
                f"a product is {layer}; the operators take nn.Linear without bias, of a model not quantised."
            )
    weights = [layer.weight for layer in (first, *others)]
    start, rows = first.weight.data_ptr(), sum(weight.shape[0] for weight in weights)
    behind = start
    for weight in weights:
        if weight.data_ptr() != behind or not weight.is_contiguous():
            break
        behind += weight.nbytes
    else:
        if first.weight.untyped_storage().nbytes() >= behind - start:
            return torch.as_strided(first.weight.detach(), (rows, weights[0].shape[1]), (weights[0].shape[1], 1))
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, whole.split([weight.shape[0] for weight in weights]), strict=True):
            weight.data = part
    if whole.is_cuda:
        torch.cuda.synchronize(whole.device)  # a kernel may read a weight before the launch ahead has finished
    return whole


def _feed_forward(self: Any, x: Tensor) -> Tensor:
    gate_up = ops.linear(x.reshape(-1, x.shape[-1]), _stacked(self.gate_proj, self.up_proj))
    return ops.silu_mul_linear(gate_up, self.down_proj.weight).view(*x.shape[:-1], -1)


def _experts(self: Any, hidden_states: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    weights, experts, order, offsets = ops.moe_route(ops.linear(x, self.gate.weight), self.gate.top_k)
    gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
    out = ops.moe_experts(x, weights, experts, order, offsets, gate_up, down)
    shared = self.shared_expert
    hidden = ops.linear(x, _stacked(shared.gate_proj, shared.up_proj))
    gate = ops.linear(x, self.shared_expert_gate.weight)
    ops.add_gated_silu_mul_linear(out, hidden, shared.down_proj.weight, gate)
    return out.view(hidden_states.shape)


def _gated_delta_net(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    if attention_mask is not None:  # padding tokens are tokens of zeros, as in transformers
        hidden_states = (hidden_states * attention_mask[:, :, None]).to(hidden_states.dtype)
    # First, not just ahead of their reader: kernels may read them before the launch ahead has finished.
    a_log, dt_bias = self.A_log.float(), self.dt_bias.float()
    batch, tokens = hidden_states.shape[:2]
    x = hidden_states.reshape(batch * tokens, -1)
    channels, nv = self.conv_dim, self.num_v_heads
    product = ops.linear(x, _stacked(*(getattr(self, name) for name in STACKED["GatedDeltaNet"])))
    qkv, z, b, a = product.split([channels, self.value_dim, nv, nv], dim=1)
    records = _Records.of(self, cache_params, batch, qkv)
    conv_weight = self.conv1d.weight.squeeze(1)
    eps = self.layer_norm_epsilon
    state, ring, cursor, window, context, slots = records.arguments()
    if tokens == 1 and records.started:
        weights = (conv_weight, a_log, dt_bias, self.norm.weight, eps)
        out = ops.gated_delta_rule_decode(
            qkv, z, a, b, *weights, state, ring, cursor, window, context, slots, slots
        )  # fmt: skip
    else:
        starts = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=x.device)
        where = (starts, context, slots, slots, torch.empty(0, 3, dtype=torch.int32, device=x.device))
        mixed = ops.causal_conv1d(qkv, conv_weight, window, *where)
        core = ops.gated_delta_rule_prefill(mixed, a, b, a_log, dt_bias, state, ring, cursor, *where, tokens)
        z = z.unflatten(1, (nv, self.head_v_dim))
        out = ops.gated_rms_norm(core, z, self.norm.weight, eps).flatten(1)
    records.advance(tokens)
    return self.out_proj(out.view(batch, tokens, -1))


class _Records:
    """The mixer's records of a batch, in the tensors of transformers' cache: its recurrent state [B, nv, dk, dv] is a
    view of ours [B, nv, dv, dk], and its convolution state [B, channels, taps] of our window [B, taps, channels], in
    which token t stands at t mod taps. What the cache does to a batch (reorder, offload, repeat) holds for both.
    """

    def __init__(self, state: Tensor, window: Tensor, context: Tensor, layer: Any, started: bool):
        self.state, self.window, self.context, self.layer, self.started = state, window, context, layer, started

    @classmethod
    def of(cls, module: Any, cache: Any, batch: int, like: Tensor) -> "_Records":
        layer = None if cache is None else cache.layers[module.layer_idx]
        if layer is not None and layer.record_past:
            raise ValueError("the cache records the past, for assisted generation; use_operators has no way back.")
        if layer is None or not layer.has_previous_state[0] or not hasattr(layer, "tokenspeed_context"):
            return cls._fresh(module, layer, batch, like)
        if layer.tokenspeed_context.shape[0] != batch:  # every sequence of a batch has as many tokens
            layer.tokenspeed_context = layer.tokenspeed_context[:1].repeat(batch)
        records = []
        for states in (layer.recurrent_states, layer.conv_states):
            own = states[0].transpose(-1, -2)
            if not own.is_contiguous():  # the cache was reordered or repeated
                own = own.contiguous()
                states[0] = own.transpose(-1, -2)
            records.append(own)
        return cls(records[0], records[1], layer.tokenspeed_context, layer, True)

    @classmethod
    def _fresh(cls, module: Any, layer: Any, batch: int, like: Tensor) -> "_Records":
        heads = (module.num_v_heads, module.head_v_dim, module.head_k_dim)
        state = torch.empty(batch, *heads, dtype=torch.float32, device=like.device)
        window = like.new_empty(batch, module.conv_kernel_size, module.conv_dim)
        context = torch.zeros(batch, dtype=torch.int32, device=like.device)
        if layer is not None:
            layer.device, layer.dtype = like.device, like.dtype
            layer.recurrent_states[0], layer.conv_states[0] = state.transpose(-1, -2), window.transpose(-1, -2)
            layer.is_recurrent_states_initialized[0] = layer.is_conv_states_initialized[0] = True
            layer.conv_kernel_size[0] = module.conv_kernel_size
            layer.has_previous_state[0] = True
            layer.tokenspeed_context = context
        return cls(state, window, context, layer, False)

    def arguments(self) -> tuple[Tensor, ...]:
        """state, ring, cursor, window, context_lens, slots: the ring is empty, so the state is always up to date."""
        (batch, nv, dv, _), channels = self.state.shape, self.window.shape[2]
        ring = self.state.new_empty(batch, 0, (channels - nv * dv) // 2 + nv * dv + nv)
        slots = torch.arange(batch, dtype=torch.int32, device=self.state.device)
        return self.state, ring, self.context[:, None].repeat(1, nv), self.window, self.context, slots

    def advance(self, tokens: int) -> None:
        self.context.add_(tokens)


STACKED = {
    "MLP": ("gate_proj", "up_proj"),
    "GatedDeltaNet": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
}
FORWARDS: dict[str, Callable] = {
    "RMSNorm": _rms_norm,
    "RMSNormGated": _gated_rms_norm,
    "Linear": _linear,
    "MLP": _feed_forward,
    "SparseMoeBlock": _experts,
    "GatedDeltaNet": _gated_delta_net,
}
