"""Angles of the rotary embedding, plain and YaRN."""

import math

import torch
from torch import Tensor

from ..config import RopeConfig, YarnScaling


def rotary_frequencies(rope: RopeConfig, device: torch.device) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, [dims / 2] fp32, and the factor of cosines and sines.

    Plain: theta^(-2 j / dims) (Su et al. 2021). YaRN: a blend of these and of the same divided by `factor`, by how
    often a pair turns within the original context (Peng et al. 2023, with the attention factor 0.1 ln(factor) + 1).
    """
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32, device=device) / rope.dims
    frequencies = 1.0 / rope.theta**exponents
    if rope.yarn is None:
        return frequencies, 1.0
    yarn = rope.yarn
    low, high = _pair_of_turns(yarn.beta_fast, rope), _pair_of_turns(yarn.beta_slow, rope)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    pair = torch.arange(rope.dims // 2, dtype=torch.float32, device=device)
    stretched = ((pair - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn.factor * stretched + frequencies * (1 - stretched), _attention_factor(yarn)


def _pair_of_turns(turns: float, rope: RopeConfig) -> float:
    """The number of the pair that makes `turns` full turns within the original context."""
    context = rope.yarn.original_max_position
    return rope.dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _attention_factor(yarn: YarnScaling) -> float:
    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return temperature(yarn.mscale) / temperature(yarn.mscale_all_dim)
    return temperature(1.0)
