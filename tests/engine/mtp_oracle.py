"""The MTP head in plain torch, fp32, written from its description alone: published checkpoints carry it, `transformers`
drops it. And checkpoints with random ones."""

import json
from pathlib import Path

import torch
from checkpoints import Shape, oracle_without_ties
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


def rms1(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + weight)


class MtpOracle:
    """One sequence's drafts: positions are given in order, keys and values of all of them stay."""

    def __init__(self, weights: Weights, config: dict):
        """weights: the checkpoint's, experts fused; config: its config.json."""
        self.weights, self.config, self.eps = weights, config, config["rms_norm_eps"]
        self.embedding = weights["model.embed_tokens.weight"]
        self.lm_head = weights.get("lm_head.weight", self.embedding)
        self.keys, self.values = [], []
        self.gap = 1.0  # of the last expert chosen to the first that is not: near a tie either may be right

    def run(self, next_tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """next_tokens: [T], the token behind each position; hidden: [T, H]. Logits [T, V] and hidden [T, H]."""
        outputs = [self._position(int(token), h) for token, h in zip(next_tokens, hidden, strict=True)]
        return torch.stack([self.lm_head @ row for row in outputs]), torch.stack(outputs)

    def _position(self, next_token: int, hidden: Tensor) -> Tensor:
        w, eps = self.weights, self.eps
        embedded = rms1(self.embedding[next_token], w["mtp.pre_fc_norm_embedding.weight"], eps)
        state = rms1(hidden, w["mtp.pre_fc_norm_hidden.weight"], eps)
        x = w["mtp.fc.weight"] @ torch.cat([embedded, state])
        x = x + self._attention(rms1(x, w["mtp.layers.0.input_layernorm.weight"], eps))
        x = x + self._ffn(rms1(x, w["mtp.layers.0.post_attention_layernorm.weight"], eps))
        return rms1(x, w["mtp.norm.weight"], eps)

    def _attention(self, x: Tensor) -> Tensor:
        heads, kv_heads, width = (
            self.config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        w = {key.rsplit(".", 2)[1]: tensor for key, tensor in self.weights.items() if "mtp.layers.0.self_attn" in key}
        q, gate = (w["q_proj"] @ x).view(heads, 2, width).unbind(1)
        k, v = ((w[name] @ x).view(kv_heads, width) for name in ("k_proj", "v_proj"))
        position = len(self.keys)
        self.keys.append(self._rope(rms1(k, w["k_norm"], self.eps), position))
        self.values.append(v)
        q = self._rope(rms1(q, w["q_norm"], self.eps), position)
        outputs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            keys, values = (torch.stack(rows)[:, group] for rows in (self.keys, self.values))
            outputs.append((keys @ q[head] / width**0.5).softmax(0) @ values)
        return w["o_proj"] @ (torch.stack(outputs) * gate.sigmoid()).flatten()

    def _rope(self, x: Tensor, position: int) -> Tensor:
        half = x.shape[-1] // 8  # a quarter of the head is rotated, in pairs
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = position * theta ** -(torch.arange(half) / half)
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)

    def _ffn(self, x: Tensor) -> Tensor:
        w = {key.removeprefix("mtp.layers.0.mlp."): tensor for key, tensor in self.weights.items()}

        def swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

        if "gate.weight" not in w:
            return swiglu(*(w[f"{name}_proj.weight"] for name in ("gate", "up", "down")))
        count = self.config["num_experts_per_tok"]
        shares, chosen = (w["gate.weight"] @ x).softmax(0).topk(count + 1)
        self.gap = min(self.gap, float(shares[count - 1] - shares[count]))
        shares, chosen = shares[:count], chosen[:count]
        y = torch.sigmoid(w["shared_expert_gate.weight"] @ x) * swiglu(
            *(w[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
        )
        for share, expert in zip(shares / shares.sum(), chosen.tolist(), strict=True):
            gate, up = w["experts.gate_up_proj"][expert].chunk(2)
            y = y + share * swiglu(gate, up, w["experts.down_proj"][expert])
        return y


def random_head(config: dict, seed: int = 0) -> Weights:
    """Weights of a head for config.json's trunk, each of which matters; the published keys, experts fused."""
    hidden, width = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 2 * hidden),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        "norm.weight": (hidden,),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "layers.0.self_attn.q_proj.weight": (2 * q, hidden),
        "layers.0.self_attn.k_proj.weight": (kv, hidden),
        "layers.0.self_attn.v_proj.weight": (kv, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, q),
        "layers.0.self_attn.q_norm.weight": (width,),
        "layers.0.self_attn.k_norm.weight": (width,),
    }
    mlp, inner = "layers.0.mlp.", config.get("intermediate_size")
    if experts := config.get("num_experts"):
        routed, inner = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
        shapes |= {
            f"{mlp}gate.weight": (experts, hidden),
            f"{mlp}experts.gate_up_proj": (experts, 2 * routed, hidden),
            f"{mlp}experts.down_proj": (experts, hidden, routed),
            f"{mlp}shared_expert_gate.weight": (1, hidden),
        }
        mlp += "shared_expert."
    shapes |= {f"{mlp}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes[f"{mlp}down_proj.weight"] = (hidden, inner)
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return 0.3 * noise if len(shape) == 1 else noise * (3.0 if "mlp.gate." in name else 0.7) * shape[-1] ** -0.5

    return {f"mtp.{name}": drawn(name, shape) for name, shape in shapes.items()}


def split_experts(weights: Weights) -> Weights:
    """The same with each expert's three matrices as tensors of their own."""
    out = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for name in weights.keys() - out.keys():
        base = name.rsplit(".", 1)[0]
        for expert, matrix in enumerate(weights[name]):
            named = zip(("gate", "up"), matrix.chunk(2), strict=True) if "gate_up" in name else (("down", matrix),)
            out |= {f"{base}.{expert}.{part}_proj.weight": tensor for part, tensor in named}
    return out


def write_checkpoint(directory: Path, shape: Shape, tokens: int, experts_fused: bool = True, **overrides) -> "Case":
    """A random checkpoint with a random head, the first of a fixed series without a near-tie: the trunk as
    `transformers` writes it. overrides: of its configuration."""
    trunk, ids, logits = oracle_without_ties(shape, tokens, **overrides)
    trunk.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    stored = load_file(directory / "model.safetensors")
    with torch.no_grad():
        hidden = trunk.model(ids[None], use_cache=False).last_hidden_state[0]
    for seed in range(20):
        head = random_head(config, seed)
        case = Case(directory, ids, logits, hidden, MtpOracle(stored | head, config))
        if case.head.gap > 2e-5:
            break
    else:
        raise AssertionError("twenty near-ties in a row: the router of the random heads is too narrow")
    written = stored | (head if experts_fused else split_experts(head))
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, directory / "model.safetensors")
    return case


class Case:
    """A checkpoint, a prompt, and what the oracles make of it: ids [T]; logits [T, V] and hidden [T, H] of the trunk;
    mtp_logits, mtp_hidden of the head at each position but the last, whose next token is not known; head: the oracle
    that has seen these positions."""

    def __init__(self, directory: Path, ids: Tensor, logits: Tensor, hidden: Tensor, head: MtpOracle):
        self.directory, self.ids, self.logits, self.hidden, self.head = directory, ids, logits, hidden, head
        self.mtp_logits, self.mtp_hidden = head.run(ids[1:], hidden[:-1])
