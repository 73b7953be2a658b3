"""How a server ends: nobody stays behind, and whoever waits is told."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import pytest
from launch import ROOT, Server

from tokenspeed.engine.server import folders
from tokenspeed.engine.server.folders import OwnFolder

LONG = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}


def python(code, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, **options)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_a_process_that_holds_the_interpreter_ends_with_its_parent():
    parent = python(
        """
        import subprocess, sys, time
        child = '''
        import os, re
        from tokenspeed.engine.server.lifeline import end_with_parent
        end_with_parent(os.getppid())
        print(os.getpid(), flush=True)
        re.match("(a+)+b", "a" * 60)  # for ever, without letting another thread run
        '''
        import textwrap
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(child)])
        time.sleep(600)
        """,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert alive(child)
    parent.kill()
    parent.wait()
    assert gone_within(child, 10)


def test_the_engine_and_the_grammar_process_end_with_a_server_that_is_killed():
    server = Server()
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert len(children) == 2
    patterns = {"allOf": [{"type": "string", "pattern": f".*x{i}.*"} for i in range(20)]}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": patterns}}
    bomb = {"prompt": "a", "response_format": format}

    def ask():
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{server.url}/v1/completions", json=bomb, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    server.process.kill()
    server.process.wait()
    asking.join()
    assert all(gone_within(int(pid), 10) for pid in children)


def stream_to_its_end(server, read, tokens):
    body = LONG | {"max_tokens": tokens}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            read.append(line)


def started(server, tokens=4000):
    read: list[str] = []
    reader = threading.Thread(target=stream_to_its_end, args=(server, read, tokens))
    reader.start()
    while not read:
        time.sleep(0.01)
    return reader, read


def test_a_stream_that_the_drain_cuts_is_told():
    server = Server("--drain-seconds", "0.3", "--max-num-seqs", "1")
    reader, read = started(server)
    waiting: list[int] = []  # behind it in the engine's queue: it has no answer at all yet
    ask = lambda: waiting.append(httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60).status_code)  # noqa: E731
    other = threading.Thread(target=ask)
    other.start()
    while server.gauges()["requests_in_flight"] < 2:
        time.sleep(0.01)
    assert server.stop() == 0
    reader.join()
    other.join()
    lines = [line for line in read if line]
    assert lines[-2] == "event: error" and "the server ended before the request did" in lines[-1]
    assert waiting == [503]


def test_a_second_signal_ends_at_once():
    server = Server("--drain-seconds", "600")
    reader, _ = started(server)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    start = time.monotonic()
    assert server.process.poll() is None
    assert server.stop() == 0 and time.monotonic() - start < 5
    reader.join()


def test_ctrl_c_in_the_terminal_lets_the_engine_finish_too():
    server = Server()
    reader, read = started(server, tokens=200)
    os.kill(server.engine_pid(), signal.SIGINT)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    reader.join()
    assert read[-2] == "data: [DONE]"


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(folders.tempfile, "tempdir", str(tmp_path))
    code = """
        import time
        from tokenspeed.engine.server.folders import OwnFolder
        print(OwnFolder().path, flush=True)
        time.sleep(600)
        """
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    owners = [python(code, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    dead, living = (Path(owner.stdout.readline().strip()) for owner in owners)
    (dead / "engine.sock").touch()
    (tmp_path / "tokenspeed-of-somebody").mkdir()
    owners[0].kill()
    owners[0].wait()
    own = OwnFolder()
    assert not dead.exists() and living.exists() and (tmp_path / "tokenspeed-of-somebody").exists()
    assert own.path.stat().st_mode & 0o777 == 0o700
    own.remove()
    owners[1].kill()
    owners[1].wait()
    assert not own.path.exists()


def test_a_log_that_nobody_reads_stalls_nothing():
    code = """
        import logging, sys, time
        from tokenspeed.engine.server.log import Log
        lines = Log()
        for number in range(30_000):
            logging.getLogger("x").info("line %d %s", number, "y" * 100)
        print("done", flush=True)
        sys.stdin.readline()
        time.sleep(0.5)
        logging.getLogger("x").info("afterwards")
        lines.flush()
        """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python(code, text=True, **pipes)
    assert process.stdout.readline() == "done\n"
    _, written = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert "line 0 y" in written and "lines were dropped" in written and "afterwards" in written
    unread = python(code, text=True, **pipes)
    unread.stdin.close()
    assert unread.wait(60) == 0, "it ends although its last lines are never taken"


WRONG = [
    (("--port", "99999"), "--port is 99999; it must be from 0 to 65535"),
    (("--port", "-1"), "--port is -1"),
    (("--max-requests", "0"), "--max-requests is 0; it must be at least 1"),
    (("--max-requests", "-3"), "--max-requests is -3"),
    (("--max-body-mib", "0"), "--max-body-mib is 0; it must be from 1"),
    (("--request-timeout", "nan"), "--request-timeout is nan; it must be a time > 0"),
    (("--request-timeout", "0"), "--request-timeout is 0.0"),
    (("--request-timeout", "inf"), "--request-timeout is inf"),
    (("--drain-seconds", "nan"), "--drain-seconds is nan; it must be a time >= 0"),
    (("--drain-seconds", "-1"), "--drain-seconds is -1.0"),
    (("--max-num-seqs", "0"), "max_num_seqs is 0"),
    (("--kv-pages", "-4"), "kv_pages is -4"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_options_that_mean_nothing_are_refused(options, expected, capsys):
    from tokenspeed.engine.__main__ import main

    assert main(["serve", *options]) == 1
    assert expected in capsys.readouterr().err
