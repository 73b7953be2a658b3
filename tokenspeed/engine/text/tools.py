"""The tool calls in an assistant turn's content, in Qwen3.5's XML, as the text comes."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .argument_types import TEXT, Domain, argument_schema, domain, is_text, read
from .call_tags import (
    ANY_MARK,
    ANY_START,
    ARGUMENT_START,
    CALL,
    CALL_END,
    CALL_ENDS,
    CALL_START,
    CLOSES,
    FUNCTION,
    FUNCTION_END,
    MAX_NAME,
    MAY_BE_ARGUMENT,
    MAY_END,
    NEXT_ARGUMENT,
    OPENS,
    OPENS_BARE,
    VALUE_END,
    VALUE_MARK,
)
from .reasoning import Trimmer, partial

_TELLING = 8  # characters of a value that tell whether it can be anything but a string


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the turn that is no call. at: where in the turn's generated text it begins and ends; white space at its
    start that stands before a call lies outside."""

    text: str
    at: tuple[int, int] = field(default=(0, 0), compare=False)


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

    Calls of the request's own tools are also found where tags are missing:
    - `<tool_call>`, where `<function=NAME>` begins a line or follows another call;
    - `</function>` before `</tool_call>`;
    - `</parameter>` before a line that begins with `<parameter=NAME>`, of a name the schema has and that is not used
      yet;
    - the last `</parameter>`, where nothing, or another call, follows `</function>` or `</tool_call>`.
    """

    def __init__(
        self,
        tools: Sequence[dict[str, Any]] | None = None,
        resumed: bool = False,
        only_offered: bool = False,
        exact: bool = False,
    ):
        """tools: the request's definitions, in OpenAI's form or the bare functions. resumed: the content goes on with
        what stands before it, so its first white space counts. only_offered: calls of other names are content. exact:
        no tag is missing, as under a grammar."""
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._parameters = {function["name"]: function.get("parameters") for function in functions}
        self._recovers = bool(functions) and not exact
        self._only_offered = only_offered
        self._state = self._content
        self._text = ""  # not told yet from `_at` on
        self._at = 0
        self._taken = 0  # characters before `_text`
        self._line = resumed  # whether the content's last line has more than white space
        self._told = Trimmer(resumed)
        self._run = self._run_end = 0  # where in the text its latest content without a call between lies
        self._events: list[Event] = []
        self._calls = 0
        self._call = _Call(None, False)
        self.content_at: int | None = None  # where in the text the first content that is no white space stands

    def skip(self, size: int) -> None:
        """So many characters of the turn come before what is pushed; they are no content."""
        self._taken += size

    def push(self, text: str) -> list[Event]:
        """What `text` makes certain."""
        return self._read(text, final=False)

    def finish(self) -> list[Event]:
        """What is left at the end of the turn."""
        events = self._read("", final=True)
        if self._call.raw:
            events.append(CallCut(self._calls - 1, self._told.push("".join((*self._call.raw, self._text)))))
        return events

    def _read(self, text: str, final: bool) -> list[Event]:
        self._text += text
        self._events = []
        while self._state(final):
            pass
        self._taken += self._at
        self._text, self._at = self._text[self._at :], 0
        return self._events

    # Each state takes what it can from the front of the text and says whether to go on.

    def _content(self, final: bool) -> bool:
        start = (ANY_START if self._recovers else CALL_START).search(self._text, self._at)
        if start is None:
            tags = (CALL, FUNCTION) if self._recovers else (CALL,)
            held = 0 if final else max(partial(self._text, tag) for tag in tags)
            self._tell(self._take(len(self._text) - held))
            return False
        self._tell(self._take(start.start()))
        bare = start[0] == FUNCTION
        if bare and self._line:
            return self._pass_over(FUNCTION)
        opens = OPENS_BARE if bare else OPENS
        match = opens.match(self._text, self._at)
        if match is None:
            waits = not final and opens.may_match(self._text, self._at)
            return not waits and self._pass_over(start[0])
        name, argument, call_end = match.groups()
        offered = name in self._parameters
        recovers = offered and self._recovers
        if (not recovers and (bare or call_end)) or (not offered and self._only_offered):
            return self._pass_over(start[0])
        self._call = _Call(self._parameters.get(name), recovers)
        self._events.append(CallStarted(self._calls, name))
        self._calls += 1
        self._call.raw.append(self._take(match.end()))
        self._open(argument, bool(call_end))
        return True

    def _pass_over(self, tag: str) -> bool:
        """A tag that is content."""
        self._tell(self._take(self._at + len(tag)))
        return True

    def _value_start(self, final: bool) -> bool:
        if self._at == len(self._text):
            return False
        self._call.line_start = self._text[self._at] == "\n"
        if self._call.line_start:
            self._call.raw.append(self._take(self._at + 1))
        self._state = self._value
        return True

    def _value(self, final: bool) -> bool:
        marks = ANY_MARK if self._call.recovers else VALUE_MARK
        mark = marks.search(self._text, self._at)
        tags = (VALUE_END, ARGUMENT_START, FUNCTION_END, CALL_END) if self._call.recovers else (VALUE_END,)
        held = 0 if final or mark else max(partial(self._text, tag) for tag in tags)
        known = mark.start() if mark else len(self._text) - held
        self._add(known - self._text.endswith("\n", self._at, known))
        if mark is None:
            return False
        if mark[0] == VALUE_END:
            return self._value_end(mark.end(), final)
        if mark[0] == ARGUMENT_START:
            return self._next_argument(mark, final)
        return self._call_ends(mark, final)

    def _value_end(self, end: int, final: bool) -> bool:
        """At `</parameter>`."""
        match = CLOSES.match(self._text, self._at)
        if match is None and not final and CLOSES.may_match(self._text, self._at):
            return False
        argument, call_end = match.groups() if match else (None, None)
        if match is None or argument in self._call.names or (call_end and not self._call.recovers):
            self._add(end)
            return True
        self._call.raw.append(self._take(match.end()))
        self._argue(self._call.value_end())
        self._open(argument, bool(call_end))
        return True

    def _next_argument(self, mark: re.Match[str], final: bool) -> bool:
        """At `<parameter=` inside a value."""
        begins_line = mark.start() > self._at or (self._call.line_start and not self._call.has_value)
        match = NEXT_ARGUMENT.match(self._text, mark.start()) if begins_line else None
        if match is None:
            if begins_line and not final and MAY_BE_ARGUMENT.fullmatch(self._text, mark.start()):
                return False
        elif self._call.may_begin(match[1]):
            self._call.raw.append(self._take(match.end()))
            self._argue(self._call.value_end())
            self._open(match[1], False)
            return True
        self._add(mark.end())
        return True

    def _call_ends(self, mark: re.Match[str], final: bool) -> bool:
        """At `</function>` or `</tool_call>` inside a value."""
        match = CALL_ENDS.match(self._text, self._at)
        if match and (match[2] in self._parameters if match[3] is None else final):
            self._call.raw.append(self._take(match.end(1)))
            self._argue(self._call.value_end())
            self._open(None, True)
            return True
        if not final and MAY_END.fullmatch(self._text, self._at):
            return False
        self._add(mark.end())
        return True

    def _call_end(self, final: bool) -> bool:
        """The closing tag and the white space before it belong to the call."""
        rest = self._text[self._at : self._at + MAX_NAME + len(CALL_END)]
        tag = rest.lstrip()
        if len(tag) < len(CALL_END) and CALL_END.startswith(tag) and len(rest) - len(tag) <= MAX_NAME:
            return False  # at the end of the turn: a closing tag cut short, which is no content
        if tag.startswith(CALL_END):
            self._take(self._at + len(rest) - len(tag) + len(CALL_END))
        self._state = self._content
        return True

    def _open(self, argument: str | None, ended: bool) -> None:
        """Goes on with the argument, or, where there is none, with the end of the call; ended: that has been read."""
        if argument is not None:
            self._argue(self._call.argument_start(argument))
            self._state = self._value_start
            return
        self._argue("}" if self._call.names else "{}")
        self._events.append(CallFinished(self._calls - 1))
        self._call.raw.clear()
        self._line = False
        self._state = self._content if ended else self._call_end

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
        if self.content_at is None and (body := text.lstrip()):
            self.content_at = self._taken + self._at - len(body)
        newline = text.rfind("\n")
        self._line = bool(text[newline + 1 :].strip()) or (self._line and newline < 0)
        end = self._taken + self._at
        if end - len(text) != self._run_end:
            self._run = end - len(text)
        self._run_end = end
        if told := self._told.push(text):
            end -= len(text) - len(text.rstrip())
            self._events.append(Content(told, (max(end - len(told), self._run), end)))


class _Call:
    """The call being read. recovers: tags may be missing; raw: its text so far; names: of its arguments so far;
    line_start: the value began on a line of its own; has_value: with any text. The methods give JSON text."""

    def __init__(self, parameters: Any, recovers: bool):
        self._parameters, self.recovers = parameters, recovers
        self.raw: list[str] = []
        self.names: set[str] = set()
        self.line_start = self.has_value = False
        self._admitted: Domain = TEXT
        self._buffer: list[str] = []
        self._start = ""  # of the value, once it is more than white space
        self._streams: bool | None = None  # None: not known yet

    def may_begin(self, name: str) -> bool:
        """Whether an argument of this name may come: the schema has it, and it has not come."""
        properties = self._parameters.get("properties") if isinstance(self._parameters, dict) else None
        return isinstance(properties, dict) and name in properties and name not in self.names

    def argument_start(self, name: str) -> str:
        comma = ", " if self.names else "{"
        self.names.add(name)
        self._admitted = domain(argument_schema(self._parameters, name), self._parameters)
        self._buffer, self._start, self._streams, self.has_value = [], "", None, False
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: "

    def value_text(self, text: str) -> str:
        if self._streams:
            return json.dumps(text, ensure_ascii=False)[1:-1]
        if text:
            self._buffer.append(text)
            self.has_value = True
        if text and self._streams is None and len(self._start) < _TELLING:
            self._start = (self._start + text).lstrip()[:_TELLING]
            self._streams = is_text(self._admitted, self._start)
            if self._streams:
                return json.dumps("".join(self._buffer), ensure_ascii=False)[:-1]
        return ""

    def value_end(self) -> str:
        return '"' if self._streams else read("".join(self._buffer), self._admitted)
