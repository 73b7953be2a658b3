"""Which device, dtype and thread count a run uses."""

import platform

import torch

from ..errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """A torch device by name; "auto" is the GPU where there is one. Raises ConfigError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown; it must be auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there; torch finds {torch.cuda.device_count()} CUDA devices.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype for weights by name; "auto" is bf16 on a GPU, fp32 on a CPU. Raises ConfigError for another one."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; it must be auto, {' or '.join(_DTYPES)}.")
    return _DTYPES[name]


def pick_kv_dtype(name: str) -> torch.dtype | None:
    """A dtype for KV pages by name: e4m3 for "fp8", None, the model's own, for "auto"."""
    return torch.float8_e4m3fn if name == "fp8" else None


def device_name(device: torch.device) -> str:
    """What a report calls it: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def use_threads(count: int) -> None:
    """Let torch use this many CPU threads in this process. Raises ConfigError for fewer than one."""
    if count < 1:
        raise ConfigError(f"threads is {count}; at least 1 is needed.")
    torch.set_num_threads(count)
