"""config.json: what is read, and what is refused with the key and the value."""

import copy
import json

import pytest
from transformers import Qwen3_5TextConfig

from tokenspeed.engine.checkpoint import SHIPPED, resolve
from tokenspeed.engine.config import FULL, LINEAR, EngineConfig, ModelConfig
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


YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 5e6}, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e6}, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 5e6}, "rope_scaling": YARN, "rope_theta": 3e6},
        {"rope_parameters": YARN, "rope_theta": 3e6, "partial_rotary_factor": 0.5},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 512}, "rope_theta": 3e6},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 2e6}, "rope_parameters": YARN},
        {"rope_theta": 3e6},
        {},
    ],
)
def test_rope_is_read_as_transformers_reads_it(fields):
    """rope_scaling beside rope_parameters takes its place."""
    theirs = Qwen3_5TextConfig(**copy.deepcopy(fields), max_position_embeddings=2048).rope_parameters
    silent = {k: v for k, v in GOOD.items() if not k.startswith("rope") and k != "partial_rotary_factor"}
    ours = ModelConfig.from_dict(silent | fields | {"max_position_embeddings": 2048, "head_dim": 64})
    assert (ours.rope.theta, ours.rope.dims) == (theirs["rope_theta"], int(64 * theirs["partial_rotary_factor"]))
    assert (ours.rope.yarn is not None) == (theirs["rope_type"] == "yarn")
    if yarn := ours.rope.yarn:
        wanted = theirs["factor"], theirs["original_max_position_embeddings"]
        assert (yarn.factor, yarn.original_max_position) == wanted
        assert ours.max_context == max(2048, int(wanted[0] * wanted[1]))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "qwen3_5"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": "128"}, ["hidden_size", "'128'"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"output_gate_type": "sigmoid"}, ["output_gate_type", "'sigmoid'", "'silu'", "'swish'"]),
        ({"layer_types": [LINEAR]}, ["layer_types", "1 entries"]),
        ({"layer_types": ["sliding_attention"] * 8}, ["layer_types", "'sliding_attention'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads", "3"]),
        ({"linear_num_key_heads": 3}, ["linear_num_value_heads", "linear_num_key_heads", "3"]),
        ({"num_experts_per_tok": 99}, ["num_experts_per_tok", "99"]),
        ({"eos_token_id": "x"}, ["eos_token_id", "'x'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type", "'longrope'"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.3}}, ["partial_rotary_factor", "0.3"]),
        ({"text_config": [1]}, ["text configuration", "list"]),
    ],
)
def test_unusable_values_are_named(change, expected):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(GOOD | change)
    for word in expected:
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


def test_the_output_gate_is_silu_by_either_name_or_none():
    for gate in ("silu", "swish", None):
        assert ModelConfig.from_dict(GOOD | {"output_gate_type": gate}) == ModelConfig.from_dict(GOOD)


FP4 = {"num_bits": 4, "type": "float", "group_size": 16}


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "MXFP4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": None}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}, "NVFP4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors float-quantized"),
        ({"quant_method": "gguf"}, "GGUF"),
        ({"bits": 4, "group_size": 64, "mode": "affine"}, "MLX"),
        ({"quant_method": "exl3"}, "exl3"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "composite"])
def test_other_quantisations_are_refused_by_name_with_what_would_work(quantization, name, nested):
    raw = {"model_type": "qwen3_5_moe", "text_config": GOOD} if nested else GOOD
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(raw | {"quantization_config": quantization})
    for word in (f"{name} checkpoints are not supported", "bf16 checkpoint", "--quantization fp8", "FP8 release"):
        assert word in str(error.value)


def test_a_quantisation_by_mlx_gguf_or_modelopt_is_seen_where_they_leave_it(tmp_path):
    with pytest.raises(ConfigError, match="MLX"):
        ModelConfig.from_dict(GOOD | {"quantization": {"bits": 4, "group_size": 64}})
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"GGUF.*\.gguf files.*--quantization fp8"):
        ModelConfig.from_directory(tmp_path)
    with pytest.raises(ConfigError, match=r"GGUF.*model-Q4_K_M\.gguf"):
        resolve(tmp_path / "model-Q4_K_M.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_dict(GOOD)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(ConfigError, match=r"NVFP4.*hf_quant_config"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("setting", [{"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_unknown_formats_of_weights_and_pages_are_named(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} is '{next(iter(setting.values()))}'.*'fp8'"):
        EngineConfig(**setting)


def test_an_unknown_form_of_sums_is_named():
    with pytest.raises(ConfigError, match=r"prefill_sums is 'fast'.*'all-reduce' or 'in-parts'"):
        EngineConfig(prefill_sums="fast")
