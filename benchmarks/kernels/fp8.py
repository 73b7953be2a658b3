"""Activations rounded to e4m3 by groups, and their product with an e4m3 weight: a prefill's `linear`."""

from collections.abc import Iterator

import torch

from tokenspeed.ops.fp8 import blocks, quantise_blocks

from ..cases import Case, Inputs, Sizes, operator_case

SHAPES = ((4096, 4096), (5120, 17408))  # outputs x inputs


def cases(sizes: Sizes) -> Iterator[Case]:
    """The product in bf16 is cuBLAS's where it takes the sizes; in fp32 it is the kernel's. Ceiling: bf16 products."""
    on_gpu = len(sizes.decode) > 1
    rows = sizes.prefill
    for outputs, inputs in SHAPES if on_gpu else ((256, 512),):
        scales = rows * blocks(inputs) * 4

        def activations(draw: Inputs, rows=rows, inputs=inputs) -> tuple:
            return (draw.randn(rows, inputs),)

        yield operator_case("quantise_groups", f"{rows} x {inputs}", rows * inputs * 3 + scales, activations)
        for out_dtype in (torch.bfloat16, torch.float32):

            def product(draw: Inputs, rows=rows, outputs=outputs, inputs=inputs, out_dtype=out_dtype) -> tuple:
                x, x_scale = torch.ops.tokenspeed.quantise_groups(draw.randn(rows, inputs))
                return x, x_scale, *quantise_blocks(draw.randn(outputs, inputs)), out_dtype

            size = (rows + outputs) * inputs + scales + 4 * blocks(outputs) * blocks(inputs)
            yield operator_case(
                "linear_fp8",
                f"{rows} x {inputs} -> {outputs}, {str(out_dtype).removeprefix('torch.')}",
                size + rows * outputs * out_dtype.itemsize,
                product,
                flops=2 * rows * outputs * inputs,
                ceiling="matmul",
            )
