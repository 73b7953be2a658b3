"""docs/ops.md is executed and compared with the operators' schemas, so that it cannot rot."""

import re
from pathlib import Path

import torch

import tokenspeed.ops

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_example_runs():
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) == 1
    exec(compile(examples[0], "docs/ops.md", "exec"), {})


def test_the_table_is_the_schemas():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(tokenspeed.ops.__all__)
    for name, arguments, mutated in rows:
        declared = getattr(torch.ops.tokenspeed, name).default._schema.arguments
        written = [argument.name for argument in declared if argument.alias_info and argument.alias_info.is_write]
        assert arguments == ", ".join(argument.name for argument in declared)
        assert re.findall(r"`(\w+)`", mutated) == written
