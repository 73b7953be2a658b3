"""Qwen3.5's tool calls as a grammar, so that a turn calls what it must, with arguments its schema admits."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import llguidance

from ..errors import RequestError
from .argument_types import Domain, argument_schema, domain, resolve
from .grammar import LIMITS, GrammarSpec, json_rule, literal, reason
from .sized_cache import SizedCache

_VALUE_END = r'"\n</parameter>\n"'
# Text that holds nothing that would end it for whoever reads the call (`tools.ToolCallParser`).
_TEXT = r"/(?s:.*)/ & ~/(?s:.*)<\/parameter>\s*(<parameter=|<\/function>)(?s:.*)/"
_ARGUMENT_RULES = rf"""
text[lazy]: TEXT
TEXT: ({_TEXT}) {_VALUE_END}
any_arguments: ("<parameter=" PARAMETER text)*
PARAMETER: /[^>\n]{{1,256}}>\n/
"""
_CALL_RULES = r"""
call_end: "</function>\n" </tool_call>
PROSE: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/
"""
# What a function's `parameters` may say beside its properties without making a promise this grammar does not keep.
_KNOWN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "format"}
_NOT_FOR_TEXT = {"anyOf", "oneOf", "allOf", "$ref", "not", "if", "contentEncoding", "contentMediaType"}
_MAX_DEPTH = 16  # of nested anyOf and $ref
_MAX_BRANCHES = 1000  # of one argument; what refers to itself twice at each level would have millions
_KEPT_CHARACTERS = 8 << 20  # of functions and their rules


class _Unsupported(Exception):
    """Why a schema cannot be enforced."""


class ToolGrammars:
    """Makes the grammars for turns with tools, and keeps what it found for each: an agent sends the same ones again."""

    def __init__(self) -> None:
        self._arguments: SizedCache[str] = SizedCache(_KEPT_CHARACTERS)

    def spec(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
        reasoning: bool = False,
    ) -> GrammarSpec | None:
        """For a turn with `tools` (`messages.check_tools`) under OpenAI's `tool_choice`; None where it may be any text.

        choice: "auto": text, then calls, if any tool is strict or calls are limited; "required": calls alone; {"type":
        "function", "function": {"name": ...}}: one call of that function; "none". parallel: more than one call may be
        made.

        Arguments come in the order of the schema's properties: the required ones, others that it names, no more;
        `format` says nothing. A tool that is not strict is held to its schema only where a call is required and the
        schema can be enforced. Raises RequestError for another choice, a name that no call can spell, and a strict tool
        that cannot be enforced, with the reason.
        """
        functions = [tool.get("function", tool) for tool in tools]
        named = isinstance(choice, Mapping)
        if named:
            wanted = choice.get("function", choice)
            name = wanted.get("name") if isinstance(wanted, Mapping) else None
            functions = [function for function in functions if function["name"] == name]
        if not (functions if named else choice in ("auto", "required", "none")):
            raise RequestError(
                f"tool_choice is {choice!r:.80}; it must be none, auto, required or name one of the tools"
            )
        if choice == "required" and not functions:
            raise RequestError("tool_choice is 'required', but there are no tools")
        free = parallel and not any(function.get("strict") is True for function in functions)
        if choice == "none" or (choice == "auto" and (free or not functions)):
            return None
        rules = [_ARGUMENT_RULES, _CALL_RULES]
        for i, function in enumerate(functions):
            opening = literal(f"\n<function={_spelled(function['name'])}>\n")
            rules.append(f"call_{i}: <tool_call> {opening} arguments_{i} call_end\n")
            key = (i, choice == "auto", json.dumps(function))
            if (found := self._arguments.get(key)) is None:
                found = _arguments(f"arguments_{i}", function, choice != "auto")
                self._arguments.put(key, found, len(key[2]) + len(found))
            rules.append(found)
        more = ' ("\\n" call)*' if parallel and not named else ""
        rules.append(f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}\n")
        rules.append(f"answer: PROSE (call{more})?\n" if choice == "auto" else f"answer: call{more}\n")
        return GrammarSpec("".join(rules), reasoning)


def _arguments(rule: str, function: Mapping[str, Any], required: bool) -> str:
    """The rule for a function's arguments and those it needs."""
    strict = function.get("strict") is True
    parameters = function.get("parameters") or {}
    if not strict and not (required and isinstance(parameters, Mapping) and "properties" in parameters):
        return f"{rule}: any_arguments\n"
    try:
        rules = _by_schema(rule, parameters)
        # Checked by itself, so that the reason names the tool and one tool can be let off.
        if error := llguidance.LLMatcher.validate_grammar(f"start: {rule}\n{_ARGUMENT_RULES}{rules}", limits=LIMITS):
            raise _Unsupported(reason(error))
        return rules
    except (_Unsupported, RequestError) as error:
        if strict:
            raise RequestError(f"the strict tool {function['name']!r} cannot be enforced: {error}") from None
        return f"{rule}: any_arguments\n"


def _by_schema(rule: str, parameters: Any) -> str:
    if not isinstance(parameters, Mapping):
        raise _Unsupported(f"parameters must be a JSON schema, not {parameters!r:.80}")
    if unknown := sorted(parameters.keys() - _KNOWN - _ANNOTATIONS):
        raise _Unsupported(f"parameters may not have {', '.join(unknown)}")
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise _Unsupported("properties must be an object and required a list")
    for name in (*properties, *required):
        if not isinstance(name, str):
            raise _Unsupported(f"required names {name!r:.80}, which is no string")
    names = [*properties, *dict.fromkeys(name for name in required if name not in properties)]
    parts, rules = [], []
    for j, name in enumerate(names):
        value = _Value(f"{rule}_{j}", argument_schema(parameters, name), parameters)
        opening = literal(f"<parameter={_spelled(name)}>\n")
        parts.append(f"{value.rule}{'' if name in required else '?'}")
        rules.append(f"{value.rule}: {opening} ({' | '.join(value.alternatives)})\n{''.join(value.rules)}")
    return f"{rule}: {' '.join(parts) or literal('')}\n{''.join(rules)}"


class _Value:
    """The alternatives for one argument's value with its closing tag, and the rules they need."""

    def __init__(self, rule: str, schema: Any, root: Mapping[str, Any]):
        self.rule = rule
        self.alternatives: list[str] = []
        self.rules: list[str] = []
        self._root = root
        self._admitted = domain(schema, root)
        self._visits = 0
        for branch in self._branches(schema, 0):
            self._add(branch)

    def _branches(self, schema: Any, depth: int) -> list[Any]:
        """Schemas one of which must hold, as far as that can be told apart."""
        self._visits += 1
        if self._visits > _MAX_BRANCHES:
            raise _Unsupported(f"{self.rule}: more than {_MAX_BRANCHES} alternatives")
        if depth > _MAX_DEPTH or schema is False:
            raise _Unsupported(f"{self.rule}: a schema that admits nothing, or alternatives nested too deep")
        if not isinstance(schema, Mapping):
            return [{}]
        rest = schema.keys() - _ANNOTATIONS
        if schema.get("nullable") is True:
            plain = {key: value for key, value in schema.items() if key != "nullable"}
            return [*self._branches(plain, depth + 1), {"type": "null"}]
        if rest == {"$ref"} and isinstance(target := resolve(schema["$ref"], self._root), Mapping):
            return self._branches(target, depth + 1)
        if rest == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1:
            return self._branches(schema["allOf"][0], depth + 1)
        if rest in ({"anyOf"}, {"oneOf"}) and isinstance(branches := schema[next(iter(rest))], list):
            if rest == {"oneOf"}:
                kinds = [domain(branch, self._root).keys() for branch in branches]
                if any(one & other for one, other in combinations(kinds, 2)):
                    return [schema]
            return [found for branch in branches for found in self._branches(branch, depth + 1)]
        return [schema]

    def _add(self, schema: Mapping[str, Any]) -> None:
        admitted = domain(schema, self._root)
        others = admitted.keys() - {"string"}
        if "string" not in admitted:
            self._add_json(schema, None)
            return
        if unknown := sorted(schema.keys() & _NOT_FOR_TEXT):
            raise _Unsupported(f"text with {', '.join(unknown)}")
        if admitted["string"] is not None:
            self._add_constants(admitted)
        elif not others:
            self._add_text(schema)
        elif schema.keys() & {"pattern", "minLength", "maxLength"}:
            raise _Unsupported("a pattern or length of text that may be something else as well")
        else:
            self._add_text({})
            others &= {"array", "object"}  # any other value is text as well
        if others:
            self._add_json(schema, sorted(others))

    def _add_constants(self, admitted: Domain) -> None:
        for constant in admitted["string"] or ():
            if "</parameter>" in constant:
                raise _Unsupported(f"{constant!r:.80} holds the closing tag of an argument")
            self.alternatives.append(f"{literal(constant)} {_VALUE_END}")

    def _add_json(self, schema: Mapping[str, Any], kinds: list[str] | None) -> None:
        definitions = {}
        if '"$ref"' in json.dumps(schema):
            definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        narrowed = schema if kinds is None else {"allOf": [schema, {"type": kinds}]}
        self.alternatives.append(f"{json_rule({**narrowed, **definitions}, 'its schema')} {_VALUE_END}")

    def _add_text(self, schema: Mapping[str, Any]) -> None:
        terms = [f"({_TEXT})"]
        if self._admitted.keys() & {"array", "object"}:
            terms.append(r"/[\s\x1c-\x1f]*([^\s\x1c-\x1f\[{](?s:.*))?/")  # what begins otherwise is read as JSON
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        if (low, high) != (0, ""):
            if not all(isinstance(bound, int) or bound == "" for bound in (low, high)):
                raise _Unsupported(f"minLength {low!r} and maxLength {high!r} must be integers")
            terms.append(f"/(?s:.){{{low},{high}}}/")
        if "pattern" in schema:
            terms.append(f"/{_whole(schema['pattern'])}/")
        if len(terms) == 1:
            self.alternatives.append("text")
            return
        name = f"{self.rule}_{len(self.alternatives)}"
        self.rules.append(f"{name}[lazy]: {name.upper()}\n{name.upper()}: ({' & '.join(terms)}) {_VALUE_END}\n")
        self.alternatives.append(name)


def _whole(pattern: Any) -> str:
    """A schema's pattern, which may match anywhere, as one for the whole text."""
    if not isinstance(pattern, str):
        raise _Unsupported(f"pattern {pattern!r:.80} must be a string")
    literal(pattern)  # refuses what is not valid Unicode
    first, last = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) is not None
    if (first or last) and "|" in pattern:
        raise _Unsupported(f"pattern {pattern!r:.80} has both an anchor and alternatives")
    body = llguidance.regex_to_lark(pattern[first : len(pattern) - last], "dw")
    return f"{'' if first else '(?s:.*)'}(?:{body}){'' if last else '(?s:.*)'}"


def _spelled(name: str) -> str:
    if not re.fullmatch(r"[^>\n]{1,256}", name):
        raise RequestError(
            f"{name!r:.80} cannot be written in a call; names have 1 to 256 characters, no > and no newline"
        )
    return name
