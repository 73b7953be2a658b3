"""README and docs say what is so: command lines parse, cheap ones run, examples run, links lead somewhere, and pages
that are written from the code are up to date."""

import argparse
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

import tokenspeed
from tokenspeed.__main__ import main
from tokenspeed.engine.executor import batch
from tokenspeed.engine.schedule.cache import PrefixCache
from tokenspeed.engine.text.tokenizer import Tokenizer
from tools import make_reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "csrc/**/*.md", "tokenspeed/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROGRAM = (
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:tokenspeed|torchrun|(?:\.venv/bin/)?python -m|python tools/\S+|make|pip|docker|\.ci/run)(?= |$)"
)
LISTED = re.compile(rf"^ *({PROGRAM}(?:.*\\\n)*.*)", flags=re.MULTILINE)
QUOTED = re.compile(rf"`({PROGRAM}[^`\n]*)`")


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(text):
    """Fenced and indented code, without Python's."""
    fenced = re.findall(r"^```(?!python)\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [
        *fenced,
        *re.findall(r"(?:^ {4,}\S.*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE),
    ]


def command_lines():
    for path in PAGES:
        text = text_of(path)
        lines = [line for block in blocks(text) for line in LISTED.findall(block)]
        lines += [line for line in QUOTED.findall(text) if not re.search(r"\.\.\.|\[|<", line)]
        for line in dict.fromkeys(lines):
            yield pytest.param(line, id=f"{path.name}: {' '.join(line.split())[:70]}")


COMMANDS = list(command_lines())


class Parsed(Exception):
    """The options were taken; what they ask for does not begin."""


@pytest.fixture
def only_parse(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def words_of(line):
    words = shlex.split(line.replace("\\\n", " "), comments=True)
    while words and "=" in words[0] and words[0].split("=")[0].isupper():
        words.pop(0)
    return words


def test_there_are_command_lines():
    assert len(COMMANDS) > 60, "the pattern finds what the pages show"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_of_a_page_is_one_that_its_program_takes(line, only_parse, monkeypatch):
    program, *rest = words_of(line)
    if program == "torchrun":
        rest = rest[rest.index("-m") :]
        assert rest[1] == "tokenspeed.engine"
        program, rest = "tokenspeed", rest[2:]
    if program == "docker":
        if "serve" not in rest:
            return
        program, rest = "tokenspeed", rest[rest.index("serve") :]
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets), (
            f"no target in {line}"
        )
    elif program == "pip":
        extras = re.search(r"\[(\w+)\]", " ".join(rest))
        assert not extras or re.search(rf"^{extras[1]} = ", text_of(ROOT / "pyproject.toml"), flags=re.MULTILINE)
    elif program == ".ci/run":
        assert (ROOT / program).stat().st_mode & 0o100
    else:
        module = "tokenspeed"
        if program != "tokenspeed":
            module = rest.pop(1) if rest[0] == "-m" else rest[0]
            rest = rest[1:]
        if module in ("venv", "build", "http.server", "vllm_router.app"):
            return
        monkeypatch.setattr(sys, "argv", [module, *rest])
        if module == "tokenspeed" and not rest:
            return
        with pytest.raises(Parsed):
            if module.endswith(".py"):
                runpy.run_path(str(ROOT / module), run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__", alter_sys=False)


@pytest.mark.parametrize(
    "line",
    [
        'tokenspeed generate "What is 12 plus 30?"',
        "tokenspeed generate --jsonl requests.jsonl --output results.jsonl",
        "tokenspeed info --size 35B-A3B --memory-gib 139",
        "tokenspeed info --size Qwen3.6-27B --quantization fp8 --kv-cache-dtype fp8",
        'tokenspeed generate "What is 12 plus 30?" --log-steps steps.jsonl',
        "tokenspeed bench replay steps.jsonl",
    ],
)
def test_what_is_cheap_runs(line, monkeypatch, capsys, shared_folder):
    assert any(line in " ".join(case.values[0].split()) for case in COMMANDS), "no page has this line any more"
    monkeypatch.chdir(shared_folder)
    (shared_folder / "requests.jsonl").write_text(json.dumps({"prompt": "Hello", "max_tokens": 3}) + "\n")
    monkeypatch.setattr(sys, "argv", words_of(line))
    assert main() == 0
    captured = capsys.readouterr()
    assert captured.out or captured.err


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


def python_examples():
    for path in (ROOT / "README.md", ROOT / "docs/integrations.md"):
        for i, example in enumerate(
            re.findall(r"^```python\n(.*?)^```", text_of(path), flags=re.MULTILINE | re.DOTALL)
        ):
            yield pytest.param(example, id=f"{path.name}-{i}")


@pytest.mark.parametrize("example", list(python_examples()))
def test_an_example_runs(example, capsys):
    torch.manual_seed(0)
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_a_page_that_is_written_from_the_code_is_up_to_date(name):
    assert text_of(ROOT / name) == "\n".join(make_reference.PAGES[name]()).rstrip() + "\n", "run `make docs`"


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(text_of(page)), f"{target}: no such heading"


def test_twelve_files_lead_from_a_prompt_to_logits(monkeypatch):
    """Those that the architecture page lists: whose code calls, all the way down, where a prompt is encoded and
    admitted, a Step becomes tensors, and a product of the forward pass is made; and what a Step is."""
    page = text_of(ROOT / "docs/architecture.md")
    paragraph = re.search(r"^\*\*From a prompt to logits.*?\n\n", page, flags=re.MULTILINE | re.DOTALL)[0]
    listed, met = re.findall(r"`([\w/]+\.py)`", paragraph), {"schedule/step.py"}
    package = Path(tokenspeed.__file__).parent

    def watch(owner, name):
        function = getattr(owner, name)

        def call(*args, **options):
            frame = sys._getframe(1)
            while frame:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(package):
                    met.add(str(path.relative_to(package)).removeprefix("engine/"))
                frame = frame.f_back
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    llm = tokenspeed.LLM(progress=False, draft_tokens=0, kv_pages=4, state_slots=2)
    watch(Tokenizer, "_encode")
    watch(PrefixCache, "admit")
    watch(batch, "to_device")
    watch(sys.modules["tokenspeed.ops.linear"], "product")
    llm.generate(["Hello!"], tokenspeed.SamplingParams(temperature=0, max_tokens=1), progress=False)
    assert len(listed) <= 12 and met - {"ops/library.py"} == set(listed)  # library: of every operator


def test_every_setting_is_documented():
    from tokenspeed.engine.config import EngineConfig

    for name in EngineConfig.__dataclass_fields__:
        assert re.search(rf"\b{name}\b", EngineConfig.__doc__), name


def test_every_operator_says_what_it_raises():
    from tokenspeed import ops

    for name in ops.__all__:
        assert "Raises " in getattr(ops, name).__doc__, name
