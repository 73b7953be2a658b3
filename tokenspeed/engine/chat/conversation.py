"""What is asked of the model in a conversation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..text.messages import check_tools


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to be answered, by OpenAI's names.

    messages, tools: as `ChatTemplate.render` takes them. tool_choice: None is "auto" with tools, else "none".
    parallel_tool_calls: false for one call at most. response_format: OpenAI's; structured_outputs: vLLM's (json, regex,
    choice, json_object). Beside tools that may be called the turn is a call or has the format.
    enable_thinking, template_kwargs: as `ChatTemplate.render`. marks: messages whose ends are worth a state.
    add_generation_prompt, continue_final_message: None and None: a last assistant message that has content and no calls
    is gone on with, unless the turn is constrained; after any other a new turn begins.
    truncate_prompt_tokens: only so many of the prompt's last tokens are kept.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    enable_thinking: bool | None = None
    template_kwargs: Mapping[str, bool | str] | None = None
    marks: tuple[int, ...] = ()
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    truncate_prompt_tokens: int | None = None

    @property
    def continues(self) -> bool:
        """Whether the last message is gone on with. Raises RequestError where both ways are asked for."""
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError("continue_final_message needs add_generation_prompt to be false; both are true.")
        if self.continue_final_message is None and self.add_generation_prompt is None:
            last = self.messages[-1] if isinstance(self.messages, list | tuple) and self.messages else None
            begun = isinstance(last, Mapping) and last.get("role") == "assistant" and _has_text(last)
            return begun and not self.constrained
        return bool(self.continue_final_message)

    @property
    def constrained(self) -> bool:
        """Whether the turn may not be any text: a format, a demanded call, a strict tool, one call at most. Raises
        RequestError for what is no tool."""
        if not is_any_text(self.response_format, self.structured_outputs):
            return True
        if self.choice != "auto":
            return self.choice != "none"
        tools = check_tools(self.tools) or []
        strict = any(tool.get("function", tool).get("strict") is True for tool in tools)
        return bool(tools) and (strict or not self.parallel_tool_calls)

    @property
    def generation_prompt(self) -> bool:
        return not self.continues if self.add_generation_prompt is None else self.add_generation_prompt

    @property
    def choice(self) -> str | Mapping[str, Any]:
        """tool_choice, with what None means."""
        return self.tool_choice if self.tool_choice is not None else "auto" if self.tools else "none"

    @property
    def readable_tools(self) -> list[dict[str, Any]] | None:
        """The tools whose calls are looked for in the answer; None for none."""
        return self.tools if self.tools and self.choice != "none" else None


def is_any_text(response_format: Any, structured_outputs: Any) -> bool:
    """Whether these formats ask for nothing."""
    plain = isinstance(response_format, Mapping) and response_format.get("type") == "text"
    return structured_outputs is None and (response_format is None or plain)


def _has_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        last = content[-1] if content else None
        content = last.get("text") if isinstance(last, Mapping) else None
    return isinstance(content, str) and bool(content.strip()) and not message.get("tool_calls")
