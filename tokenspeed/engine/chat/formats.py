"""What an answer is asked to look like, as one grammar: its format, its calls, or either."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance

from ..errors import RequestError
from ..text import grammar
from ..text.grammar import GrammarSpec
from ..text.messages import check_tools
from ..text.tool_grammar import ToolGrammars
from .conversation import Conversation, is_any_text

_WAYS = ("json", "json_object", "regex", "choice")
# Where a JSON schema holds schemas: by name, in a list, or one alone.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer was asked to look like, as plain values that nobody has looked at yet.

    reasoning: the answer follows an open `<think>`; response_format: OpenAI's; structured_outputs: vLLM's; tools,
    choice and parallel: as `ToolGrammars.spec` takes them.
    """

    reasoning: bool = False
    response_format: Mapping[str, Any] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str | Mapping[str, Any] = "none"
    parallel: bool = True

    @classmethod
    def of(cls, chat: Conversation, reasoning: bool) -> "Format | None":
        """Of a conversation's turn; None where it may be any text."""
        tools = check_tools(chat.tools) or []
        if not chat.constrained:
            return None
        return cls(
            reasoning, chat.response_format, chat.structured_outputs, tools, chat.choice, chat.parallel_tool_calls
        )

    @classmethod
    def of_text(cls, response_format: Any, structured_outputs: Any) -> "Format | None":
        """Of what continues a raw prompt; None where it may be any text."""
        if is_any_text(response_format, structured_outputs):
            return None
        return cls(False, response_format, structured_outputs)

    @property
    def is_json_object(self) -> bool:
        """Whether any JSON object will do and nothing else is asked for: a grammar that costs next to nothing."""
        given = self.response_format
        plain = isinstance(given, Mapping) and given.get("type") == "json_object" and given.get("schema") is None
        return plain and self.structured_outputs is None and not self.tools and self.choice in ("auto", "none")

    def spec(self, grammars: ToolGrammars) -> GrammarSpec | None:
        """The grammar; making it may take long. Raises RequestError for what cannot be asked or enforced."""
        answer, functions = self._answer(), [_with_plain_formats(tool) for tool in self.tools]
        if answer is None or not functions or self.choice != "auto":
            # Where a call is demanded there is no content to have a format.
            return grammars.spec(functions, self.choice, self.parallel, self.reasoning) or answer
        calls = grammars.spec(functions, "required", self.parallel, self.reasoning)
        return GrammarSpec(
            f"answer: form | calls\n{_renamed(answer, 'form')}\n{_renamed(calls, 'calls')}", self.reasoning
        )

    def _answer(self) -> GrammarSpec | None:
        if self.structured_outputs is None:
            given = self.response_format
            return None if given is None else _of_response_format(given, self.reasoning)
        if self.response_format is not None:
            raise RequestError("response_format and structured_outputs are given; one is needed.")
        if not isinstance(self.structured_outputs, Mapping):
            raise RequestError(f"structured_outputs must be an object, not {self.structured_outputs!r:.80}")
        given = {name: value for name, value in self.structured_outputs.items() if value not in (None, False)}
        if len(given) != 1 or not given.keys() <= set(_WAYS):
            raise RequestError(f"structured_outputs has {sorted(given)}; it must have one of {', '.join(_WAYS)}.")
        [(name, value)] = given.items()
        if name == "json_object":
            return grammar.json_object(self.reasoning)
        if name == "regex":
            return grammar.regex(value, self.reasoning)
        if name == "choice":
            return grammar.choice(value, self.reasoning)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"structured_outputs.json is no JSON schema: {error}") from None
        return grammar.json_schema(plain_formats(value), self.reasoning)


def _of_response_format(value: Mapping[str, Any], reasoning: bool) -> GrammarSpec | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object" and value.get("schema") is not None:
        return grammar.json_schema(plain_formats(value["schema"]), reasoning)
    if kind == "json_schema" and isinstance(value.get("json_schema"), Mapping) and "schema" in value["json_schema"]:
        value = {**value, "json_schema": {"schema": plain_formats(value["json_schema"]["schema"])}}
    return grammar.response_format(value, reasoning)


def _renamed(spec: GrammarSpec, name: str) -> str:
    return re.sub(r"^answer:", f"{name}:", spec.rules, flags=re.MULTILINE)


def _with_plain_formats(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function.get("parameters"), Mapping):
        return tool
    function = {**function, "parameters": plain_formats(function["parameters"])}
    return {**tool, "function": function} if "function" in tool else function


def plain_formats(schema: Any, depth: int = 0) -> Any:
    """A copy of a JSON schema without the `format`s that nothing here enforces: JSON Schema has them as annotations."""
    if not isinstance(schema, Mapping) or depth > grammar.MAX_DEPTH:
        return schema
    result = dict(schema)
    form = result.get("format")
    if isinstance(form, str) and not _is_enforced(form):
        del result["format"]
    for name in result.keys() & set(_NAMED):
        if isinstance(result[name], Mapping):
            result[name] = {key: plain_formats(value, depth + 1) for key, value in result[name].items()}
    for name in result.keys() & set(_LISTED):
        if isinstance(result[name], list):
            result[name] = [plain_formats(value, depth + 1) for value in result[name]]
    for name in result.keys() & set(_SINGLE):
        result[name] = plain_formats(result[name], depth + 1)
    return result


def _is_enforced(form: str) -> bool:
    rule = f"start: %json {json.dumps({'type': 'string', 'format': form})}\n"
    return not llguidance.LLMatcher.validate_grammar(rule, limits=grammar.LIMITS)
