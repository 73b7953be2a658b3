"""Imports run one way: values <- operators <- model <- device <- core <- surface. Every module has its place, and a
module that is planted above it is found."""

import ast
from pathlib import Path

import pytest

import tokenspeed

PACKAGE = Path(__file__).parent.parent / "tokenspeed"
# The rooms and loose modules of the engine, lowest first; what stands on one line may know each other.
LAYERS = [
    {"errors"},
    {"files", "quantization"},
    {"config", "checkpoint", "sizes", "request", "text"},
    {"schedule"},
    {"parallel"},
    {"model"},
    {"executor"},
    {"core", "chat"},
    {"llm", "debug", "transfer"},
    {"server"},
    {"router"},
    {"bench", "commands"},
    {"__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
NO_TORCH = {"errors", "files", "quantization", "config", "checkpoint", "sizes", "request", "text", "schedule", "chat"}
ENGINE, OPERATORS, INTEGRATIONS = "tokenspeed.engine", "tokenspeed.ops", "tokenspeed.integrations"
AROUND = {"benchmarks", "examples", "tests", "tools"}  # what a wheel does not have


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
    # The package's own names are the engine's, imported when first used.
    found |= {f"{ENGINE}.{part}" for name, part in tokenspeed._ENGINE.items() if f"tokenspeed.{name}" in found}
    return found


def part_of(name: str) -> str:
    """`tokenspeed.engine.text.template` -> `text`."""
    return name.split(".")[2]


def fault(name: str, used: set[str]) -> str:
    """What a module must not import of what it imports; nothing where all is well."""
    engine = {part_of(u) for u in used if u.startswith(f"{ENGINE}.")}
    if around := sorted(AROUND & {u.split(".")[0] for u in used}):
        return f"{around} is no part of the package"
    if "tokenspeed.__main__" in used:
        return "the command line stands above everything"
    if name.startswith((OPERATORS, INTEGRATIONS)):
        if name.startswith(OPERATORS) and any(u.startswith(INTEGRATIONS) for u in used):
            return "the operators know who uses them"
        return "knows the engine" if any(u.startswith(ENGINE) for u in used) else ""
    if not name.startswith(f"{ENGINE}."):
        return ""
    part = part_of(name)
    if part not in RANK:
        return f"{part} has no place in LAYERS"
    if any(u.startswith(INTEGRATIONS) for u in used):
        return "the engine calls the operators itself"
    if part in NO_TORCH and any(u.split(".")[0] == "torch" or u.startswith(OPERATORS) for u in used):
        return f"{part} must not import torch or the operators"
    above = sorted(other for other in engine if RANK.get(other, 0) > RANK[part])
    return f"{part} must not import {above}" if above else ""


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_follow_the_arrows(path):
    assert fault(name_of(path), imports(path)) == ""


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_an_upward_import_planted_anywhere_is_found(path):
    name, used = name_of(path), imports(path)
    planted = {"tokenspeed.__main__", *(f"{around}.timing" for around in AROUND)}
    if name.startswith((OPERATORS, INTEGRATIONS)):
        planted |= {f"{ENGINE}.{part}" for part in RANK} | ({INTEGRATIONS} if name.startswith(OPERATORS) else set())
    elif name.startswith(f"{ENGINE}."):
        planted |= {f"{ENGINE}.{part}" for part in RANK if RANK[part] > RANK[part_of(name)]} | {INTEGRATIONS}
    for each in planted:
        assert fault(name, used | {each}), each


@pytest.mark.parametrize(
    "line",
    [
        "from ..core import Engine",
        "from .. import core",
        "import tokenspeed.engine.core",
        "from tokenspeed.engine.core import Engine",
        "from tokenspeed import LLM",
        "from ... import LLM",
        "def late():\n    from ..core import Engine",
    ],
)
def test_however_an_import_is_written_it_is_seen(line, tmp_path, monkeypatch):
    path = tmp_path / "tokenspeed/engine/model/planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "tokenspeed")
    assert fault(name_of(path), imports(path))


def test_nothing_unpickles_or_evaluates():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill", "torch.load"}, path
