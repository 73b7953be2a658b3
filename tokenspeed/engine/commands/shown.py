"""An assistant's turn as a terminal shows it."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..text.tools import Arguments, CallCut, CallFinished, CallStarted, Content
from ..text.turn import Reasoning, TurnEvent

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call in one line: `calc(a=12, op="+")`."""
    values = (f"{parameter}={json.dumps(value, ensure_ascii=False)}" for parameter, value in arguments.items())
    return f"{name}({', '.join(values)})"


class TurnPrinter:
    """Prints a turn as it comes: its content and its calls, a line each, to standard output; its reasoning, dimmed
    where that is a terminal, to standard error."""

    def __init__(self, reasoning: bool = True, indent: str = ""):
        """reasoning: show it; indent: put before every line but the first."""
        self._reasoning, self._indent = reasoning, indent
        self._dimmed = sys.stderr.isatty()
        self._last: type | None = None  # what was printed last
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}

    def show(self, events: Sequence[TurnEvent]) -> None:
        for event in events:
            match event:
                case Reasoning(text) if self._reasoning:
                    self._begin(Reasoning)
                    text = self._indented(text)
                    print(f"{_DIM}{text}{_PLAIN}" if self._dimmed else text, end="", file=sys.stderr, flush=True)
                case Content(text) | CallCut(_, text):
                    self._begin(Content)
                    print(self._indented(text), end="", flush=True)
                case CallStarted(index, name):
                    self._names[index], self._arguments[index] = name, []
                case Arguments(index, piece):
                    self._arguments[index].append(piece)
                case CallFinished(index):
                    self._begin(CallFinished)
                    arguments = json.loads("".join(self._arguments[index]))
                    print(self._indented(call_text(self._names[index], arguments)), end="", flush=True)

    def end(self) -> None:
        """The turn is over: ends the line that is open."""
        print(file=sys.stderr if self._last is Reasoning else sys.stdout, flush=True)

    def _begin(self, kind: type) -> None:
        if self._last is not None and (kind is not self._last or kind is CallFinished):
            print(end=self._indented("\n"), file=sys.stderr if self._last is Reasoning else sys.stdout, flush=True)
        self._last = kind

    def _indented(self, text: str) -> str:
        return text.replace("\n", "\n" + self._indent)
