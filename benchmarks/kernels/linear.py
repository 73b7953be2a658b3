"""The dense product of a decode step: the weights stream once."""

from collections.abc import Iterator

from ..cases import Case, Inputs, Sizes, operator_case

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
