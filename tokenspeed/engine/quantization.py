"""Which checkpoints are quantised, how, and which of their weights: what config.json says, as values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

BLOCK = 128
# The products of a layer, below `layers.{i}.`, whose weights the FP8 format holds; all experts' are one product.
PRODUCTS = frozenset(
    [f"self_attn.{name}_proj" for name in "qkvo"]
    + [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
    + [f"mlp.{part}{name}_proj" for part in ("", "shared_expert.", "experts.") for name in ("gate", "up", "down")]
)
_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "mlx": "MLX",
    "gguf": "GGUF",
}
_INSTEAD = (
    "use the model's bf16 checkpoint, which --quantization fp8 quantises while it is loaded, or its FP8 release "
    "(quant_method 'fp8' with blocks of 128 x 128)"
)
_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class StoredFp8:
    """A checkpoint in FP8. not_converted: the modules that its config.json says are not, in the file's own names."""

    not_converted: tuple[str, ...]

    def leaves_out(self, module: str) -> bool:
        """Whether the list has a module, the name of a tensor without `.weight`: itself, a module that it is in, or the
        end of its name. Names may differ in the prefix before `layers`, which says how the text model is wrapped."""
        module = _PREFIX.sub("", module)
        for listed in self.not_converted:
            listed = _PREFIX.sub("", listed)
            if module == listed or module.startswith(listed + ".") or module.endswith("." + listed):
                return True
        return False


def products_of(tensor: str) -> tuple[str, ...]:
    """The products, of PRODUCTS, that a checkpoint's tensor is the weight of; two for the experts' gate and up in one,
    none for most."""
    _, layers, below = tensor.partition("layers.")
    name = _EXPERT.sub(".experts.", below.partition(".")[2]).removesuffix(".weight")
    if not layers:
        return ()
    if name == "mlp.experts.gate_up_proj":
        return "mlp.experts.gate_proj", "mlp.experts.up_proj"
    return (name,) if name in PRODUCTS else ()


def stored_quantization(raw: Mapping[str, Any]) -> StoredFp8 | None:
    """How a checkpoint is quantised, by its config.json; None where it is not. Raises ConfigError, naming the method,
    for another one than FP8 in blocks of 128 x 128."""
    text = raw.get("text_config", raw)
    given = raw.get("quantization_config") or text.get("quantization_config") or raw.get("quantization")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"quantization_config must be a JSON object, not {type(given).__name__}.")
    method = given.get("quant_method")
    if method != "fp8":
        raise refusal(_method_name(given), f"quantization_config has quant_method {method!r}")
    wanted = {
        "fmt": (("e4m3", None), "'e4m3'"),
        "activation_scheme": (("dynamic", None), "'dynamic': scales of activations are made as they come"),
        "weight_block_size": (([BLOCK, BLOCK],), f"[{BLOCK}, {BLOCK}]"),
    }
    for key, (values, right) in wanted.items():
        if given.get(key) not in values:
            raise ConfigError(
                f"quantization_config has {key} {given.get(key)!r}; of FP8 checkpoints {right} is read: {_INSTEAD}."
            )
    names = given.get("modules_to_not_convert") or given.get("ignored_layers") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"quantization_config has modules_to_not_convert {names!r}; a list of names is needed.")
    return StoredFp8(tuple(names))


def refusal(method: str, where: str) -> ConfigError:
    """The error for a checkpoint in a format that is not read. where: what shows it."""
    return ConfigError(f"{method} checkpoints are not supported ({where}): {_INSTEAD}.")


def _method_name(given: Mapping[str, Any]) -> str:
    """The format's common name: several writers have formats of others under a name of their own."""
    if given.get("quant_method") is None and {"bits", "group_size"} <= set(given):
        return _METHODS["mlx"]
    said = [str(given[key]) for key in ("quant_method", "quant_algo", "format") if given.get(key)]
    known = [name for key, name in _METHODS.items() if key in " ".join(said).lower()]
    return known[-1] if known else " ".join(said) or "such"
