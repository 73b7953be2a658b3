"""A conversation on its way into the engine, and its answer on its way out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import RequestError
from ..request import Acceptance, Request, SamplingParams, Update
from ..text.frontend import Frontend
from ..text.grammar import GrammarSpec
from ..text.history import TurnHistory
from ..text.messages import TOOL_CALL
from ..text.reasoning import CLOSE
from ..text.template import EncodedPrompt
from ..text.tool_grammar import ToolGrammars
from ..text.tools import CallFinished
from ..text.turn import AnswerParser, TurnEvent, parse_answer
from .conversation import Conversation
from .formats import Format

_TOOL_FIELDS = ("name", "description", "parameters", "strict")
_NOT_STRICT = ("strict", False)


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """A conversation ready for the engine.

    format: what the turn was asked to look like, None for any text (`Turns.grammar`); reasoning: whether the
    turn begins inside reasoning; resumed: whether it goes on with content that the prompt ends
    in; restored: turns of the history that were put back as generated; tools: those whose calls are looked for, None
    for none; close_id: of `</think>`, None where the tokenizer has none.
    """

    request: Request
    format: Format | None
    reasoning: bool
    resumed: bool
    restored: int
    tools: list[dict[str, Any]] | None
    close_id: int | None


class Turns:
    """The way of every conversation: from messages to a request with its boundaries and its grammar, and from generated
    text to the parts of a turn. Any thread may call."""

    def __init__(self, frontend: Frontend, exact_history: bool = True):
        """exact_history: turns that were answered come back as they were generated."""
        self.frontend = frontend
        self.history = TurnHistory(frontend.defaults.eos_ids) if exact_history else None
        self._tools = ToolGrammars()

    def encode(self, chat: Conversation, name_space: str = "") -> EncodedPrompt:
        """The conversation as ids. Raises RequestError."""
        return self.frontend.template.encode(
            chat.messages,
            _in_order(chat.tools),
            add_generation_prompt=chat.generation_prompt,
            continue_final_message=chat.continues,
            enable_thinking=chat.enable_thinking,
            template_kwargs=chat.template_kwargs,
            marks=chat.marks,
            name_space=name_space,
        )

    def prepare(
        self, id: str, chat: Conversation, params: SamplingParams, name_space: str = "", priority: int = 0
    ) -> PreparedTurn:
        """Raises RequestError for what cannot be asked."""
        encoded = self.encode(chat, name_space)
        ids, boundaries, restored = encoded.ids, list(encoded.boundaries), 0
        if self.history is not None:
            ids, boundaries, restored = self.history.restore(name_space, ids, boundaries, self._same(chat.tools))
        if chat.truncate_prompt_tokens is not None and len(ids) > chat.truncate_prompt_tokens:
            cut = len(ids) - chat.truncate_prompt_tokens
            ids, boundaries = ids[cut:], [count - cut for count in boundaries if count > cut]
        reasoning = encoded.reasoning_open
        form = Format.of(chat, reasoning)
        if form is not None and chat.continues:
            raise RequestError("an answer that is begun already can have no format and no demanded call; drop either.")
        if chat.choice == "none":
            params = replace(params, bad_words=(*params.bad_words, TOOL_CALL))
        request = Request(
            id,
            tuple(ids),
            params,
            tuple(boundaries),
            name_space,
            priority,
            encoded.snapshot_token_id,
            stops_after=CLOSE if reasoning else None,
        )
        close_id = self.frontend.tokenizer.token_to_id(CLOSE)
        return PreparedTurn(request, form, reasoning, chat.continues, restored, chat.readable_tools, close_id)

    def grammar(self, form: Format | None) -> GrammarSpec | None:
        """The grammar of what was asked for; making it may take long. Raises RequestError for what cannot be
        enforced."""
        return None if form is None else form.spec(self._tools)

    def remember(self, turn: PreparedTurn, ids: Sequence[int]) -> None:
        """A turn that was answered to its end, for the prompts that send it back."""
        if self.history is not None:
            self.history.store(turn.request.name_space, turn.request.prompt, ids)

    def clear(self) -> None:
        """Forget every turn."""
        if self.history is not None:
            self.history.clear()

    def _same(self, tools: list[dict[str, Any]] | None):
        """Whether two spellings of a turn say the same."""

        def same(spelled: Sequence[int], generated: Sequence[int]) -> bool:
            decode = self.frontend.tokenizer.decode
            one, other = (decode(ids, skip_special_tokens=False) for ids in (spelled, generated))
            return any(
                parse_answer(one, tools or (), reasoning) == parse_answer(other, tools or (), reasoning)
                for reasoning in (True, False)
            )

        return same


def _in_order(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools with their fields in the order that most clients send, so that equal tools give equal prompts. What is null
    or not asked for (`strict: false`) is left out."""

    def ordered(tool: Any) -> Any:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            return tool
        given = {name: value for name, value in function.items() if value is not None and (name, value) != _NOT_STRICT}
        known = {name: given[name] for name in _TOOL_FIELDS if name in given}
        return {"type": "function", **tool, "function": known | given}

    return [ordered(tool) for tool in tools] if isinstance(tools, list) else tools


class TurnParser:
    """One continuation taken apart as its updates come, and its tokens counted.

    ids: what was generated; reasoning_tokens: of them; called: whether a tool call is complete.
    """

    def __init__(self, turn: PreparedTurn):
        self._parser = AnswerParser(turn.reasoning, turn.tools, turn.resumed, exact=turn.format is not None)
        self._close_id = turn.close_id
        self._in_reasoning = turn.reasoning
        self.ids: list[int] = []
        self.reasoning_tokens = 0
        self.called = False

    def push(self, update: Update) -> list[TurnEvent]:
        """What an update makes certain; with the last one, all that is left."""
        for id in update.ids:
            self.ids.append(id)
            self.reasoning_tokens += self._in_reasoning
            self._in_reasoning &= id != self._close_id
        events = self._parser.push(update.text)
        if update.finish_reason:
            events += self.finish()
        # What was announced as a call and is none stays what it is to the client: a call that was cut.
        self.called |= any(isinstance(event, CallFinished) for event in events)
        return events

    def finish(self) -> list[TurnEvent]:
        """What is left of a turn that ends here."""
        return self._parser.finish()


class TurnReader:
    """All continuations of a turn, taken apart as their updates come.

    parsers: one each; cached: tokens of the prompt that were resumed; drafts: how those for its answer fared.
    """

    def __init__(self, turns: Turns, turn: PreparedTurn):
        self._turns, self.turn = turns, turn
        self.parsers = [TurnParser(turn) for _ in range(turn.request.params.n)]
        self.cached, self.drafts = 0, Acceptance()

    def take(self, update: Update) -> list[TurnEvent]:
        """What an update makes certain. A turn that came to its end is remembered."""
        if update.reuse:
            self.cached = update.reuse.cached_tokens
        self.drafts.add(update.metrics and update.metrics.drafts)
        parser = self.parsers[update.index]
        events = parser.push(update)
        if update.finish_reason == "stop":
            self._turns.remember(self.turn, parser.ids)
        return events

    @property
    def generated(self) -> int:
        """Tokens of all continuations."""
        return sum(len(parser.ids) for parser in self.parsers)

    @property
    def reasoning_tokens(self) -> int:
        return sum(parser.reasoning_tokens for parser in self.parsers)
