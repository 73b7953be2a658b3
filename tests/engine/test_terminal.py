"""`chat` at a terminal: what is pasted is one message, and keys pressed meanwhile belong to nobody."""

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time
from tokenspeed.engine.commands import terminal
terminal.prepare()
print("ready")
while True:
    try:
        text = terminal.read_block(">>> ")
    except EOFError:
        break
    with terminal.keys_held():
        print("took", repr(text), flush=True)
        time.sleep(0.5)
        print("done", flush=True)
"""


class Typist:
    """A program at a terminal of its own. shown: everything it has written, with what the terminal echoed."""

    def __init__(self):
        self.shown = ""
        self._pid, self._terminal = pty.fork()
        if not self._pid:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM])

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def until(self, expected: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while expected not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.shown += os.read(self._terminal, 4096).decode(errors="replace")

    def close(self) -> None:
        end = time.monotonic() + 20
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < end, self.shown
            self.type("\x04")  # while an answer comes, it is dropped like every key
            time.sleep(0.1)
        os.close(self._terminal)


@pytest.fixture
def typist():
    found = Typist()
    found.until(">>> ")
    yield found
    found.close()


@pytest.mark.parametrize(
    "paste", ["one\ntwo\n\nthree\n", "\x1b[200~one\ntwo\n\nthree\x1b[201~\n"], ids=["plain", "bracketed"]
)
def test_a_pasted_block_is_one_message(typist, paste):
    typist.type(paste)
    typist.until("done")
    assert "took 'one\\ntwo\\n\\nthree'" in typist.shown and typist.shown.count("took") == 1


def test_keys_pressed_during_an_answer_are_neither_shown_nor_read(typist):
    typist.type("first\n")
    typist.until("took 'first'")
    typist.type("mixed in\nand more")
    typist.until("done\r\n")
    typist.shown = typist.shown.partition("took 'first'")[2]
    typist.until(">>> ")
    typist.type("second\n")
    typist.until("took 'second'")
    assert "mixed in" not in typist.shown and "and more" not in typist.shown
    typist.until("done")
