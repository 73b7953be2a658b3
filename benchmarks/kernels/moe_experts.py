"""The expert product of the mixture of experts: weights stream once at decode, matrix products at prefill."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokenspeed.ops
from tokenspeed.ops.fp8 import quantise_blocks

from ..cases import Case, Inputs, Sizes, operator_case, optional_peer

# Model, experts, top-k, hidden size, expert width.
MODELS = (("35B", 256, 8, 2048, 512), ("122B", 256, 8, 3072, 1024), ("397B", 512, 10, 4096, 1024))
LEAST_CHOICES = 256  # of an expert in the largest prefill: about where the products bound it and not the weights
ON_CPU = (("tiny", 8, 2, 128, 128),)  # whole blocks of e4m3


class Weights:
    """One model's weights, shared by the input sets of a case, which differ in the experts they hit; freed with them:
    four sets of the largest model's weights would fill the card."""

    def __init__(self, experts: int, hidden: int, width: int, fp8: bool = False):
        """fp8: each weight is followed by its scales."""
        self.fp8 = fp8
        self.shapes = ((experts, 2 * width, hidden), (experts, hidden, width))
        self.living: list[weakref.ref] = []

    def draw(self, draw: Inputs) -> list[Tensor]:
        weights = [reference() for reference in self.living]
        if not weights or any(tensor is None for tensor in weights):
            weights = [draw.randn(*shape).mul_(shape[-1] ** -0.5) for shape in self.shapes]
            if self.fp8:
                weights = [part for weight in weights for part in quantise_blocks(weight)]
            self.living = [weakref.ref(tensor) for tensor in weights]
        return weights


def _vllm(fused: Callable | None) -> Callable | None:
    """Triton kernels, given the routing."""
    return fused and (
        lambda x, weights, experts, order, offsets, gate_up, down: fused(x, gate_up, down, weights.float(), experts)
    )


def _flashinfer(fused: Callable | None) -> Callable | None:
    """CUTLASS kernels, given the routing. They take the up half for the first, which changes the result only."""
    return fused and (
        lambda x, weights, experts, order, offsets, gate_up, down: fused(
            x, experts, weights.float(), gate_up, down, x.dtype, quant_scales=[]
        )
    )


def cases(sizes: Sizes) -> Iterator[Case]:
    """Tokens choose experts at random. Bytes and flops are those of the experts and choices that a set hits."""
    on_gpu = len(sizes.decode) > 1
    peers = {
        "vllm": _vllm(optional_peer("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts")),
        "flashinfer": _flashinfer(optional_peer("flashinfer.fused_moe", "cutlass_fused_moe")),
    }
    for model, experts, top_k, hidden, width in MODELS if on_gpu else ON_CPU:
        prefills = [sizes.prefill]
        while on_gpu and prefills[-1] * top_k < LEAST_CHOICES * experts:
            prefills.append(2 * prefills[-1])
        for fp8, numbers in ((False, (*sizes.decode, *prefills)), (True, prefills)):
            shared = Weights(experts, hidden, width, fp8)
            for tokens in numbers:
                # Each set takes the same choices with the experts renamed: other weights, but as many of them.
                generator = torch.Generator().manual_seed(tokens)
                logits = torch.randn(tokens, experts, generator=generator).bfloat16()
                hit = logits.topk(top_k).indices.unique().numel()

                def product(draw: Inputs, logits=logits, top_k=top_k, hidden=hidden, shared=shared) -> tuple:
                    renamed = logits[:, torch.randperm(logits.shape[1])].to(draw.device)
                    routed = tokenspeed.ops.moe_route(renamed, top_k)
                    held = shared.draw(draw)
                    weights = (*held[::2], 0, *held[1::2]) if shared.fp8 else held
                    return draw.randn(len(logits), hidden), *routed, *weights

                yield operator_case(
                    "moe_experts",
                    f"{model}, {tokens} tokens, {hit} experts" + ", e4m3" * fp8,
                    (1 if fp8 else 2) * 3 * hit * hidden * width + 4 * tokens * hidden,
                    product,
                    flops=6 * tokens * top_k * hidden * width,
                    peers={} if fp8 else peers,
                    ceiling="matmul" if tokens > 64 else "read",
                )
