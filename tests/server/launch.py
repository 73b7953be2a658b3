"""A server in processes of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
SERVING = re.compile(r"serving \S+ at (http://\S+)/v1")


class Server:
    """`serve` with options, on a free port. url: without /v1; log: the lines it has written so far."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "tokenspeed.engine", "serve", "--port", "0", "--threads", "1", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._found = threading.Event()
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        assert self._found.wait(START_SECONDS) and self.url, "".join(self.log)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if match := SERVING.search(line):
                self.url = match[1]
                self._found.set()
        self._found.set()

    def engine_pid(self) -> int:
        """The engine process: the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(pid) for pid in children if "server.process" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(found) == 1, found
        return found[0]

    def gauges(self) -> dict[str, float]:
        """The metrics without labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#") and "{" not in line]
        return {name.removeprefix("tokenspeed_"): float(value) for name, value in lines}

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)
