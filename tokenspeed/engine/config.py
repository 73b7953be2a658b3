"""The architecture of a checkpoint, read from its config.json, and the settings of an engine: values, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .files import read_json_object, read_optional_json_object
from .quantization import StoredFp8, refusal, stored_quantization

LINEAR, FULL = "linear_attention", "full_attention"
_MODEL_TYPES = {"qwen3_5": "dense", "qwen3_5_text": "dense", "qwen3_5_moe": "moe", "qwen3_5_moe_text": "moe"}
PAGE_TOKENS = 64
MAX_DRAFTS = 7
# (sequences that decode, drafts behind each): verifying more costs more. Measured on an H200, docs/performance.md.
AUTO_DRAFTS_ON_GPU = ((64, 3),)
AUTO_DRAFTS_ON_CPU = ((4, 3), (16, 2), (32, 1))


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN context extension (Peng et al. 2023), static: the angles do not depend on a request's length."""

    factor: float
    original_max_position: int
    attention_factor: float | None
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """theta: base of the angles; dims: rotated leading dimensions of each head; yarn: None for plain rope."""

    theta: float
    dims: int
    yarn: YarnScaling | None


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """intermediate: width of the SwiGLU."""

    intermediate: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """experts: how many; top_k: chosen per token; intermediate, shared_intermediate: width of one, of the shared."""

    experts: int
    top_k: int
    intermediate: int
    shared_intermediate: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One Qwen3.5 text model. Sizes are in elements, contexts in tokens.

    stored: how the checkpoint is quantised, None where it is not. fp8: the products of a layer, by their names below
    `layers.{i}.`, whose weights are held in FP8; those of one name are in all layers alike.
    """

    hidden: int
    vocab: int
    layer_types: tuple[str, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_taps: int
    ffn: DenseConfig | MoeConfig
    rope: RopeConfig
    eps: float
    tied: bool
    max_context: int
    eos_ids: tuple[int, ...]
    mtp_layers: int = 0  # decoder layers of the MTP head: 1 where there is one
    stored: StoredFp8 | None = None
    fp8: frozenset[str] = frozenset()

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def full_layers(self) -> int:
        return self.layer_types.count(FULL)

    @property
    def kv_layers(self) -> int:
        """Layers with keys and values in the pages: the attention layers, and behind them the MTP head's."""
        return self.full_layers + self.mtp_layers

    @property
    def linear_layers(self) -> int:
        return self.layer_types.count(LINEAR)

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Read DIRECTORY/config.json. Raises ConfigError for a missing, malformed or unsupported one."""
        if (directory / "adapter_config.json").exists():
            raise ConfigError(f"{directory} holds a LoRA adapter; adapters are not supported: merge it into its base.")
        if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
            raise refusal("GGUF", f"{directory} holds .gguf files and no .safetensors")
        other = read_optional_json_object(directory / "hf_quant_config.json").get("quantization")
        if isinstance(other, dict) and other.get("quant_algo"):
            raise refusal(f"ModelOpt {other['quant_algo']}", f"{directory / 'hf_quant_config.json'} names it")
        return cls.from_dict(read_json_object(directory / "config.json"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Raises ConfigError naming the key and its value where the model is not one this engine runs."""
        model_type = raw.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ConfigError(f"model_type {model_type!r} is not supported; it must be one of {sorted(_MODEL_TYPES)}.")
        kind = _MODEL_TYPES[model_type]
        text = raw.get("text_config", raw)
        fields = _Fields(text)
        if fields.get("hidden_act", str, "silu") != "silu":
            raise ConfigError(f"hidden_act {text['hidden_act']!r} is not supported; Qwen3.5 uses 'silu'.")
        gate = fields.get("output_gate_type", str, "silu")
        if gate not in ("silu", "swish"):
            raise ConfigError(
                f"output_gate_type {gate!r} is not supported; it must be 'silu' or 'swish', its other name."
            )
        if fields.get("attention_bias", bool, False):
            raise ConfigError("attention_bias true is not supported; Qwen3.5 has no biases.")
        head_dim = fields.get("head_dim", int, 256)
        rope = _rope(fields, head_dim)
        longest = fields.get("max_position_embeddings", int, 32768)
        if rope.yarn:
            longest = max(longest, int(rope.yarn.factor * rope.yarn.original_max_position))
        config = cls(
            hidden=fields.get("hidden_size", int),
            vocab=fields.get("vocab_size", int),
            layer_types=_layer_types(fields),
            q_heads=fields.get("num_attention_heads", int),
            kv_heads=fields.get("num_key_value_heads", int),
            head_dim=head_dim,
            key_heads=fields.get("linear_num_key_heads", int, 16),
            value_heads=fields.get("linear_num_value_heads", int, 32),
            key_dim=fields.get("linear_key_head_dim", int, 128),
            value_dim=fields.get("linear_value_head_dim", int, 128),
            conv_taps=fields.get("linear_conv_kernel_dim", int, 4),
            ffn=_ffn(fields, kind),
            rope=rope,
            eps=fields.get("rms_norm_eps", float, 1e-6),
            tied=fields.get("tie_word_embeddings", bool, raw.get("tie_word_embeddings", False)),
            max_context=longest,
            eos_ids=_ids(text.get("eos_token_id", raw.get("eos_token_id"))),
            mtp_layers=_mtp_layers(text.get("mtp_num_hidden_layers")),
            stored=stored_quantization(raw),
        )
        if config.q_heads % config.kv_heads:
            raise ConfigError(
                f"num_attention_heads {config.q_heads} is not a multiple of num_key_value_heads {config.kv_heads}."
            )
        if config.value_heads % config.key_heads:
            raise ConfigError(
                f"linear_num_value_heads {config.value_heads} is not a multiple of "
                f"linear_num_key_heads {config.key_heads}."
            )
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs. Sizes are in tokens, sequences, pages of 64 tokens, and state slots.

    dtype: "bfloat16", "float32", or "auto" (bf16 on a GPU, fp32 on a CPU); quantization: which weights are held in FP8,
    "auto" for those that the checkpoint has so, "fp8" for all that can be, quantised while loading, "none" for none,
    dequantised while loading; load_format: "auto" reads the checkpoint's weights, "dummy" makes random ones on the
    device, for measurements: config.json and the tokenizer's files are enough; kv_cache_dtype: of the KV pages, "auto"
    for dtype or "fp8"; device: a torch device, or "auto"; threads: CPU threads torch may use in this process, None for
    torch's choice, or 1 where the model is too small to share.
    max_model_len: of one sequence, None for the model's context; max_num_seqs: at once; max_num_batched_tokens: of one
    Step.
    gpu_memory_utilization: how much of the device's whole memory this engine takes, weights included; None for what is
    free on a GPU but for a tenth of it, and on a CPU for half of what is free. kv_pages, state_slots: by number.
    host_memory: GiB of this machine's memory in which the prefix cache keeps what the device has no room for, over all
    ranks. enable_prefix_caching: share what prompts have in common;
    cache_policy: what is kept when memory is scarce, "value" or "lru"; snapshot_grid: distance of optional snapshots in
    long prompts, 0 for none. seed: of requests that bring none. validate: check every Step and the cache, for tests.
    draft_tokens: ids that are drafted behind each and verified together, by the MTP head or, in a checkpoint without
    one, looked up in the sequence itself: 0 for none, "auto" for what pays at the number of decoding sequences with a
    head, else none. On a GPU "auto" drafts only where that is worth it: at start it is timed what steps with drafts
    cost, and each request's drafts are counted from its own beginning on. A step drafts where its requests' drafts
    bring nearly as many ids (95%) as they cost steps without; where they do not, drafts are tried again now and then,
    for at most 2.5% of the time. So text of which little can be foreseen takes, by simulation, about 5% longer than
    without drafts at most, and a request alone has the same steps whatever was said before it. `--draft-tokens N`
    drafts N in every step. draft_vocabulary: the MTP head chooses among this many ids, the lowest, which a tokenizer's
    merges make the most frequent; None for all.
    tensor_parallel_size, expert_parallel_size: ranks the dense weights and the experts are split over; prefill_sums: of
    many tokens over ranks, "all-reduce", "in-parts" (reduce-scatter, the norm of a part, all-gather), or "auto" for
    what is measured to be faster at start on GPUs, else all-reduce: results of the two differ by rounding; rendezvous:
    where the ranks meet, as torch.distributed takes it, None where this process is to start the others on this machine.
    """

    dtype: str = "auto"
    quantization: str = "auto"
    load_format: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float | None = None
    kv_pages: int | None = None
    state_slots: int | None = None
    host_memory: float = 0.0
    enable_prefix_caching: bool = True
    cache_policy: str = "value"
    snapshot_grid: int = 8192
    seed: int = 0
    validate: bool = False
    draft_tokens: int | str = "auto"
    draft_vocabulary: int | None = None
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    prefill_sums: str = "auto"
    rendezvous: str | None = None

    def draft_depths(self, mtp: bool, on_gpu: bool) -> tuple[tuple[int, int], ...]:
        """Drafts by the number of decoding sequences, as `Limits.drafts` takes them. mtp: whether there is a head."""
        if self.draft_tokens == "auto":
            return (AUTO_DRAFTS_ON_GPU if on_gpu else AUTO_DRAFTS_ON_CPU) if mtp else ()
        return ((self.max_num_seqs, self.draft_tokens),) if self.draft_tokens else ()

    def __post_init__(self):
        def positive(value: int | None) -> bool:
            return value is None or (isinstance(value, int) and value >= 1)

        fraction = self.gpu_memory_utilization
        checks = (
            ("quantization", self.quantization in ("auto", "fp8", "none"), "'auto', 'fp8' or 'none'"),
            ("load_format", self.load_format in ("auto", "dummy"), "'auto' or 'dummy'"),
            ("kv_cache_dtype", self.kv_cache_dtype in ("auto", "fp8"), "'auto' or 'fp8'"),
            ("max_model_len", positive(self.max_model_len), "at least 1, or None for the model's context"),
            ("max_num_seqs", positive(self.max_num_seqs), "at least 1"),
            (
                "max_num_batched_tokens",
                self.max_num_batched_tokens >= max(64, self.max_num_seqs),
                "at least 64 and max_num_seqs",
            ),
            ("gpu_memory_utilization", fraction is None or 0 < fraction <= 1, "in (0, 1]"),
            ("kv_pages", positive(self.kv_pages), "at least 1"),
            ("state_slots", positive(self.state_slots), "at least 1"),
            ("host_memory", 0 <= self.host_memory < float("inf"), "at least 0 GiB"),
            ("host_memory", self.enable_prefix_caching or not self.host_memory, "0 where the prefix cache is off"),
            ("cache_policy", self.cache_policy in ("value", "lru"), "'value' or 'lru'"),
            ("snapshot_grid", self.snapshot_grid >= 0, "at least 0 (0 is off)"),
            ("seed", self.seed >= 0, "at least 0"),
            (
                "prefill_sums",
                self.prefill_sums in ("auto", "all-reduce", "in-parts"),
                "'auto', 'all-reduce' or 'in-parts'",
            ),
            (
                "draft_tokens",
                self.draft_tokens == "auto" or self.draft_tokens in range(MAX_DRAFTS + 1),
                f"'auto' or 0 to {MAX_DRAFTS}",
            ),
            ("draft_vocabulary", positive(self.draft_vocabulary), "at least 1, or None for every id"),
            (
                "draft_vocabulary",
                self.draft_vocabulary is None or self.tensor_parallel_size == self.expert_parallel_size == 1,
                "None where a head is split over ranks (tensor_parallel_size is "
                f"{self.tensor_parallel_size}, expert_parallel_size is {self.expert_parallel_size})",
            ),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")


class _Fields:
    """Typed access to a JSON object: a missing or mistyped key is a ConfigError that names it."""

    def __init__(self, raw: Any):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"the text configuration must be a JSON object, not {type(raw).__name__}.")
        self.raw = raw

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json has no {key!r}; a {kind.__name__} is needed.")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"config.json has {key!r}: {value!r}; a {kind.__name__} is needed.")
        if kind in (int, float) and value <= 0:
            raise ConfigError(f"config.json has {key!r}: {value!r}; it must be positive.")
        return value

    def optional(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.get(key, float)


def _layer_types(fields: _Fields) -> tuple[str, ...]:
    count = fields.get("num_hidden_layers", int)
    named = fields.raw.get("layer_types")
    if named is None:
        interval = fields.get("full_attention_interval", int, 4)
        return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(count))
    unknown = [name for name in named if name not in (LINEAR, FULL)]
    if unknown or len(named) != count:
        raise ConfigError(
            f"layer_types has {len(named)} entries{f' and unknown {unknown[0]!r}' if unknown else ''}; "
            f"it needs {count}, each {LINEAR!r} or {FULL!r}."
        )
    return tuple(named)


def _ffn(fields: _Fields, kind: str) -> DenseConfig | MoeConfig:
    if kind == "dense":
        return DenseConfig(fields.get("intermediate_size", int))
    moe = MoeConfig(
        experts=fields.get("num_experts", int, 256),
        top_k=fields.get("num_experts_per_tok", int, 8),
        intermediate=fields.get("moe_intermediate_size", int, 512),
        shared_intermediate=fields.get("shared_expert_intermediate_size", int, 512),
    )
    if moe.top_k > moe.experts:
        raise ConfigError(f"num_experts_per_tok {moe.top_k} is more than num_experts {moe.experts}.")
    return moe


def _rope(fields: _Fields, head_dim: int) -> RopeConfig:
    # As transformers reads it: rope_scaling, where it says anything, replaces rope_parameters, its rope_theta included.
    raw = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or {}
    rope = _Fields({"rope_theta": fields.raw.get("rope_theta"), **raw})
    # Partial rotation is a property of the family: a file that does not name it means a quarter of each head.
    fraction = rope.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 0.25))
    theta, dims = rope.get("rope_theta", float, 10_000.0), int(head_dim * fraction)
    if dims % 2 or dims > head_dim:
        raise ConfigError(
            f"partial_rotary_factor {fraction} of head_dim {head_dim} rotates {dims} dimensions, not pairs."
        )
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta, dims, None)
    if kind != "yarn":
        raise ConfigError(f"rope_type {kind!r} is not supported; it must be 'default' or 'yarn'.")
    longest = fields.get("max_position_embeddings", int, 32768)
    original = rope.get("original_max_position_embeddings", int, longest)
    yarn = YarnScaling(
        factor=rope.get("factor", float, longest / original if original != longest else None),
        original_max_position=original,
        attention_factor=rope.optional("attention_factor"),
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        mscale=rope.optional("mscale"),
        mscale_all_dim=rope.optional("mscale_all_dim"),
        truncate=rope.get("truncate", bool, True),
    )
    return RopeConfig(theta, dims, yarn)


def _mtp_layers(value: Any) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool) or value not in (0, 1):
        raise ConfigError(
            f"config.json has 'mtp_num_hidden_layers': {value!r}; an MTP head of one layer is supported, so it must be "
            "0 or 1."
        )
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id is {value!r}; it must be a token id or a list of them.")
    return tuple(ids)
