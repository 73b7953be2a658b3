"""config.json: what is read, and what is refused with the key and the value."""

import json

import pytest

from tokenspeed.engine.checkpoint import SHIPPED
from tokenspeed.engine.config import FULL, LINEAR, ModelConfig
from tokenspeed.engine.errors import ConfigError

GOOD = json.loads((SHIPPED / "config.json").read_text())


def test_layer_types_follow_the_interval_where_the_file_is_silent():
    silent = {k: v for k, v in GOOD.items() if k != "layer_types"} | {"full_attention_interval": 4}
    assert ModelConfig.from_dict(silent).layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert ModelConfig.from_dict(silent | {"full_attention_interval": 2}).layer_types == (LINEAR, FULL) * 4


def test_yarn_lengthens_the_context():
    rope = GOOD["rope_parameters"] | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert ModelConfig.from_dict(GOOD | {"rope_parameters": rope}).max_context == 4 * 8192
    assert ModelConfig.from_dict(GOOD).max_context == 8192


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "qwen3_5"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "128"}, ["hidden_size", "'128'"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"layer_types": [LINEAR]}, ["layer_types", "1 entries"]),
        ({"layer_types": ["sliding_attention"] * 8}, ["layer_types", "'sliding_attention'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads", "3"]),
        ({"linear_num_key_heads": 3}, ["linear_num_value_heads", "linear_num_key_heads", "3"]),
        ({"num_experts_per_tok": 99}, ["num_experts_per_tok", "99"]),
        ({"eos_token_id": "x"}, ["eos_token_id", "'x'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["original_max_position_embeddings"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.3}}, ["partial_rotary_factor", "0.3"]),
        ({"text_config": [1]}, ["text configuration", "list"]),
    ],
)
def test_unusable_values_are_named(change, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(GOOD | change)
    for word in words:
        assert word in str(error.value)


def test_missing_and_half_written_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD)[:100])
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_a_lora_adapter_is_refused_plainly(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"LoRA.*not supported"):
        ModelConfig.from_directory(tmp_path)
