"""Installs the package in every way that is promised, each in a fresh environment, and runs it there.

    python tools/try_installs.py [--python python3.11 python3.12 ...]    every form, from the package index
    python tools/try_installs.py --short                                 this interpreter, its own torch and packages

A form: a wheel from the source distribution, built in isolation; the wheel without the engine's packages; `pip install
.`; `pip install --editable .`. The source distribution is made of the files that git knows, beside what an earlier
build would have left, none of which may come along. --short takes the first and the last form and what they need from
the environment that runs it; without an index to isolate a build with, it says so and builds without isolation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "TOKENSPEED_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONSAFEPATH": "1"}
# An environment without a ninja of its own takes the one on the PATH. Another version than the Makefile's would compile
# everything again in this tree, and so would the Makefile's after it.
ENVIRONMENT["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
STALE = ("tokenspeed/_C.abi3.so", "tokenspeed/_C.so", "build/lib/tokenspeed/renamed_long_ago.py")
SOURCES = (
    "csrc/kernels/dense/rms_norm.cu",
    "csrc/kernels/ptx.h",
    "csrc/cache/tree.cpp",
    "tools/cuda_paths.py",
    "setup.py",
)
CONTENTS = (
    "tokenspeed/py.typed",
    "tokenspeed/engine/server/page.html",
    "tokenspeed/models/tiny_agent/model.safetensors",
)
ENGINE_PACKAGES = (
    "jinja2",
    "llguidance",
    "msgspec",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "uvicorn",
    "zmq",
)


class InstallFailed(Exception):
    """What did not install or run, with the output."""


def run(*command: str | Path, cwd: Path | None = None, status: int = 0, variables: dict[str, str] | None = None) -> str:
    environment = ENVIRONMENT | (variables or {})
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode != status:
        raise InstallFailed(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise InstallFailed(what)


def copy_sources(to: Path) -> Path:
    """A tree of the files that git knows, and of stale ones."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for name in STALE:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(b"stale")
    return to


def make_sdist(tree: Path, to: Path) -> Path:
    hook = "import sys; sys.path.insert(0, 'tools'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", hook, to, cwd=tree)
    [sdist] = to.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expect(names >= {*SOURCES, *CONTENTS}, f"{sdist.name} lacks {sorted({*SOURCES, *CONTENTS} - names)}")
    expect(not any(name.endswith((".so", ".o")) for name in names), f"{sdist.name} has compiled files")
    return sdist


def check_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expect(names >= set(CONTENTS), f"{wheel.name} lacks {sorted(set(CONTENTS) - names)}")
    expect(any(name.startswith("tokenspeed/_cache.") for name in names), f"{wheel.name} has no compiled cache")
    foreign = [n for n in names if n in STALE or "renamed" in n or n.partition("/")[0] in ("tools", "tests", "csrc")]
    expect(not foreign, f"{wheel.name} has {foreign}")


def make_wheel(
    python: Path | str, source: Path, to: Path, *options: str, variables: dict[str, str] | None = None
) -> Path:
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", to, *options, source, variables=variables)
    [wheel] = to.glob("*.whl")
    check_wheel(wheel)
    return wheel


class Environment:
    """A fresh virtual environment. packages_of: folders of packages that it sees beside its own."""

    def __init__(self, folder: Path, python: str, packages_of: list[str]):
        if packages_of:
            venv.create(folder, with_pip=False)
            [own] = folder.glob("lib/python*/site-packages")
            (own / "theirs.pth").write_text("\n".join(packages_of) + "\n")
        else:
            run(python, "-m", "venv", folder)
        self.folder, self.python = folder, folder / "bin/python"
        self.pip = [sys.executable, "-m", "pip", "--python", self.python]

    def install(self, *what: str | Path) -> None:
        run(*self.pip, "install", "--quiet", *what)

    def check_engine(self, source: Path | None = None) -> None:
        """The command answers, Python finds the names, and both come from where they were installed."""
        command = self.folder / "bin/tokenspeed"
        question = ("generate", "What is 12 plus 30?", "--temperature", "0", "--quiet")
        expect("tool" in run(command, *question, cwd=self.folder), "another answer than the shipped model's")
        program = "import tokenspeed; from tokenspeed import LLM, SamplingParams; print(tokenspeed.__file__)"
        origin = Path(run(self.python, "-c", program, cwd=self.folder).splitlines()[-1])
        expect(origin.is_relative_to(source or self.folder), f"tokenspeed was imported from {origin}")

    def check_operators(self) -> None:
        """They need torch alone; the engine says what it needs."""
        hide = f"import sys; sys.modules.update(dict.fromkeys({ENGINE_PACKAGES}))\n"
        program = "import torch\nfrom tokenspeed import ops\nprint(ops.silu_mul(torch.ones(1, 4)).tolist())"
        run(self.python, "-c", hide + program, cwd=self.folder)
        program = "import sys\nfrom tokenspeed.__main__ import main\nsys.argv[1:] = ['info']\nsys.exit(main())"
        said = run(self.python, "-c", hide + program, cwd=self.folder, status=1)
        expect("pip install 'qwen-tokenspeed[" in said and "Traceback" not in said, f"no sentence, but: {said}")


def has_index() -> bool:
    """Whether pip can get what an isolated build needs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--timeout", "10"]
        return (
            subprocess.run([*command, "--dest", folder, "pybind11"], capture_output=True, env=ENVIRONMENT).returncode
            == 0
        )


def forms_in_short(work: Path, tree: Path, sdist: Path) -> None:
    ours = [path for path in sys.path if path.endswith("site-packages")]
    isolated = has_index()
    if not isolated:
        print("no package index can be reached: the wheel is built without isolation")
    with timed("wheel from the sdist" + ", in isolation" * isolated):
        options = [] if isolated else ["--no-build-isolation"]
        unoptimised = {"CXXFLAGS": "-O0"}  # compiles in half the time, to the same files
        wheel = make_wheel(sys.executable, sdist, work / "wheel", *options, variables=unoptimised)
        environment = Environment(work / "wheel-env", sys.executable, ours)
        environment.install("--no-deps", "--no-index", wheel)
        environment.check_engine()
        environment.check_operators()
    # With the compiler's flags as they are, so that what `make` built in this tree is used and stays.
    with timed("editable"):
        environment = Environment(work / "editable-env", sys.executable, ours)
        environment.install("--no-deps", "--no-index", "--no-build-isolation", "--editable", ROOT)
        environment.check_engine(ROOT)


def forms_in_full(work: Path, tree: Path, sdist: Path, python: str) -> None:
    with timed("wheel from the sdist, in isolation; operators alone"):
        environment = Environment(work / "env", python, [])
        wheel = make_wheel(environment.python, sdist, work / "wheel")
        environment.install(wheel)
        environment.check_operators()
    with timed("wheel with the engine and the server"):
        environment.install(f"{wheel}[server]")
        environment.check_engine()
        run(environment.python, "-c", "import tokenspeed.engine.server.main", cwd=work)
    with timed("pip install ."):
        environment.install("--force-reinstall", "--no-deps", tree)
        environment.check_engine()
    for name in STALE:  # an editable install imports what stands in the tree
        (tree / name).unlink()
    with timed("pip install --editable ."):
        environment.install("--force-reinstall", "--no-deps", "--editable", tree)
        environment.check_engine(tree)


class timed:
    """Prints a form, and how long it took."""

    def __init__(self, form: str):
        self.form = form

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, kind, error, trace) -> None:
        print(
            f"  {'ok' if kind is None else 'FAILED':7} {self.form}  ({time.monotonic() - self.start:.0f} s)", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON", help="interpreters to try")
    parser.add_argument("--short", action="store_true", help="two forms, with the packages of this environment")
    options = parser.parse_args()
    failed = False
    for python in [sys.executable] if options.short else options.python:
        print(run(python, "--version").strip(), flush=True)
        with tempfile.TemporaryDirectory(prefix="tokenspeed-") as folder:
            work = Path(folder).resolve()
            try:
                tree = copy_sources(work / "tree")
                sdist = make_sdist(tree, work)
                forms_in_short(work, tree, sdist) if options.short else forms_in_full(work, tree, sdist, python)
            except InstallFailed as failure:
                print(failure, file=sys.stderr, flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
