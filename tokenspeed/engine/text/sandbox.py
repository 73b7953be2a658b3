"""Where a checkpoint's chat template runs: Jinja's immutable sandbox, with limits on work and memory.

Jinja's sandbox keeps a template away from Python's internals and from changing its arguments; a template may still loop
for ever or fill the memory. Bounded here, per render: loop iterations, calls that give text, and the text handled
(`MAX_STEPS`), the length of the output and of every string and list that an operator, filter or call makes
(`MAX_SIZE`), and, by Jinja, `range`. Functions whose result is as long as a number says (`center`, `'...'.format`,
`%10d`) are not there. Not bounded: what one call of `join`, `replace` or `tojson` makes out of arguments that are
themselves within the limits.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # a loop iteration, a result of an operator, filter or call, or 1024 characters of one
MAX_SIZE = 1 << 25  # characters or elements; four times a million tokens' text

_PADDING_FILTERS = ("batch", "center", "format", "indent", "slice", "wordwrap")
_PADDING_METHODS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"})
_WIDTH = re.compile(r"%[^%a-zA-Z]*[\d*]")
_MAX_INTEGER_BITS = 4096

_steps_left: ContextVar[list[int] | None] = ContextVar("steps_left", default=None)


class TemplateRefusal(TemplateError):
    """The template called raise_exception."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The names and settings that chat templates are written for, within the limits above."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in _PADDING_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters = {name: _charged(function) for name, function in self.filters.items()}
        self.filters |= {_Limits.ITERATE: _iterate, _Limits.CONCATENATE: _concatenate}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "namespace": _GuardedNamespace,
        }

    def compile_template(self, source: str) -> Template:
        """Raises jinja2.TemplateSyntaxError."""
        with _budget():
            code = self.compile(_Limits().visit(self.parse(source)))
        return Template.from_code(self, code, self.make_globals(None))

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """Raises whatever the template makes Python raise; TemplateRefusal for its own raise_exception."""
        pieces: list[str] = []
        length = 0
        with _budget():
            for piece in template.generate(variables):
                length += len(piece)
                _spend(len(piece), length)
                pieces.append(piece)
        return "".join(pieces)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        return None  # leaves str.format to is_safe_attribute, which refuses it

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = _result_size(operator, left, right)
        _spend(size, size)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, LoopContext) and args:  # loop(children) in a recursive loop
            args = (_iterate(args[0]), *args[1:])
        result = super().call(context, function, *args, **kwargs)
        _spend_on(result)
        return result


class _Limits(NodeTransformer):
    """Sends every loop's iterable and every `~` through a counting filter, under names no template can write."""

    ITERATE = "counted iteration"
    CONCATENATE = "counted concatenation"

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, self.ITERATE, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pieces, self.CONCATENATE, [], [], None, None, lineno=node.lineno)


class _GuardedNamespace(Namespace):
    """Jinja's namespace without underscore names, which Python or Jinja could take for an object's own protocol."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: a template may name an attribute so
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


@contextmanager
def _budget() -> Iterator[None]:
    token = _steps_left.set([MAX_STEPS])
    try:
        yield
    finally:
        _steps_left.reset(token)


def _spend(cost: int, size: int) -> None:
    """One step and one more per 1024 of `cost`; refuses a result of more than MAX_SIZE."""
    if size > MAX_SIZE:
        raise TemplateRuntimeError(f"the chat template makes a value of size {size}, more than {MAX_SIZE}")
    steps = _steps_left.get()
    if steps is not None:
        steps[0] -= 1 + cost // 1024
        if steps[0] < 0:
            raise TemplateRuntimeError(f"the chat template takes more than {MAX_STEPS} steps")


def _spend_on(result: Any) -> None:
    if isinstance(result, str | list | tuple):
        _spend(len(result), len(result))


def _iterate(iterable: Any) -> list[Any]:
    steps = _steps_left.get()
    items = list(islice(iterable, steps[0] + 1 if steps else MAX_STEPS))
    _spend(1024 * len(items), len(items))
    return items


def _concatenate(pieces: Iterable[Any]) -> str:
    strings = [str(piece) for piece in pieces]
    size = sum(map(len, strings))
    _spend(size, size)
    return "".join(strings)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """The size of `left operator right` before it is computed; 0 where it cannot grow."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return MAX_SIZE + bits if bits > _MAX_INTEGER_BITS else 0
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        return len(left) + len(right)
    if operator == "*":
        sized, count = (left, right) if hasattr(left, "__len__") else (right, left)
        return len(sized) * max(count, 0) if hasattr(sized, "__len__") and isinstance(count, int) else 0
    if operator == "%" and isinstance(left, str):
        if _WIDTH.search(left):
            raise SecurityError(f"a width in the format string {left!r} is not allowed in a chat template")
        return len(left)
    return 0


def _charged(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        _spend_on(result)
        return result

    return charged


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no model was trained on."""
    if indent is not None and (not isinstance(indent, int) or indent > 16):
        raise SecurityError(f"tojson(indent={indent!r}): a chat template may indent by at most 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateRefusal(str(message))


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template may not store {name!r} in a namespace")
