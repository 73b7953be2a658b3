"""The three RMS norms."""

from collections.abc import Iterator

from torch import Tensor

from ..cases import Case, Inputs, Sizes, operator_case, optional_peer

EPS = 1e-6
_fla_rms_norm = optional_peer("fla.modules.norm.layernorm", "rms_norm")
_fla_gated_norm = optional_peer("fla.modules.norm.fused_norm_gate", "rms_norm_gated")
_flashinfer_norm = optional_peer("flashinfer.norm", "gemma_rmsnorm")
_flashinfer_add_norm = optional_peer("flashinfer.norm", "gemma_fused_add_rmsnorm")


# Peers move the same bytes; their weight is plain where ours is zero-centred.
def _fla(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _fla_rms_norm(x, weight, None, eps=eps)


def _fla_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _fla_rms_norm(x, weight, None, residual=residual, prenorm=True, eps=eps)


def _fla_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _fla_gated_norm(x, gate, weight, None, eps=eps)


def _flashinfer(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _flashinfer_norm(x, weight, eps)


def _flashinfer_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _flashinfer_add_norm(x, residual, weight, eps)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Hidden sizes of the models for the two norms of the residual stream, value heads for the gated one."""
    for width in (1024, 2048, 5120):
        for rows in sorted({sizes.decode[0], sizes.decode[-1], sizes.prefill}):
            elements, compiled = rows * width, rows == sizes.prefill and width == 5120

            def plain(draw: Inputs, rows=rows, width=width) -> tuple:
                return draw.randn(rows, width), draw.randn(width), EPS

            def added(draw: Inputs, rows=rows, width=width) -> tuple:
                return draw.randn(rows, width), draw.randn(rows, width), draw.randn(width), EPS

            shape = f"{rows} x {width}"
            peers = {
                "flash-linear-attention": _fla if _fla_rms_norm else None,
                "FlashInfer": _flashinfer if _flashinfer_norm else None,
            }
            yield operator_case("rms_norm", shape, 4 * elements, plain, peers=peers, compiled=compiled)
            peers = {
                "flash-linear-attention": _fla_add if _fla_rms_norm else None,
                "FlashInfer": _flashinfer_add if _flashinfer_add_norm else None,
            }
            yield operator_case("add_rms_norm", shape, 8 * elements, added, peers=peers, compiled=compiled)
    for heads in (16, 32, 64):
        tokens = sizes.prefill

        def gated(draw: Inputs, tokens=tokens, heads=heads) -> tuple:
            return draw.randn(tokens, heads, 128), draw.randn(tokens, heads, 128), draw.randn(128), EPS

        peers = {"flash-linear-attention": _fla_gated if _fla_gated_norm else None}
        size, compiled = 6 * tokens * heads * 128, heads == 32
        shape = f"{tokens} x {heads} heads"
        yield operator_case("gated_rms_norm", shape, size, gated, peers=peers, compiled=compiled)
