"""Imports run one way: values <- ops <- model <- device <- core <- surface; text uses values only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tokenspeed"
# Each part of the engine, lowest first, with the modules that make it up.
LAYERS = [
    {"errors", "files", "quantization", "config", "request", "sizes", "checkpoint", "step", "cache", "scheduler"}
    | {"parallel.placement", "parallel.mesh", "parallel.sharding"},
    {"device", "memory", "batch", "sampling", "graphs", "mover", "runner"}
    | {"parallel.comm", "parallel.compile", "parallel.plan", "parallel.sampling", "parallel.control"},
    {"frontend", "chat", "collector", "loading", "ranks", "llm", "core", "step_log", "ranges", "transfer"},
    {"commands", "server", "router", "__main__"},
]
NO_TORCH = LAYERS[0] | {"text", "frontend", "chat", "collector"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of everything the module imports, at any depth."""
    package = (name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]).split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return found


def engine_part(name: str) -> str:
    """`tokenspeed.engine.text.template` -> `text`; `tokenspeed.engine.parallel.placement` keeps both."""
    parts = name.removeprefix("tokenspeed.engine.").split(".")
    return ".".join(parts[:2]) if parts[0] == "parallel" else parts[0]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_follow_the_arrows(path):
    name, used = name_of(path), imports(path)
    engine = {engine_part(u) for u in used if u.startswith("tokenspeed.engine.")}
    uses_torch = any(u.split(".")[0] == "torch" for u in used)
    if name.startswith("tokenspeed.ops"):
        assert not any(u.startswith("tokenspeed.engine") for u in used), "ops must not know the engine"
    elif name.startswith("tokenspeed.integrations"):
        assert not any(u.startswith("tokenspeed.engine") for u in used), "integrations know the operators alone"
    elif name.startswith("tokenspeed.engine."):
        assert not any(u.startswith("tokenspeed.integrations") for u in used), "the engine calls the operators itself"
        part = engine_part(name)
        if part in NO_TORCH:
            assert not uses_torch, f"{part} must not import torch"
            assert not any(u.startswith("tokenspeed.ops") for u in used)
        if part == "text":
            assert engine <= {"text", "errors", "files", "config", "request"}, "text uses values only"
        rank = next((i for i, layer in enumerate(LAYERS) if part in layer), None)
        if rank is not None:
            above = set().union(*LAYERS[rank + 1 :])
            assert not engine & above, f"{part} must not import {sorted(engine & above)}"


def test_nothing_unpickles_or_evaluates():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill", "torch.load"}, path
