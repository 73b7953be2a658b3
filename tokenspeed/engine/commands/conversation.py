"""A conversation with one model: its history, its settings, and one turn at a time."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..llm import LLM
from ..request import PrefixReuse, SamplingParams
from ..text.tools import ToolCall, parse_answer
from .generate import Meter
from .records import Dialogue, encode_dialogue, json_sampling

Message = dict[str, Any]


class Turn:
    """One answer on its way: iterate over its text. When it is done or closed, it stands in the history; one that was
    closed before its first token takes its question back."""

    def __init__(self, conversation: "Conversation", before: list[Message]):
        """before: the messages to go back to where no answer comes. Raises RequestError for what cannot be answered."""
        c = self._conversation = conversation
        self._before, self._text, self._stopped = before, "", None
        self.reuse: PrefixReuse | None = None
        self.tool_calls: tuple[ToolCall, ...] = ()
        ids, boundaries, self._dialogue = c.encode(c.history, c.tools)
        params, longest = c.llm.frontend.sampling_params(**c.sampling), c.llm.engine.limits.max_tokens
        if len(ids) < longest:
            params = replace(params, max_tokens=min(params.max_tokens or longest, longest - len(ids)))
        request = c.llm.frontend.request(c.next_id(), ids, params, boundaries)
        request.check(c.llm.engine.vocabulary, longest)
        self.meter = Meter(len(ids))
        self._updates = c.llm.follow([request])

    def __iter__(self) -> Iterator[str]:
        try:
            for _, update in self._updates:
                self.reuse = self.reuse or update.reuse
                self.meter.count(len(update.ids))
                self.meter.drafts.add(update.metrics and update.metrics.drafts)
                self._text += update.text
                self._stopped = update.finish_reason
                yield update.text
        finally:
            self.close()

    def close(self) -> None:
        """End the answer here. Harmless when it has ended."""
        if self._conversation.turn is not self:
            return
        self._conversation.turn = None
        self._updates.close()
        if self.meter.tokens:
            answer = parse_answer(self._text, *self._dialogue)
            self.tool_calls = answer.tool_calls
            self._conversation.messages.append(answer.message())
            self._conversation.count(self)
        else:
            self._conversation.messages = self._before

    def summary(self) -> str:
        m = self.meter
        reuse = f"cached: {self.reuse}" if self.reuse else "nothing came"
        end = " (cut at max_tokens)" if self._stopped == "length" else ""
        return (
            f"[{m.prompt_tokens} prompt tokens, {reuse}; {m.tokens} generated{end}, first after "
            f"{m.first_s * 1000:.0f} ms, then {m.speed}]"
        )


class Conversation:
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
        self.encode([*self.history, {"role": "user", "content": ""}], tools)
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
        self.encode([{"role": "user", "content": ""}] if messages == [] else messages, tools)
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        self.system = first and first["content"]
        self.messages, self.tools = messages[1 if first else 0 :], tools

    def encode(self, messages: list[Message], tools: list[dict] | None) -> tuple[list[int], tuple[int, ...], Dialogue]:
        return encode_dialogue(self.llm.frontend, messages, tools, self._thinking)

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
