"""Muon for the matrices inside the layers, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import nn

# Matrices that are too thin, or whose rows are not directions of one space: AdamW serves them better.
ADAMW_MATRICES = ("embed_tokens", "lm_head", "conv1d", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b")


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024), scaled to the size of an AdamW step.

    Parameters have two or more dimensions; leading ones are independent matrices.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters in place; matrices of one shape go through the iteration together."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                update = update.reshape(-1, *update.shape[-2:])
                tall = update.shape[-2] > update.shape[-1]
                update = update.mT if tall else update
                by_shape[update.shape[-2:]].append((parameter, update, tall))
            for shape, members in by_shape.items():
                updates = orthogonalise(torch.cat([update for _, update, _ in members]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                sizes = [len(update) for _, update, _ in members]
                for (parameter, _, tall), update in zip(members, updates.split(sizes), strict=True):
                    update = (update.mT if tall else update).reshape(parameter.shape)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Moves the singular values of x [n, rows, columns], rows <= columns, near 1: five Newton-Schulz steps.

    The quintic's coefficients are Muon's: steep at 0, so that small singular values grow fast.
    """
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def build_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Both optimizers, every parameter in exactly one of them."""
    muon, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "conv1d" in name:
            vectors.append(parameter)
        elif any(part in name for part in ADAMW_MATRICES):
            matrices.append(parameter)
        else:
            muon.append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [Muon(muon, lr), torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-9)]
