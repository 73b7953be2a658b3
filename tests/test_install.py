"""The package installs: the short form of tools/try_installs.py, and what its metadata promise."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tokenspeed

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_a_wheel_from_the_source_distribution_and_an_editable_install_run():
    command = [sys.executable, ROOT / "tools/try_installs.py", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok ") == 2


def test_one_python_is_asked_for_everywhere():
    least = PROJECT["requires-python"].removeprefix(">=")
    makefile, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docs/install.md"))
    assert f"version_info < ({least.replace('.', ', ')})" in makefile
    assert (
        f"Python {least} to 3.14" in (ROOT / "README.md").read_text(encoding="utf-8") and f"| {least} to 3.14" in page
    )
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named[0] == least and named[-1] == "3.14"


def test_the_operators_ask_for_torch_alone():
    assert [re.match(r"\w+", name)[0] for name in PROJECT["dependencies"]] == ["torch"]
    program = "import sys, tokenspeed.ops, tokenspeed.integrations.fla; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    extras = PROJECT["optional-dependencies"]
    assert not set(loaded.split()) & {
        "jinja2",
        "msgspec",
        "tokenizers",
        "safetensors",
        "pydantic",
        "fastapi",
        "uvicorn",
    }
    assert not any(name.startswith("tokenspeed.engine") for name in loaded.split())
    assert set(extras) == {"engine", "nixl", "server", "transformers"}


def test_every_pinned_package_is_in_the_range_that_users_get():
    from packaging.requirements import Requirement

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M))
    wanted = [
        *PROJECT["dependencies"],
        *(name for extra, names in PROJECT["optional-dependencies"].items() if extra != "nixl" for name in names),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["name"]:
            name = next(name for name in pinned if name.replace("-", "_") == requirement.name.replace("-", "_"))
            assert requirement.specifier.contains(pinned[name]), f"{requirement} and {name}=={pinned[name]}"


def test_the_image_is_built_with_what_is_tested():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M))
    image = dict(re.findall(r"([\w.-]+)==(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert "torch" in image and image.items() <= pinned.items()


def test_names_are_imported_when_they_are_used():
    assert tokenspeed.LLM.__module__ == "tokenspeed.engine.llm"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tokenspeed.Nothing


@pytest.mark.parametrize(
    ("absent", "mode", "sentence"),
    [
        ("pybind11", "0", "the build needs pybind11, and this environment has none"),
        ("ninja", "0", "the build needs ninja"),
        ("torch", "1", "the build needs torch"),
        ("", "maybe", "TOKENSPEED_CUDA is 'maybe'; it may be 0"),
    ],
)
def test_a_build_says_in_a_sentence_what_it_lacks(absent, mode, sentence, tmp_path):
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {absent!r} else find(name, *rest)\n"
        f"sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    environment = {**os.environ, "TOKENSPEED_CUDA": mode}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
