"""The dense product of a decode step, alone and with what comes before it: the weights stream once."""

from collections.abc import Iterator

import torch

from tokenspeed import ops
from tokenspeed.ops.fp8 import quantise_blocks

from ..cases import Case, Inputs, Sizes, operator_case, torch_implementation

# Outputs x inputs of the published models, from 2 MB to the vocabulary.
SHAPES = (
    (1024, 1024),
    (64, 2048),
    (4096, 1024),
    (2048, 4096),
    (4096, 4096),
    (5120, 6144),
    (5120, 17408),
    (248320, 2048),
)
# Of a layer of 0.8B and of 35B-A3B: gate and up behind a norm, down behind SwiGLU, and down of the shared expert.
FUSED = (
    ("add_rms_norm_linear", 7168, 1024),
    ("add_rms_norm_linear", 12352, 2048),
    ("silu_mul_linear", 1024, 3584),
    ("add_gated_silu_mul_linear", 2048, 512),
)


def fused_cases(all_rows: tuple[int, ...]) -> Iterator[Case]:
    """Their peer is the same done by the operators that they join, one launch each."""
    for kernel, outputs, inputs in FUSED:
        for rows in all_rows:
            wide = inputs if kernel == "add_rms_norm_linear" else 2 * inputs

            def product(draw: Inputs, kernel=kernel, rows=rows, outputs=outputs, inputs=inputs, wide=wide) -> tuple:
                x, weight = draw.randn(rows, wide), draw.randn(outputs, inputs)
                if kernel == "add_rms_norm_linear":
                    return x, draw.randn(rows, inputs), draw.randn(inputs), 1e-6, weight
                gated = kernel == "add_gated_silu_mul_linear"
                return (draw.randn(rows, outputs), x, weight, draw.randn(rows, 1)) if gated else (x, weight)

            extra = {"add_rms_norm_linear": 3 * inputs, "add_gated_silu_mul_linear": outputs + 1}.get(kernel, 0)
            yield Case(
                kernel,
                f"{rows} x {inputs} -> {outputs}, {2 * outputs * inputs / 1e6:.0f} MB",
                2 * (outputs * inputs + rows * (wide + outputs + extra)),
                product,
                getattr(torch.ops.tokenspeed, kernel).default,
                flops=2 * rows * outputs * inputs,
                peers={"its operators apart": torch_implementation(kernel)},
            )


def _two_launches(x, residual, norm_weight, eps, weight, scale, tail) -> tuple[torch.Tensor, torch.Tensor]:
    projected, normed, _ = ops.add_rms_norm_linear(x, residual, norm_weight, eps, weight, scale)
    return projected, ops.linear(normed, tail)


def fp8_cases(all_rows: tuple[int, ...], outputs: int, tail: int, inputs: int) -> Iterator[Case]:
    """An in-projection in two formats, and beside it the launches that it stands for."""
    for rows in all_rows:

        def product(draw: Inputs, rows=rows) -> tuple:
            stream = (draw.randn(rows, inputs), draw.randn(rows, inputs), draw.randn(inputs), 1e-6)
            return *stream, *quantise_blocks(draw.randn(outputs, inputs)), draw.randn(tail, inputs)

        yield Case(
            "add_rms_norm_linear",
            f"{rows} x {inputs} -> {outputs} of e4m3 + {tail} of bf16",
            (outputs + 2 * tail) * inputs + 2 * rows * (outputs + tail + 5 * inputs),
            product,
            torch.ops.tokenspeed.add_rms_norm_linear.default,
            flops=2 * rows * (outputs + tail) * inputs,
            peers={"a launch for each format": _two_launches},
        )


def cases(sizes: Sizes) -> Iterator[Case]:
    """Calls follow each other in one graph, so each fills its ring beside the one before, as in a decode step."""
    on_gpu = len(sizes.decode) > 1
    for outputs, inputs in SHAPES if on_gpu else SHAPES[:2]:
        for rows in (1, 8, 16) if on_gpu else (1,):

            def product(draw: Inputs, rows=rows, outputs=outputs, inputs=inputs) -> tuple:
                return draw.randn(rows, inputs), draw.randn(outputs, inputs)

            size = 2 * (outputs * inputs + rows * (outputs + inputs))
            shape = f"{rows} x {inputs} -> {outputs}, {2 * outputs * inputs / 1e6:.0f} MB"
            yield operator_case("linear", shape, size, product, flops=2 * rows * outputs * inputs)
    yield from fused_cases((1, 8) if on_gpu else (1,))
    # Of a Gated DeltaNet layer of 35B-A3B.
    yield from fp8_cases((1, 8), 12288, 64, 2048) if on_gpu else fp8_cases((1,), 256, 16, 256)
