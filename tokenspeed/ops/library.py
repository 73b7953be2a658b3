"""How an operator is declared: one decorator gives it a schema, a fake and a torch implementation for every device."""

from collections.abc import Callable
from functools import update_wrapper
from typing import ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Operator(Protocol[P, R]):
    """An operator as a function; __wrapped__ is its torch implementation, for every device."""

    __wrapped__: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


_library = torch.library.Library("tokenspeed", "DEF")
_RAISES = (
    "Raises RuntimeError for an argument that requires a gradient where autograd records, and `ops.NoKernel` under\n"
    "    `ops.strict()` where no compiled kernel serves the call."
)


def operator(*, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Register the decorated function as `torch.ops.tokenspeed.<its name>`; its annotations give the schema.

    The function is the implementation for every device; the compiled extension overrides the CUDA key for the
    operators it has a kernel for. `fake` gives shapes and dtypes only. `mutates` names the arguments written in place.

    Operators are for inference: where autograd records, an argument that requires a gradient raises RuntimeError.
    """

    def register(implementation: Callable[P, R]) -> Operator[P, R]:
        name = implementation.__name__
        schema = torch.library.infer_schema(implementation, mutates_args=mutates)
        _library.define(name + schema)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tokenspeed::{name}", fake, lib=_library)
        overload = getattr(torch.ops.tokenspeed, name).default
        _library.impl(name, _without_gradient(overload), "Autograd")

        def call(*args, **kwargs):
            return overload(*args, **kwargs)

        update_wrapper(call, implementation)
        call.__doc__ = f"{(implementation.__doc__ or '').rstrip()}\n\n    {_RAISES}\n"
        return cast("Operator[P, R]", call)

    return register


def _without_gradient(overload: torch._ops.OpOverload) -> Callable:
    """What autograd calls in an operator's place. Under torch.inference_mode() it is not called at all."""

    def call(*args, **kwargs):
        if torch.is_grad_enabled():
            for argument, value in zip(overload._schema.arguments, args, strict=False):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{overload.name()}: {argument.name} requires a gradient, and the operators have none; "
                        "call them under torch.inference_mode() or torch.no_grad()."
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return call
