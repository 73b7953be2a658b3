"""Bugs to plant in the engine, one at a time, and the tests that must fail with them."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from types import FunctionType
from typing import NamedTuple
from unittest.mock import patch

import pytest
from schedules import run_schedule

SLIPS = (NameError, AttributeError, TypeError, ImportError)  # of whoever wrote the bug: no rule was broken
SCANNED = 300  # schedules that are tried where a bug's own has lost it


def seeds(*numbers: int) -> Callable[[], None]:
    """These random schedules."""
    return partial(schedules, numbers)


def schedules(numbers) -> None:
    for seed in numbers:
        run_schedule(seed)


class Bug(NamedTuple):
    """Wrong text in a function, method or property of the engine. code: text that occurs once there; instead: what
    stands there with the bug; by: what must fail, the same way every time."""

    name: str
    where: FunctionType | property
    code: str
    instead: str
    by: Callable[[], object]

    @contextmanager
    def planted(self) -> Iterator[None]:
        with replaced(self.where, rewritten(self.where, self.code, self.instead)):
            yield


def plain(where: FunctionType | property) -> FunctionType:
    """The function itself, whatever decorates it."""
    return inspect.unwrap(where.fget if isinstance(where, property) else where)


def rewritten(where: FunctionType | property, code: str, instead: str) -> FunctionType | property:
    """The function with other text in place of the code, which it holds exactly once."""
    original = plain(where)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(code) == 1, f"{original.__qualname__} holds {source.count(code)} times: {code}"
    names: dict = {}
    exec(
        compile(source.replace(code, instead), f"<{original.__name__}, with a bug>", "exec"), vars(module(where)), names
    )
    return names[original.__name__]


def module(where: FunctionType | property):
    return sys.modules[plain(where).__module__]


@contextmanager
def replaced(where: FunctionType | property, wrong) -> Iterator[None]:
    """Another function in its place, wherever the engine uses it."""
    *owners, name = plain(where).__qualname__.split(".")
    with ExitStack() as stack:
        if owners:
            stack.enter_context(patch.object(reduce(getattr, owners, module(where)), name, wrong))
        else:
            for user in [m for key, m in sys.modules.items() if key.startswith("tokenspeed.engine.")]:
                if vars(user).get(name) is where:
                    stack.enter_context(patch.object(user, name, wrong))
        yield


def noticed(by: Callable[[], object]) -> bool:
    """Whether a test fails, for a reason that is not a slip of the bug's own."""
    try:
        by()
    except Exception as error:
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        assert not isinstance(first, SLIPS), f"the bug does not even run: {first!r}"
        return True
    return False


def must_be_noticed(bug: Bug) -> None:
    with bug.planted():
        if noticed(bug.by):
            return
        hint = ""
        if getattr(bug.by, "func", None) is schedules:
            others = [seed for seed in range(SCANNED) if noticed(seeds(seed))]
            hint = f"; other schedules that do, of the first {SCANNED}: {others[:20]}"
    pytest.fail(f"nothing noticed: {bug.name}{hint}")


def must_pass_without(bugs: tuple[Bug, ...]) -> None:
    """What finds the bugs passes where there is none."""
    numbers = sorted({seed for bug in bugs if getattr(bug.by, "func", None) is schedules for seed in bug.by.args[0]})
    schedules(numbers)
    for by in {bug.by for bug in bugs if getattr(bug.by, "func", None) is not schedules}:
        by()
