"""From a chat request to the engine's request, and from its updates to the parts of an assistant turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..frontend import Frontend
from ..request import Request, Update
from ..text.grammar import GrammarSpec
from ..text.history import TurnHistory
from ..text.messages import TOOL_CALL, check_tools
from ..text.reasoning import CLOSE, ReasoningSplitter
from ..text.tool_grammar import ToolGrammars
from ..text.tools import CallFinished, Content, Event, ToolCallParser, parse_answer


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the turn's reasoning."""

    text: str


TurnEvent = Event | Reasoning


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat endpoint was asked, whichever API it came by.

    tool_choice, parallel_tool_calls, response_format: as OpenAI's; marks: messages whose ends are snapshot boundaries;
    sampling: fields of SamplingParams that were given.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    sampling: dict[str, Any]
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    marks: tuple[int, ...] = ()
    enable_thinking: bool | None = None
    template_kwargs: Mapping[str, bool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncate_prompt_tokens: int | None = None
    name_space: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """A conversation ready for the engine. reasoning: whether the turn begins inside reasoning; restored: turns of the
    history that were put back as generated; parsed: the tools whose calls are looked for, None for none."""

    request: Request
    grammar: GrammarSpec | None
    reasoning: bool
    restored: int
    parsed: list[dict[str, Any]] | None


def prepare(
    frontend: Frontend, tools: ToolGrammars, history: TurnHistory | None, id: str, chat: Conversation, room: int
) -> PreparedTurn:
    """room: tokens of prompt and answer at most. Raises RequestError for what cannot be asked."""
    if chat.continue_final_message and chat.add_generation_prompt:
        raise RequestError("continue_final_message needs add_generation_prompt to be false; both are true.")
    encoded = frontend.template.encode(
        chat.messages,
        chat.tools,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        enable_thinking=chat.enable_thinking,
        template_kwargs=chat.template_kwargs,
        marks=chat.marks,
        name_space=chat.name_space,
    )
    ids, boundaries, restored = encoded.ids, list(encoded.boundaries), 0
    if history is not None:

        def same(spelled: Sequence[int], generated: Sequence[int]) -> bool:
            one, other = (frontend.tokenizer.decode(ids, skip_special_tokens=False) for ids in (spelled, generated))
            return any(
                parse_answer(one, chat.tools, reasoning) == parse_answer(other, chat.tools, reasoning)
                for reasoning in (True, False)
            )

        ids, boundaries, restored = history.restore(chat.name_space, ids, boundaries, same)
    if chat.truncate_prompt_tokens is not None and len(ids) > chat.truncate_prompt_tokens:
        cut = len(ids) - chat.truncate_prompt_tokens
        ids, boundaries = ids[cut:], [count - cut for count in boundaries if count > cut]
    spec = _grammar(tools, chat, encoded.reasoning_open)
    sampling = dict(chat.sampling)
    if sampling.get("max_tokens") is None:
        sampling["max_tokens"] = max(room - len(ids), 1)
    if chat.tool_choice == "none":
        sampling["bad_words"] = [*(sampling.get("bad_words") or ()), TOOL_CALL]
    params = frontend.sampling_params(**sampling)
    request = Request(id, tuple(ids), params, tuple(boundaries), chat.name_space, chat.priority, encoded.kept_with)
    parsed = chat.tools if chat.tools and chat.tool_choice != "none" else None
    return PreparedTurn(request, spec, encoded.reasoning_open, restored, parsed)


def _grammar(tools: ToolGrammars, chat: Conversation, reasoning: bool) -> GrammarSpec | None:
    answer = tools.response_format(chat.response_format, reasoning) if chat.response_format else None
    calls = tools.spec(check_tools(chat.tools) or [], chat.tool_choice, chat.parallel_tool_calls, reasoning)
    if answer and calls and chat.tool_choice != "auto":
        raise RequestError("response_format and a tool_choice that demands a call contradict each other; give one.")
    return answer or calls


class TurnParser:
    """One continuation's text taken apart as it comes, and its tokens counted."""

    def __init__(self, frontend: Frontend, prepared: PreparedTurn):
        self._splitter = ReasoningSplitter(prepared.reasoning)
        self._calls = None if prepared.parsed is None else ToolCallParser(prepared.parsed)
        self._close_id = frontend.tokenizer.token_to_id(CLOSE)
        self._in_reasoning = prepared.reasoning
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.called = False  # whether a tool call is complete

    def push(self, update: Update) -> list[TurnEvent]:
        """What an update makes certain; with the last one, all that is left."""
        for id in update.ids:
            self.ids.append(id)
            self.reasoning_tokens += self._in_reasoning
            self._in_reasoning &= id != self._close_id
        events = self._take(self._splitter.push(update.text))
        if update.finish_reason:
            events += self._take(self._splitter.finish())
            events += self._calls.finish() if self._calls else []
        # What was announced as a call and is none stays what it is to the client: a call that was cut.
        self.called |= any(isinstance(event, CallFinished) for event in events)
        return events

    def _take(self, split) -> list[TurnEvent]:
        events: list[TurnEvent] = [Reasoning(split.reasoning)] if split.reasoning else []
        if split.content:
            events += self._calls.push(split.content) if self._calls else [Content(split.content)]
        return events
