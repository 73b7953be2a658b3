"""Small building blocks of the network."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A linear map without bias; weights start normal with deviation gain / sqrt(inputs)."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * weight * silu(z)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(z)
