"""The published sizes, by name: enough to size memory or build an empty model without a checkpoint."""

from .config import FULL, LINEAR, DenseConfig, ModelConfig, MoeConfig, RopeConfig
from .errors import ConfigError


def _size(layers: int, hidden: int, ffn: DenseConfig | MoeConfig, value_heads: int, heads: str, tied: bool = False):
    q_heads, kv_heads = (int(part) for part in heads.split("/"))
    return ModelConfig(
        hidden=hidden,
        vocab=248320,
        layer_types=tuple(FULL if (i + 1) % 4 == 0 else LINEAR for i in range(layers)),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=256,
        key_heads=16,
        value_heads=value_heads,
        key_dim=128,
        value_dim=128,
        conv_taps=4,
        ffn=ffn,
        rope=RopeConfig(theta=10_000_000.0, dims=64, yarn=None),
        eps=1e-6,
        tied=tied,
        max_context=262_144,
        eos_ids=(248_044,),
        mtp_layers=1,
    )


PUBLISHED: dict[str, ModelConfig] = {
    "0.8B": _size(24, 1024, DenseConfig(3584), 16, "8/2", tied=True),
    "2B": _size(24, 2048, DenseConfig(6144), 16, "8/2", tied=True),
    "4B": _size(32, 2560, DenseConfig(9216), 32, "16/4", tied=True),
    "9B": _size(32, 4096, DenseConfig(12288), 32, "16/4"),
    "27B": _size(64, 5120, DenseConfig(17408), 48, "24/4"),
    "35B-A3B": _size(40, 2048, MoeConfig(256, 8, 512, 512), 32, "16/2"),
    "122B-A10B": _size(48, 3072, MoeConfig(256, 8, 1024, 1024), 64, "32/2"),
    "397B-A17B": _size(60, 4096, MoeConfig(512, 10, 1024, 1024), 64, "32/2"),
}

# Later releases of the same shapes.
RELEASES = {"Qwen3.6-27B": "27B", "Qwen3.6-35B-A3B": "35B-A3B", "Qwen3.8-27B": "27B"}


def published(name: str) -> ModelConfig:
    """The architecture of a published size or release. Raises ConfigError for another name."""
    size = RELEASES.get(name, name)
    if size not in PUBLISHED:
        known = ", ".join([*PUBLISHED, *RELEASES])
        raise ConfigError(f"size {name!r} is not published; it must be one of {known}.")
    return PUBLISHED[size]
