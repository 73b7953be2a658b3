"""What a turn must look like, as one grammar: its format, its calls, or either."""

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance

from ..errors import RequestError
from ..text import grammar
from ..text.grammar import GrammarSpec
from ..text.messages import check_tools
from ..text.tool_grammar import ToolGrammars
from .conversation import Conversation

_WAYS = ("json", "json_object", "regex", "choice")
# Where a JSON schema holds schemas: by name, in a list, or one alone.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def answer_format(
    response_format: Mapping[str, Any] | None = None,
    structured_outputs: Mapping[str, Any] | None = None,
    reasoning: bool = False,
) -> GrammarSpec | None:
    """The grammar of OpenAI's response_format or vLLM's structured_outputs; None for plain text. reasoning: the answer
    follows an open `<think>`. Raises RequestError for both, and for what cannot be enforced."""
    if structured_outputs is None:
        return None if response_format is None else _of_response_format(response_format, reasoning)
    if response_format is not None:
        raise RequestError("response_format and structured_outputs are given; one is needed.")
    if not isinstance(structured_outputs, Mapping):
        raise RequestError(f"structured_outputs must be an object, not {structured_outputs!r:.80}")
    given = {name: value for name, value in structured_outputs.items() if value is not None and value is not False}
    if len(given) != 1 or not given.keys() <= set(_WAYS):
        raise RequestError(f"structured_outputs has {sorted(given)}; it must have one of {', '.join(_WAYS)}.")
    [(name, value)] = given.items()
    if name == "json_object":
        return grammar.json_object(reasoning)
    if name == "regex":
        return grammar.regex(value, reasoning)
    if name == "choice":
        return grammar.choice(value, reasoning)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"structured_outputs.json is no JSON schema: {error}") from None
    return grammar.json_schema(plain_formats(value), reasoning)


def _of_response_format(value: Mapping[str, Any], reasoning: bool) -> GrammarSpec | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object" and value.get("schema") is not None:
        return grammar.json_schema(plain_formats(value["schema"]), reasoning)
    if kind == "json_schema" and isinstance(value.get("json_schema"), Mapping) and "schema" in value["json_schema"]:
        value = {**value, "json_schema": {"schema": plain_formats(value["json_schema"]["schema"])}}
    return grammar.response_format(value, reasoning)


def turn_grammar(tools: ToolGrammars, chat: Conversation, reasoning: bool) -> GrammarSpec | None:
    """What the whole turn must look like; None where it may be any text. Raises RequestError for what cannot be asked
    or enforced."""
    answer = answer_format(chat.response_format, chat.structured_outputs, reasoning)
    functions = [_with_plain_formats(tool) for tool in check_tools(chat.tools) or []]
    if answer is None or not functions or chat.choice != "auto":
        # Where a call is demanded there is no content to have a format.
        return tools.spec(functions, chat.choice, chat.parallel_tool_calls, reasoning) or answer
    calls = tools.spec(functions, "required", chat.parallel_tool_calls, reasoning)
    return GrammarSpec(f"answer: form | calls\n{_renamed(answer, 'form')}\n{_renamed(calls, 'calls')}", reasoning)


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
