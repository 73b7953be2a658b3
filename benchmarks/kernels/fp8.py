"""A prefill's products with e4m3 weights: activations rounded to e4m3 by groups, their product, and the operators that
write the groups themselves."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed.ops.fp8 import blocks, quantise_blocks

from ..cases import Case, Inputs, Sizes, operator_case, torch_implementation

SHAPES = ((4096, 4096), (5120, 17408))  # outputs x inputs
# Of 35B-A3B: the first and last product of a Gated DeltaNet layer, and the shared expert; of 27B: gate and up, the last
# product of a layer, down. With what the operator before the product reads, and writes beside groups: bytes an input.
FUSED = (
    ("add_rms_norm_linear", 12288, 2048, 8),
    ("gated_rms_norm_linear", 2048, 4096, 4),
    ("add_gated_silu_mul_linear", 2048, 512, 4),
    ("add_rms_norm_linear", 34816, 5120, 8),
    ("gated_rms_norm_linear", 5120, 6144, 4),
    ("silu_mul_linear", 5120, 17408, 4),
)


def product_case(rows: int, outputs: int, inputs: int, out_dtype: torch.dtype) -> Case:
    def product(draw: Inputs) -> tuple:
        x, x_scale = torch.ops.tokenspeed.quantise_groups(draw.randn(rows, inputs))
        return x, x_scale, *quantise_blocks(draw.randn(outputs, inputs)), out_dtype

    size = (rows + outputs) * inputs + 4 * blocks(inputs) * (rows + blocks(outputs))
    return operator_case(
        "linear_fp8",
        f"{rows} x {inputs} -> {outputs}, {str(out_dtype).removeprefix('torch.')}",
        size + rows * outputs * out_dtype.itemsize,
        product,
        flops=2 * rows * outputs * inputs,
        ceiling="matmul",
    )


def fused_case(rows: int, kernel: str, outputs: int, inputs: int, moved: int) -> Case:
    """Its peer is the same in three launches: the operator in bf16, `quantise_groups`, and the product. The rows of
    `linear_fp8` at the same sizes are the product alone."""

    def arguments(draw: Inputs) -> tuple:
        def weight() -> tuple[Tensor, Tensor]:
            return quantise_blocks(draw.randn(outputs, inputs))

        if kernel == "add_rms_norm_linear":
            return draw.randn(rows, inputs), draw.randn(rows, inputs), draw.randn(inputs), 1e-6, *weight()
        if kernel == "gated_rms_norm_linear":
            heads = (rows, inputs // 128, 128)
            return draw.randn(*heads), draw.randn(*heads), draw.randn(128), 1e-6, *weight()
        x = draw.randn(rows, 2 * inputs)
        if kernel == "silu_mul_linear":
            return x, *weight()
        values, scale = weight()
        return draw.randn(rows, outputs), x, values, draw.randn(rows, 1), scale

    groups = rows * (inputs + 4 * blocks(inputs))
    product = 2 * groups + outputs * inputs + rows * outputs * (8 if kernel == "add_gated_silu_mul_linear" else 2)
    return Case(
        kernel,
        f"{rows} x {inputs} -> {outputs} of e4m3",
        rows * inputs * moved + product,
        arguments,
        getattr(torch.ops.tokenspeed, kernel).default,
        flops=2 * rows * outputs * inputs,
        peers={"its operators apart": torch_implementation(kernel)},
        ceiling="matmul",
    )


def cases(sizes: Sizes) -> Iterator[Case]:
    """The product in bf16 is cuBLAS's where it takes the sizes; in fp32 it is the kernel's. Ceiling: bf16 products."""
    on_gpu = len(sizes.decode) > 1
    rows = sizes.prefill
    for outputs, inputs in SHAPES if on_gpu else ((256, 512),):

        def activations(draw: Inputs, inputs=inputs) -> tuple:
            return (draw.randn(rows, inputs),)

        size = rows * (3 * inputs + 4 * blocks(inputs))
        yield operator_case("quantise_groups", f"{rows} x {inputs}", size, activations)
        for out_dtype in (torch.bfloat16, torch.float32):
            yield product_case(rows, outputs, inputs, out_dtype)
    for kernel, outputs, inputs, moved in FUSED if on_gpu else FUSED[:3]:
        outputs, inputs = (outputs, inputs) if on_gpu else (256, 256)
        if on_gpu and (outputs, inputs) not in SHAPES:
            yield product_case(rows, outputs, inputs, torch.bfloat16)
        yield fused_case(rows, kernel, outputs, inputs, moved)
