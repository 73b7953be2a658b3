"""Writes docs/configuration.md and docs/api.md from the code: options, settings and docstrings (`make docs`).

python tools/make_reference.py [--check]    --check writes nothing and fails where a page is out of date
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

NOTE = "<!-- Written by tools/make_reference.py from the code: change it there, then run `make docs`. -->"
CLASSES = {
    "tokenspeed": ("LLM", "AsyncLLM", "SamplingParams"),
    "tokenspeed.engine.request": ("RequestOutput", "CompletionOutput", "RequestMetrics"),
    "tokenspeed.engine.chat.conversation": ("Conversation",),
    "tokenspeed.engine.errors": (
        *("TokenSpeedError", "ConfigError", "RequestError", "CapacityError", "EngineError", "PlacementError"),
        "LogError",
    ),
}
FUNCTIONS = {
    "tokenspeed.integrations.transformers": ("use_operators", "restore"),
    "tokenspeed.integrations.fla": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "tokenspeed.integrations.flashinfer": (
        *("chunk_gated_delta_rule", "gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose"),
    ),
}


def configuration() -> Iterator[str]:
    """Every option of every command, and every field of EngineConfig."""
    from tokenspeed.engine.__main__ import build_parser
    from tokenspeed.engine.config import EngineConfig

    yield from ("# Configuration", "", NOTE, "")
    yield from paragraphs(
        "A setting of the engine has one name: a field of `EngineConfig` in Python (`LLM(max_num_seqs=16)`), the same "
        "with dashes on the command line (`--max-num-seqs 16`). Where vLLM has a setting that means the same, it is "
        "vLLM's name. Nothing is read from environment variables or files, but for where `huggingface_hub` keeps its "
        "cache ([install.md](install.md#checkpoints-offline)) and what `torchrun` sets."
    )
    yield from ("## EngineConfig", "", "| field | type | default |", "|---|---|---|")
    for field in dataclasses.fields(EngineConfig):
        yield f"| `{field.name}` | `{escaped(annotation(field.type))}` | `{field.default!r}` |"
    yield ""
    yield from paragraphs(*inspect.cleandoc(EngineConfig.__doc__ or "").split("\n\n"))
    seen: dict[str, str] = {}
    for name, parser in commands(build_parser()):
        yield from (f"## {name}", "", parser.description or "", "")
        for group in parser._action_groups:
            actions = [
                a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest not in ("help", "command")
            ]
            actions = [a for a in actions if not isinstance(a, argparse._SubParsersAction)]
            if not actions:
                continue
            title = group.title or ""
            rows = ["| option | what |", "|---|---|", *map(row, actions)]
            body = "\n".join(rows)
            if seen.get(body):
                yield from (f"*{title}*: as for [{seen[body]}](#{anchor(seen[body])}).", "")
                continue
            seen[body] = name
            yield from (f"*{title}*", "", *rows, "")


def commands(
    parser: argparse.ArgumentParser, name: str = "tokenspeed"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child, inner in action.choices.items():
                yield f"{name} {child}", inner
                yield from commands(inner, f"{name} {child}")


def anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest}`"
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    if value and action.option_strings and action.nargs != 0:
        names += f" `{value}`"
    help = " ".join((action.help or "").split()).replace("%%", "%")
    return f"| {escaped(names)} | {escaped(help)} |"


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def annotation(kind: Any) -> str:
    return (
        kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    )


def paragraphs(*texts: str) -> Iterator[str]:
    for text in texts:
        yield from (" ".join(text.split()), "")


def api() -> Iterator[str]:
    """Classes and functions that a program uses, with their docstrings."""
    from tokenspeed import ops

    yield from ("# API", "", NOTE, "")
    yield from paragraphs(
        "What a program imports. `from tokenspeed import LLM, AsyncLLM, SamplingParams` needs the engine's packages, "
        "`tokenspeed.ops` and `tokenspeed.integrations` torch alone. The server's API is in [server.md](server.md)."
    )
    for module, names in CLASSES.items():
        for name in names:
            yield from described(module, getattr(importlib.import_module(module), name))
    yield from ("## tokenspeed.ops", "")
    yield from paragraphs(ops.__doc__ or "")
    for name in (*ops.__all__, "compiled_operators", "why_not", "strict", "NoKernel"):
        yield from described_function("ops", getattr(ops, name), name)
    for module, names in FUNCTIONS.items():
        yield from (f"## {module}", "")
        yield from paragraphs(*inspect.cleandoc(importlib.import_module(module).__doc__ or "").split("\n\n"))
        for name in names:
            yield from described_function(
                module.rpartition(".")[2], getattr(importlib.import_module(module), name), name
            )


def described(module: str, kind: type) -> Iterator[str]:
    yield from (f"## {module}.{kind.__name__}", "")
    if not issubclass(kind, Exception):
        yield from ("```python", signature(kind.__name__, kind), "```", "")
    if kind.__doc__:
        yield from paragraphs(*inspect.cleandoc(kind.__doc__).split("\n\n"))
    for name, method in vars(kind).items():
        if not name.startswith("_") and inspect.isfunction(method) and method.__doc__:
            yield from described_function(kind.__name__, method, name)


def described_function(owner: str, function: Any, name: str) -> Iterator[str]:
    yield from (f"### {owner}.{name}", "")
    if not inspect.isclass(function):
        yield from ("```python", signature(name, inspect.unwrap(function)), "```", "")
    yield from paragraphs(*inspect.cleandoc(function.__doc__ or "").split("\n\n"))


def signature(name: str, function: Any) -> str:
    text = (
        str(inspect.signature(function))
        .replace("torch.Tensor", "Tensor")
        .replace("(self, ", "(")
        .replace("(self)", "()")
    )
    text = re.sub(r"(?:[a-z_]\w*\.)+(?=[A-Z])", "", text)
    return f"{name}{text}"


PAGES = {"docs/configuration.md": configuration, "docs/api.md": api}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    options = parser.parse_args()
    stale = 0
    for name, lines in PAGES.items():
        text = "\n".join(lines()).rstrip() + "\n"
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if options.check:
            print(f"{name} is out of date: run `make docs`.", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
