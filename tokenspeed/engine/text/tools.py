"""What an assistant turn says: its reasoning, its text, and the tool calls in Qwen3.5's XML."""

import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>\n?<function=([^>\n]+)>\n?(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


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


def parse_answer(text: str, tools: list[dict] | None = None) -> Answer:
    """Take a whole assistant turn apart, as generated after the `<think>` of the generation prompt.

    text: without the end-of-turn token. tools: OpenAI definitions; a parameter whose schema type is not string is read
    as JSON, and stays the text it is where it is not valid JSON. Never raises: what is no complete call is content.
    """
    reasoning, closed, rest = text.partition("</think>")
    if not closed:
        reasoning, rest = "", text
    schemas = {}
    for tool in tools or []:
        function = tool.get("function", tool)
        schemas[function["name"]] = function.get("parameters", {}).get("properties", {})
    calls = tuple(
        ToolCall(
            name, {key: _typed(value, schemas.get(name, {}).get(key, {})) for key, value in _PARAMETER.findall(body)}
        )
        for name, body in _CALL.findall(rest)
    )
    return Answer(reasoning.strip(), _CALL.sub("", rest).strip(), calls)


def _typed(value: str, schema: dict) -> Any:
    if schema.get("type", "string") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
