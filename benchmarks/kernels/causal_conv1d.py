"""The short convolution over prefills."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cases import Case, Inputs, Sizes, operator_case, optional_peer

TAPS = WINDOW = 4
_fla_conv = optional_peer("fla.modules.causal_conv1d", "causal_conv1d")
_dao_conv = optional_peer("causal_conv1d", "causal_conv1d_fn")


# The peers convolve alone: none of them reads or stores a window here.
def _fla(x: Tensor, weight: Tensor, window: Tensor, cu_seqlens: Tensor, *rest) -> Tensor:
    # It lists the chunks of a ragged batch on the host, which one sequence does not need.
    ragged = {"cu_seqlens": cu_seqlens.long()} if len(cu_seqlens) > 2 else {}
    return _fla_conv(x[None], weight, activation="silu", **ragged)[0]


def _dao(x: Tensor, weight: Tensor, *rest) -> Tensor:
    # One sequence: it takes channels first, and this layout is its fast one.
    return _dao_conv(x.T[None], weight, activation="silu")


def cases(sizes: Sizes) -> Iterator[Case]:
    """Channels of the published models for one long prefill; a ragged batch; a short one."""
    long = sizes.prefill
    shapes = [(channels, [long]) for channels in (6144, 8192, 12288)]
    shapes += [(8192, [long // 16 - 5, long // 16 + 5] * 8), (8192, [long // 64]), (8192, [1] * 16)]
    for channels, lengths in shapes:
        tokens, count = sum(lengths), len(lengths)

        def batch(draw: Inputs, channels=channels, lengths=lengths, tokens=tokens, count=count) -> tuple:
            slots = draw.integers(range(count))
            return (
                draw.randn(tokens, channels),
                draw.randn(channels, TAPS),
                draw.randn(count, WINDOW, channels),
                draw.integers([0, *torch.tensor(lengths).cumsum(0).tolist()]),
                draw.integers([100] * count),
                slots,
                slots,
                draw.integers([[0, 100 + lengths[0], -1]]),
            )

        peers = {
            "flash-linear-attention": _fla if _fla_conv else None,
            "causal-conv1d": _dao if _dao_conv and count == 1 else None,
        }
        size = 4 * tokens * channels + count * 2 * (TAPS - 1 + WINDOW) * channels
        shape = f"{count} x {tokens // count} x {channels}"
        yield operator_case("causal_conv1d", shape, size, batch, peers=peers)
