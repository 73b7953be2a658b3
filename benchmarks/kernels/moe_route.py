"""Routing of the mixture of experts."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case, Inputs, Sizes, operator_case


def _top_k_only(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax, top-k and weights by three library calls, without the grouping."""
    weights, experts = torch.topk(logits.float().softmax(-1), top_k)
    return weights / weights.sum(-1, keepdim=True), experts


def cases(sizes: Sizes) -> Iterator[Case]:
    """The two published routers."""
    for experts, top_k in ((256, 8), (512, 10)):
        for tokens in (*sizes.decode, 2 * sizes.decode[-1], sizes.prefill):

            def router(draw: Inputs, tokens=tokens, experts=experts, top_k=top_k) -> tuple:
                return draw.randn(tokens, experts), top_k

            size = 2 * tokens * experts + tokens * top_k * (2 + 4 + 4) + 4 * (experts + 1)
            peers = {"torch, top-k alone": _top_k_only}
            yield operator_case("moe_route", f"{tokens} x {experts}, top {top_k}", size, router, peers=peers)
