"""What an assistant turn says: its reasoning, its content and its tool calls, as the text comes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .call_tags import CALL
from .reasoning import ReasoningSplitter, partial
from .tools import Arguments, CallCut, CallStarted, Content, Event, ToolCallParser

_CHUNK = 64  # characters a candidate for a call is given at a time, so that one that is none costs no more


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the turn's reasoning."""

    text: str


TurnEvent = Event | Reasoning


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


class AnswerParser:
    """Takes a turn apart as its text comes. The events, joined, are the same wherever the text is cut; never raises.

    Complete calls of the request's tools that end a turn whose reasoning was never closed are calls, no reasoning.
    """

    def __init__(
        self,
        reasoning: bool,
        tools: Sequence[dict[str, Any]] | None = None,
        resumed: bool = False,
        exact: bool = False,
    ):
        """reasoning: whether the prompt left a `<think>` open (`reasoning.leaves_reasoning_open`). tools: as
        ToolCallParser takes them; None: no calls are looked for. resumed: the turn goes on with content in the
        prompt. exact: no tag is missing, as under a grammar."""
        self._splitter = ReasoningSplitter(reasoning)
        self._pushed = 0  # characters
        self._content_begun = False
        self._thought = _Thought(tools) if tools and not exact else None
        self._calls = None if tools is None else ToolCallParser(tools, resumed, exact=exact)

    def push(self, text: str) -> list[TurnEvent]:
        """What `text` makes certain."""
        self._pushed += len(text)
        return self._take(self._splitter.push(text))

    def finish(self) -> list[TurnEvent]:
        """What is left at the end of the turn."""
        events = self._take(self._splitter.finish())
        if self._thought and self._splitter.inside:
            return events + self._thought.finish()
        return events + (self._calls.finish() if self._calls else [])

    def _take(self, split) -> list[TurnEvent]:
        reasoning = split.reasoning
        if self._thought:
            reasoning = self._thought.push(reasoning)
            if not self._splitter.inside:
                reasoning += self._thought.release()
        events: list[TurnEvent] = [Reasoning(reasoning)] if reasoning else []
        if split.content:
            begin = self._pushed - len(split.content)  # the splitter holds back no content behind this
            if self._calls:
                if not self._content_begun:
                    self._calls.skip(begin)
                events += self._calls.push(split.content)
            else:
                events.append(Content(split.content, (begin, self._pushed)))
            self._content_begun = True
        return events


class _Thought:
    """Reasoning in which calls, and nothing else, may end the turn. What may be one is held back until it is told."""

    def __init__(self, tools: Sequence[dict[str, Any]]):
        self._tools = tools
        self._parser: ToolCallParser | None = None
        self._events: list[Event] = []
        self._held: list[str] = []  # with a parser, what it was given, and the white space before that

    def push(self, text: str) -> str:
        """What is reasoning for certain. `text` does not end in white space."""
        told: list[str] = []
        at = 0  # what is before it is told or held
        while at < len(text):
            if self._parser is None:
                if self._held:
                    text, at, self._held = "".join((*self._held, text[at:])), 0, []
                start = text.find(CALL, at)
                known = len(text) - partial(text, CALL) if start < 0 else start
                if known < len(text):
                    known = at + len(text[at:known].rstrip())
                told.append(text[at:known])
                if start < 0:
                    self._held = [text[known:]] if known < len(text) else []
                    break
                self._held, at = [text[known:start]], start
                self._parser, self._events = ToolCallParser(self._tools, only_offered=True), []
            piece = text[at : at + _CHUNK]
            at += len(piece)
            self._events += self._parser.push(piece)
            self._held.append(piece)
            if self._parser.content_at is not None:
                space, given = self._held[0], "".join(self._held[1:])
                told += (space, given[: max(self._parser.content_at, 1)])
                rest = given[max(self._parser.content_at, 1) :]
                self._parser, self._held = None, []
                if len(rest) <= at:
                    at -= len(rest)
                else:  # it came with an earlier piece
                    text, at = rest + text[at:], 0
        return "".join(told)

    def release(self) -> str:
        """What was held back, once it is known to be reasoning."""
        held, self._parser, self._held = "".join(self._held), None, []
        return held

    def finish(self) -> list[TurnEvent]:
        """What was held back at the end of a turn without an end of its reasoning."""
        if self._parser:
            events = self._events + self._parser.finish()
            if self._parser.content_at is None and not any(isinstance(event, CallCut) for event in events):
                return events
        held = self.release()
        return [Reasoning(held)] if held else []


@dataclass(slots=True)
class TurnText:
    """A turn's events put together. Calls: by their number in the turn, in their order."""

    _reasoning: list[str] = field(default_factory=list)
    _content: list[str] = field(default_factory=list)
    _calls: dict[int, tuple[str, list[str]]] = field(default_factory=dict)

    def add(self, events: Iterable[TurnEvent]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self._reasoning.append(text)
                case Content(text):
                    self._content.append(text)
                case CallStarted(index, name):
                    self._calls[index] = name, []
                case Arguments(index, piece):
                    self._calls[index][1].append(piece)
                case CallCut(index, text):
                    del self._calls[index]
                    self._content.append(text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def calls(self) -> list[tuple[str, str]]:
        """The name and the JSON arguments of each call."""
        return [(name, "".join(pieces)) for name, pieces in self._calls.values()]

    def answer(self, finished: bool = True) -> Answer:
        """finished: the turn has ended; of one that has not, the calls are left out."""
        calls = tuple(ToolCall(name, json.loads(arguments)) for name, arguments in self.calls) if finished else ()
        return Answer(self.reasoning, self.content, calls)


def parse_answer(
    text: str, tools: Sequence[dict[str, Any]] | None = None, reasoning: bool = True, exact: bool = False
) -> Answer:
    """Take a whole assistant turn apart. Never raises: what is no complete call is content.

    text: without the end-of-turn token. tools, reasoning, exact: as AnswerParser takes them.
    """
    parser, turn = AnswerParser(reasoning, tools, exact=exact), TurnText()
    turn.add(parser.push(text))
    turn.add(parser.finish())
    return turn.answer()
