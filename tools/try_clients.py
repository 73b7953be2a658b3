"""Command-line agents and litellm, unchanged, against a server with the shipped model:

    python tools/try_clients.py [claude-code | codex | opencode | qwen-code | litellm ...]

Installs each into a throw-away folder (npm, or a virtual environment), asks it for one answer, and prints what came of
it. Outside CI: they are hundreds of megabytes, and their prompts of 20,000 to 50,000 toy tokens take minutes on a CPU.
The model's context is declared longer than it was trained for, so the protocol is tried here, not what it says.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tokenspeed" / "models" / "tiny_agent"
CONTEXT, SECONDS = 131_072, 1200
SERVING = re.compile(r"serving \S+ at (http://\S+)/v1")
LITELLM = """
import litellm
said = [{"role": "user", "content": "Hello!"}]
common = dict(messages=said, api_base=URL + "/v1", api_key="unused", temperature=0, max_tokens=40)
print(litellm.completion(model="openai/tiny", **common).choices[0].message.content)
print("".join(c.choices[0].delta.content or "" for c in litellm.completion(model="openai/tiny", stream=True, **common)))
print(litellm.completion(model="anthropic/tiny", **common | {"api_base": URL}).choices[0].message.content)
print(litellm.responses(model="openai/tiny", input="Hello!", api_base=URL + "/v1", api_key="unused").output[-1].content)
try:
    litellm.completion(model="openai/tiny", **common | {"max_tokens": 10**6})
except litellm.ContextWindowExceededError:
    print("ContextWindowExceededError, as it should be")
"""


def npm(folder: Path, package: str) -> Path:
    """Installs a package; the folder of its commands."""
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, package], check=True)
    return folder / "node_modules" / ".bin"


def claude_code(folder: Path, url: str) -> tuple[list, dict]:
    command = [npm(folder, "@anthropic-ai/claude-code") / "claude", "-p", "Hello!", "--output-format", "json"]
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "48"}
    return command, quiet | {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "unused", "ANTHROPIC_MODEL": "tiny"}


def codex(folder: Path, url: str) -> tuple[list, dict]:
    (folder / ".codex").mkdir()
    (folder / ".codex" / "config.toml").write_text(
        'model = "tiny"\nmodel_provider = "local"\napproval_policy = "never"\n[model_providers.local]\nname = "local"\n'
        f'base_url = "{url}/v1"\nwire_api = "responses"\nenv_key = "LOCAL_KEY"\n'
    )
    return [npm(folder, "@openai/codex") / "codex", "exec", "--skip-git-repo-check", "Hello!"], {"LOCAL_KEY": "unused"}


def opencode(folder: Path, url: str) -> tuple[list, dict]:
    models = {"tiny": {"name": "tiny", "limit": {"context": CONTEXT, "output": 64}}}
    options = {"baseURL": f"{url}/v1", "apiKey": "unused"}
    local = {"npm": "@ai-sdk/openai-compatible", "name": "local", "options": options, "models": models}
    settings = {"model": "local/tiny", "small_model": "local/tiny", "provider": {"local": local}}
    (config := folder / "opencode.json").write_text(json.dumps(settings))
    command = [npm(folder, "opencode-ai") / "opencode", "run", "--model", "local/tiny", "Hello!"]
    return command, {"OPENCODE_CONFIG": str(config)}


def qwen_code(folder: Path, url: str) -> tuple[list, dict]:
    (folder / ".qwen").mkdir()
    patient = {"timeout": SECONDS * 1000, "maxRetries": 1}
    settings = {"model": {"generationConfig": patient}, "contentGenerator": patient}
    (folder / ".qwen" / "settings.json").write_text(json.dumps(settings))
    command = [npm(folder, "@qwen-code/qwen-code") / "qwen", "--auth-type", "openai", "-p", "Hello!"]
    return command, {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "unused", "OPENAI_MODEL": "tiny"}


def litellm(folder: Path, url: str) -> tuple[list, dict]:
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "litellm"], check=True)
    return [python, "-c", f"URL = {url!r}\n{LITELLM}"], {}


CLIENTS = {
    "claude-code": claude_code,
    "codex": codex,
    "opencode": opencode,
    "qwen-code": qwen_code,
    "litellm": litellm,
}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server with the shipped model and a longer context; its URL."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = CONTEXT
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "tokenspeed.engine", "serve", "--model", model, "--port", "0"]
    command += ["--max-num-seqs", "4", "--served-model-name", "tiny"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        found = next(match for line in process.stderr if (match := SERVING.search(line)))
        log = (folder / "server.log").open("w")
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        yield found[1]
        log.close()
    finally:
        process.terminate()
        process.wait()


def try_client(client: str, home: Path, url: str) -> str:
    """Install a client, ask for one answer and print it; what went wrong, or nothing."""
    (home / "project").mkdir(parents=True)
    begin = time.monotonic()
    try:
        print(f"--- {client}: installing", flush=True)
        command, environment = CLIENTS[client](home, url)
        print(f"--- {client}: asking, at most {SECONDS} s", flush=True)
        done = subprocess.run(
            command,
            cwd=home / "project",
            env=os.environ | {"HOME": str(home), "PWD": str(home / "project")} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.CalledProcessError as error:
        return f"could not be installed: {error}"
    except subprocess.TimeoutExpired as error:
        return f"no answer after {SECONDS} s; so far: {(error.stdout or b'').decode(errors='replace')[-2000:]}"
    print(f"status {done.returncode} after {time.monotonic() - begin:.0f} s\n{done.stdout[-2000:]}")
    return done.stderr[-2000:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", nargs="*", help=f"{', '.join(CLIENTS)} (default: all)")
    wanted = parser.parse_args().client or list(CLIENTS)
    if unknown := [name for name in wanted if name not in CLIENTS]:
        parser.error(f"{unknown[0]!r} is unknown; it must be one of {', '.join(CLIENTS)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="tokenspeed-clients-") as name, server(Path(name)) as url:
        for client in wanted:
            if fault := try_client(client, Path(name) / client, url):
                failed.append(client)
                print(fault)
        print((Path(name) / "server.log").read_text())
    print(f"{len(wanted) - len(failed)} of {len(wanted)} clients got an answer; not: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
