"""The two elementwise sums of the feed-forward block."""

from collections.abc import Iterator

from torch import Tensor

from ..cases import Case, Inputs, Sizes, operator_case, optional_peer

_fla_swiglu = optional_peer("fla.modules.activations", "swiglu")
_flashinfer_silu_mul = optional_peer("flashinfer.activation", "silu_and_mul")


def _fla(x: Tensor) -> Tensor:
    return _fla_swiglu(*x.chunk(2, dim=-1))


def _flashinfer(x: Tensor) -> Tensor:
    return _flashinfer_silu_mul(x)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Dense intermediate sizes and one expert width; the shared expert's sum at the hidden size of 35B."""
    for width in (512, 3584, 17408):
        for rows in sorted({sizes.decode[0], sizes.decode[-1], sizes.prefill}):

            def halves(draw: Inputs, rows=rows, width=width) -> tuple:
                return (draw.randn(rows, 2 * width),)

            peers = {
                "flash-linear-attention": _fla if _fla_swiglu else None,
                "FlashInfer": _flashinfer if _flashinfer_silu_mul else None,
            }
            compiled = rows == sizes.prefill and width == 17408
            yield operator_case(
                "silu_mul", f"{rows} x {width}", 6 * rows * width, halves, peers=peers, compiled=compiled
            )
    for rows in sorted({sizes.decode[0], sizes.decode[-1], sizes.prefill}):
        for width in (2048,):

            def shared_expert(draw: Inputs, rows=rows, width=width) -> tuple:
                return draw.randn(rows, width), draw.randn(rows, width), draw.randn(rows, 1)

            compiled = rows == sizes.prefill and width == 2048
            yield operator_case(
                "add_sigmoid_gated", f"{rows} x {width}", 6 * rows * width, shared_expert, compiled=compiled
            )
