"""Loads the compiled kernels, which take the operators over on the cards they are built for."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from .strict import refuse_if_strict

_torch_implementations = torch.library.Library("tokenspeed_torch", "DEF")


@functools.cache
def declare_torch_implementations() -> None:
    """Offer every operator's torch implementation as `torch.ops.tokenspeed_torch.<name>`.

    A compiled kernel hands on to it what it does not serve: other cards, dtypes, sizes and layouts.
    """
    from tokenspeed import ops  # not at the top: tokenspeed.ops may be importing this module

    def handed_on(name: str) -> Callable:
        implementation = getattr(ops, name).__wrapped__

        def call(*args):
            refuse_if_strict(name, args)
            return implementation(*args)

        return call

    for name in ops.__all__:
        schema = str(getattr(torch.ops.tokenspeed, name).default._schema).removeprefix("tokenspeed::")
        _torch_implementations.define(schema)
        _torch_implementations.impl(name, handed_on(name), "CompositeExplicitAutograd")


@functools.cache
def load() -> bool:
    """Register the kernels of `tokenspeed/_C*.so` for CUDA tensors; does nothing when called again.

    Safe without a GPU and with any card: it starts no CUDA context, and each call of an operator asks whether its card
    has kernels. Returns whether the extension is built. Raises OSError when it does not fit the installed torch.
    """
    built = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not built:
        return False
    declare_torch_implementations()
    torch.ops.load_library(built[0])
    return True
