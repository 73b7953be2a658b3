"""The shape of the tiny agent, in the words of `Qwen3_5MoeTextConfig`."""

from dataclasses import asdict, dataclass

VOCAB_SIZE = 640
CONTEXT_LENGTH = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of the network; field names are those of the checkpoint's config.json."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 128
    num_hidden_layers: int = 8
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_conv_kernel_dim: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.25

    @property
    def layer_types(self) -> list[str]:
        """Mixer of each layer: the last of every `full_attention_interval` layers is full attention."""
        return [
            "linear_attention" if (i + 1) % self.full_attention_interval else "full_attention"
            for i in range(self.num_hidden_layers)
        ]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rope turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    def to_json(self, eos_token_id: int, pad_token_id: int) -> dict:
        """Content of config.json, complete enough that no default of a reader matters."""
        values = asdict(self)
        rope_theta, rotary = values.pop("rope_theta"), values.pop("partial_rotary_factor")
        frequencies = self.rotary_dim // 2
        height = width = 3 * frequencies // 8  # three position streams in the published proportion 11 : 11 : 10
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            **values,
            "layer_types": self.layer_types,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope_theta,
                "partial_rotary_factor": rotary,
                "mrope_section": [height, width, frequencies - height - width],
                "mrope_interleaved": True,
            },
            "max_position_embeddings": CONTEXT_LENGTH,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "mamba_ssm_dtype": "float32",
            "tie_word_embeddings": False,
            "use_cache": True,
            "initializer_range": 0.02,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
