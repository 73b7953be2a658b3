"""What an assistant turn says: its reasoning, its text, and the tool calls in Qwen3.5's XML, as the text comes."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .argument_types import TEXT, Domain, argument_schema, domain, is_text, read
from .reasoning import ReasoningSplitter, partial

_MAX_NAME = 256  # characters of a function's or argument's name, and of white space between two tags
_CALL, _CALL_END, _VALUE_END = "<tool_call>", "</tool_call>", "</parameter>"
# Patterns as their atoms, so that `_beginning` can tell what may still become a match.
_NAME = [rf"([^>\n]{{1,{_MAX_NAME}}})", ">"]
_GAP = [rf"\s{{0,{_MAX_NAME}}}"]
_ARGUMENT = [*_GAP, *"<parameter=", *_NAME]
_FUNCTION_END = [*_GAP, *"</function>"]
_OPENING = [*_CALL, *_GAP, *"<function=", *_NAME]
_CLOSING = ["\n?", *_VALUE_END]


def _whole(atoms: list[str]) -> re.Pattern[str]:
    return re.compile(f"{''.join(atoms)}(?:{''.join(_ARGUMENT)}|{''.join(_FUNCTION_END)})")


def _beginning(atoms: list[str]) -> re.Pattern[str]:
    """For fullmatch: what more text may make a match of `_whole(atoms)`."""

    def nested(atoms: list[str], end: str) -> str:
        for atom in reversed(atoms):
            end = f"(?:{atom}{end})?"
        return end

    return re.compile(nested(atoms, f"(?:{nested(_ARGUMENT, '')}|{nested(_FUNCTION_END, '')})"))


_OPENS, _MAY_OPEN = _whole(_OPENING), _beginning(_OPENING)
_CLOSES, _MAY_CLOSE = _whole(_CLOSING), _beginning(_CLOSING)


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the turn that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The call number `index` of this turn, counted from 0, calls the function `name`."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments: the pieces of one call, joined, are the JSON text of an object."""

    index: int
    json: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    """The call's arguments are complete."""

    index: int


@dataclass(frozen=True, slots=True)
class CallCut:
    """The turn ended inside the call, so it is none: its arguments stay unfinished, and `text`, what the model wrote
    of it, is the last of the turn's content for whoever has not passed its start on."""

    index: int
    text: str


Event = Content | CallStarted | Arguments | CallFinished | CallCut


class ToolCallParser:
    """Finds the calls in a turn's content. The events, joined, are the same wherever the text is cut; never raises.

    A call is `<tool_call><function=NAME>`, arguments, `</function>` and, where it is there, `</tool_call>`; an argument
    is `<parameter=NAME>`, its value, `</parameter>`, where one newline at either end of the value is not its own. All
    else is content. A value ends at the first `</parameter>` that another argument, of a name not used yet, or
    `</function>` follows: any other tag inside it is its text. The tool's schema gives a value its type
    (`argument_types`); strings are passed on as they come, other values when they are complete.
    White space at both ends of the content is dropped.
    """

    def __init__(self, tools: Sequence[dict[str, Any]] | None = None):
        """tools: the request's definitions, in OpenAI's form or the bare functions. Other names may be called too."""
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._parameters = {function["name"]: function.get("parameters") for function in functions}
        self._state = self._content
        self._text = ""  # not told yet from `_at` on
        self._at = 0
        self._space = ""  # white space that follows the content told so far
        self._has_content = False
        self._events: list[Event] = []
        self._calls = 0
        self._call = _Call(None)

    def push(self, text: str) -> list[Event]:
        """What `text` makes certain."""
        return self._run(text, final=False)

    def finish(self) -> list[Event]:
        """What is left at the end of the turn."""
        events = self._run("", final=True)
        if self._call.raw:
            events.append(CallCut(self._calls - 1, self._as_content("".join((*self._call.raw, self._text)))))
        return events

    def _run(self, text: str, final: bool) -> list[Event]:
        self._text += text
        self._events = []
        while self._state(final):
            pass
        self._text, self._at = self._text[self._at :], 0
        return self._events

    # Each state takes what it can from the front of the text and says whether to go on.

    def _content(self, final: bool) -> bool:
        start = self._text.find(_CALL, self._at)
        if start < 0:
            self._tell(self._take(len(self._text) - (0 if final else partial(self._text, _CALL))))
            return False
        self._tell(self._take(start))
        match = _OPENS.match(self._text, start)
        if match is None:
            if not final and _MAY_OPEN.fullmatch(self._text, start):
                return False
            self._tell(self._take(start + len(_CALL)))
            return True
        self._call = _Call(self._parameters.get(match[1]))
        self._events.append(CallStarted(self._calls, match[1]))
        self._calls += 1
        self._call.raw.append(self._take(match.end()))
        self._open(match[2])
        return True

    def _value_start(self, final: bool) -> bool:
        if self._at == len(self._text):
            return False
        if self._text[self._at] == "\n":
            self._call.raw.append(self._take(self._at + 1))
        self._state = self._value
        return True

    def _value(self, final: bool) -> bool:
        end = self._text.find(_VALUE_END, self._at)
        known = end if end >= 0 else len(self._text) - (0 if final else partial(self._text, _VALUE_END))
        self._add(known - self._text.endswith("\n", self._at, known))
        if end < 0:
            return False
        match = _CLOSES.match(self._text, self._at)
        if match is None and not final and _MAY_CLOSE.fullmatch(self._text, self._at):
            return False
        if match is None or match[1] in self._call.names:
            self._add(end + len(_VALUE_END))
        else:
            self._call.raw.append(self._take(match.end()))
            self._argue(self._call.value_end())
            self._open(match[1])
        return True

    def _call_end(self, final: bool) -> bool:
        """The closing tag and the white space before it belong to the call."""
        rest = self._text[self._at : self._at + _MAX_NAME + len(_CALL_END)]
        tag = rest.lstrip()
        if len(tag) < len(_CALL_END) and _CALL_END.startswith(tag) and len(rest) - len(tag) <= _MAX_NAME:
            return False  # at the end of the turn: a closing tag cut short, which is no content
        if tag.startswith(_CALL_END):
            self._take(self._at + len(rest) - len(tag) + len(_CALL_END))
        self._state = self._content
        return True

    def _open(self, argument: str | None) -> None:
        """Goes on with the argument, or, where there is none, with the end of the call."""
        if argument is not None:
            self._argue(self._call.argument_start(argument))
            self._state = self._value_start
            return
        self._argue("}" if self._call.names else "{}")
        self._events.append(CallFinished(self._calls - 1))
        self._call.raw.clear()
        self._state = self._call_end

    def _add(self, end: int) -> None:
        """The text up to `end` is the value's."""
        text = self._take(end)
        self._call.raw.append(text)
        self._argue(self._call.value_text(text))

    def _argue(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self._calls - 1, text))

    def _take(self, end: int) -> str:
        taken, self._at = self._text[self._at : end], end
        return taken

    def _tell(self, text: str) -> None:
        if told := self._as_content(text):
            self._events.append(Content(told))

    def _as_content(self, text: str) -> str:
        """`text` where white space waits for what follows it, so that none is told at the ends."""
        body = text.rstrip()
        if not body:
            self._space += text
            return ""
        told = self._space + body if self._has_content else body.lstrip()
        self._has_content = True
        self._space = text[len(body) :]
        return told


class _Call:
    """The call being read. raw: its text so far; names: of its arguments so far. The methods give JSON text."""

    def __init__(self, parameters: Any):
        self._parameters = parameters
        self.raw: list[str] = []
        self.names: set[str] = set()
        self._admitted: Domain = TEXT
        self._buffer: list[str] = []
        self._streams: bool | None = None  # None: not known yet

    def argument_start(self, name: str) -> str:
        comma = ", " if self.names else "{"
        self.names.add(name)
        self._admitted = domain(argument_schema(self._parameters, name), self._parameters)
        self._buffer, self._streams = [], None
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: "

    def value_text(self, text: str) -> str:
        if self._streams:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        if text:
            self._buffer.append(text)
        if text and self._streams is None:
            start = "".join(self._buffer)
            self._streams = is_text(self._admitted, start)
            if self._streams:
                return json.dumps(start, ensure_ascii=False)[:-1]
        return ""

    def value_end(self) -> str:
        return '"' if self._streams else read("".join(self._buffer), self._admitted)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """name: the function; arguments: its values by parameter, typed by the tool's schema where one is given."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn taken apart."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]

    def message(self) -> dict[str, Any]:
        """The turn as a chat message, to be sent back in the history."""
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls]
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        return message | ({"tool_calls": calls} if calls else {})


def parse_answer(text: str, tools: Sequence[dict[str, Any]] | None = None, reasoning: bool = True) -> Answer:
    """Take a whole assistant turn apart. Never raises: what is no complete call is content.

    text: without the end-of-turn token. tools: as ToolCallParser takes them. reasoning: whether the prompt left a
    `<think>` open (`reasoning.leaves_reasoning_open`).
    """
    splitter, parser = ReasoningSplitter(reasoning), ToolCallParser(tools)
    first, last = splitter.push(text), splitter.finish()
    events = [*parser.push(first.content + last.content), *parser.finish()]
    return Answer(first.reasoning + last.reasoning, *collect(events))


def collect(events: Iterable[Event]) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the complete calls of a whole turn's events."""
    content: list[str] = []
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case CallStarted(index, name):
                names[index], arguments[index] = name, ""
            case Arguments(index, piece):
                arguments[index] += piece
            case CallCut(index, text):
                del names[index]
                content.append(text)
    calls = (ToolCall(name, json.loads(arguments[index])) for index, name in names.items())
    return "".join(content), tuple(calls)
