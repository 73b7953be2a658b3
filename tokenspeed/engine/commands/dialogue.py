"""A conversation with one model: its history, its settings, and one turn at a time."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..chat.conversation import Conversation
from ..chat.turn import PreparedTurn, TurnReader
from ..errors import RequestError
from ..llm import LLM
from ..request import PrefixReuse, SamplingParams
from ..text.turn import ToolCall, TurnEvent, TurnText
from .generate import Meter
from .records import json_sampling

Message = dict[str, Any]


class Turn:
    """One answer on its way: iterate over what comes. When it is done or closed, it stands in the history; one that was
    closed before its first token takes its question back."""

    def __init__(self, dialogue: "Dialogue", before: list[Message]):
        """before: the messages to go back to where no answer comes. Raises RequestError for what cannot be answered."""
        d = self._dialogue = dialogue
        self._before, self._text, self._stopped = before, TurnText(), None
        self.reuse: PrefixReuse | None = None
        self.tool_calls: tuple[ToolCall, ...] = ()
        turn, longest = d.prepare(d.history, d.tools), d.llm.engine.limits.max_tokens
        turn.request.check(d.llm.engine.vocabulary, longest)
        self._reader = TurnReader(d.llm.turns, turn)
        self.meter = Meter(len(turn.request.prompt))
        self._updates = d.llm.follow([turn.request], [d.llm.turns.grammar(turn.format)])

    def __iter__(self) -> Iterator[list[TurnEvent]]:
        try:
            for _, update in self._updates:
                self.reuse = self.reuse or update.reuse
                self.meter.count(len(update.ids))
                self.meter.drafts.add(update.metrics and update.metrics.drafts)
                events = self._reader.take(update)
                self._text.add(events)
                self._stopped = update.finish_reason
                yield events
        finally:
            self.close()

    def close(self) -> None:
        """End the answer here. Harmless when it has ended."""
        if self._dialogue.turn is not self:
            return
        self._dialogue.turn = None
        self._updates.close()
        if self.meter.tokens:
            if self._stopped is None:
                self._text.add(self._reader.parsers[0].finish())
            answer = self._text.answer()
            self.tool_calls = answer.tool_calls
            self._dialogue.messages.append(answer.message())
            self._dialogue.count(self)
        else:
            self._dialogue.messages = self._before

    def summary(self) -> str:
        m = self.meter
        reuse = f"cached: {self.reuse}" if self.reuse else "nothing came"
        end = " (cut at max_tokens)" if self._stopped == "length" else ""
        return (
            f"[{m.prompt_tokens} prompt tokens, {reuse}; {m.tokens} generated{end}, first after "
            f"{m.first_s * 1000:.0f} ms, then {m.speed}]"
        )


class Dialogue:
    """messages: without the system message; tools: OpenAI definitions; sampling: the fields that were chosen."""

    def __init__(self, llm: LLM, sampling: dict[str, Any], enable_thinking: bool | None = None):
        self.llm, self.sampling, self._thinking = llm, dict(sampling), enable_thinking
        self.system: str | None = None
        self.tools: list[dict] | None = None
        self.messages: list[Message] = []
        self.turn: Turn | None = None
        self._ids = itertools.count()
        self._turns = self._prompt = self._cached = self._generated = 0
        self._decode_s = 0.0

    @property
    def history(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def next_id(self) -> str:
        return f"turn-{next(self._ids)}"

    def ask(self, text: str) -> Turn:
        """Answer a message. Raises RequestError, and then the conversation is as before."""
        messages = list(self.messages)
        if self._calls_left():
            # The model waits for results: whoever goes on without them leaves the calls out for good.
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages[last:] = [{key: value for key, value in messages[last].items() if key != "tool_calls"}]
        return self._go_on([*messages, {"role": "user", "content": text}])

    def result(self, text: str) -> Turn | None:
        """A tool call's result; the answer once there is one for each call, None before. Raises RequestError."""
        left = self._calls_left()
        if not left:
            raise RequestError("no tool call waits for a result.")
        messages = [*self.messages, {"role": "tool", "content": text}]
        if left == 1:
            return self._go_on(messages)
        self.messages = messages
        return None

    def retry(self) -> Turn:
        """Another answer to the last message. Raises RequestError where there is none."""
        return self._go_on(self.messages[: self._last(("user", "tool")) + 1])

    def undo(self) -> str:
        """Takes the last user message back with all that followed, and returns it."""
        last = self._last(("user",))
        text = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return text

    def reset(self) -> None:
        self.messages = []

    def use_tools(self, tools: list[dict] | None) -> None:
        """Raises RequestError for what are no tools."""
        self.prepare([*self.history, {"role": "user", "content": ""}], tools)
        self.tools = tools

    def set(self, name: str, value: str) -> None:
        """A sampling field, as JSON or else as text; "default" takes the choice back. Raises RequestError."""
        if name not in SamplingParams.__dataclass_fields__ or name == "n":
            known = ", ".join(sorted(set(SamplingParams.__dataclass_fields__) - {"n"}))
            raise RequestError(f"{name!r} is no sampling field of a conversation; it must be one of {known}.")
        rest = {key: chosen for key, chosen in self.sampling.items() if key != name}
        if value not in ("", "default"):
            try:
                rest |= json_sampling({name: json.loads(value)})
            except (ValueError, RecursionError):
                rest[name] = value
        self.llm.frontend.sampling_params(**rest)
        self.sampling = rest

    def save(self, path: str) -> None:
        """Raises RequestError where the file cannot be written."""
        saved = {"messages": self.history, "tools": self.tools}
        try:
            Path(path).write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path!r} cannot be written: {error.strerror}.") from None

    def load(self, path: str) -> None:
        """A saved conversation, or a bare list of messages. Raises RequestError, and then nothing has changed."""
        try:
            loaded = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{path!r} is no saved conversation: {error}") from None
        messages = loaded.get("messages") if isinstance(loaded, dict) else loaded
        tools = loaded.get("tools") if isinstance(loaded, dict) else self.tools
        self.prepare([{"role": "user", "content": ""}] if messages == [] else messages, tools)
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        self.system = first and first["content"]
        self.messages, self.tools = messages[1 if first else 0 :], tools

    def prepare(self, messages: list[Message], tools: list[dict] | None) -> PreparedTurn:
        """A turn with as much room as is left, where the sampling asks for more. Raises RequestError."""
        chat = Conversation(messages, tools, enable_thinking=self._thinking)
        turn = self.llm.turns.prepare(self.next_id(), chat, self.llm.frontend.sampling_params(**self.sampling))
        params, left = turn.request.params, self.llm.engine.limits.max_tokens - len(turn.request.prompt)
        if left > 0 and (params.max_tokens or left) > left:
            turn = replace(turn, request=replace(turn.request, params=replace(params, max_tokens=left)))
        return turn

    def count(self, turn: Turn) -> None:
        """A turn is over."""
        self._turns += 1
        self._prompt += turn.meter.prompt_tokens
        self._cached += turn.reuse.cached_tokens if turn.reuse else 0
        self._generated += turn.meter.tokens
        self._decode_s += turn.meter.decode_s

    def stats(self) -> Iterator[str]:
        """Figures of all turns and of the prefix cache, a line each."""
        speed = (self._generated - self._turns) / self._decode_s if self._decode_s else 0.0
        yield f"turns              {self._turns}, {self._generated} tokens generated at {speed:.1f} tok/s"
        yield f"prompt tokens      {self._prompt}, {self._cached} of them cached"
        yield f"drafts             {self.llm.engine.acceptance}"
        for name, value in self.llm.engine.cache.stats().items():
            yield f"cache              {name.replace('_', ' ')} {value}"

    def _go_on(self, messages: list[Message]) -> Turn:
        before, self.messages = self.messages, messages
        try:
            self.turn = Turn(self, before)
        except RequestError:
            self.messages = before
            raise
        return self.turn

    def _calls_left(self) -> int:
        """Tool calls of the last answer that have no result."""
        for results, message in enumerate(reversed(self.messages)):
            if message["role"] != "tool":
                return max(len(message.get("tool_calls") or ()) - results, 0)
        return 0

    def _last(self, roles: tuple[str, ...]) -> int:
        found = [i for i, message in enumerate(self.messages) if message["role"] in roles]
        if not found:
            raise RequestError("there is no message yet.")
        return found[-1]
