"""What a tool's JSON schema says about one argument, and how the argument's text is read by it.

Qwen3.5 writes an argument as bare text (`12`, `true`, `[1, 2]`, `some words`), so only the schema tells the string `12`
from the number. `read` decides; on doubt an argument stays the string that the model wrote.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

KINDS = ("string", "integer", "number", "boolean", "null", "array", "object")
_SPELLINGS = {"True": "true", "False": "false", "None": "null"}  # templates that print Python's values teach these
_MAX_DEPTH = 32  # of nested anyOf and $ref; what lies deeper says nothing
_MAX_VISITS = 1000
_MAX_COMPARISONS = 100_000
_MAX_LITERAL = 1 << 17  # characters of a value in Python's spelling
_BRACKETS = re.compile(r"[\[\](){}]")

# What a schema admits: for each kind of value its only values, or None for any of the kind.
Domain = dict[str, tuple[Any, ...] | None]
TEXT: Domain = {"string": None}


def argument_schema(parameters: Any, name: str) -> Any:
    """The schema of the argument `name` in a function's `parameters`; None where it says nothing."""
    if not isinstance(parameters, Mapping):
        return None
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return parameters.get("additionalProperties")


def domain(schema: Any, root: Any) -> Domain:
    """What `schema` admits; `root` is where its `$ref`s point into. Strings alone where it says nothing usable."""
    return _Reader(root).admitted(schema, 0) or TEXT


def resolve(reference: Any, root: Any) -> Any:
    """The schema a local reference (`#/$defs/point`) points at; None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        root = root.get(part) if isinstance(root, Mapping) else None
    return root


def is_text(admitted: Domain, start: str) -> bool | None:
    """Whether an argument that begins with `start` is a string whatever follows, and can be passed on as it comes.

    False: not before its end. None: more of it may tell. In agreement with `read`.
    """
    others = admitted.keys() - {"string"}
    if "string" not in admitted or (others and admitted["string"] is not None):
        return False
    start = start.strip()
    if "null" in others and any(word.startswith(start) for word in ("null", "None")):
        return None
    if others & {"array", "object"}:
        return start[0] not in "[{" if start else None
    return True


def read(text: str, admitted: Domain) -> str:
    """The JSON text for an argument written as `text`.

    Where strings are admitted, only null, an array or an object that is admitted too is read as that: `12` may well be
    meant as text, `["a", "b"]` hardly. An array or object may be spelled as Python spells a list or a dictionary. Where
    no admitted kind fits, the text stays a string.
    """
    other = admitted.keys() - {"string"}
    if "string" in admitted and _fits(text, "string", admitted):
        other &= {"null", "array", "object"}
    spelled = _SPELLINGS.get(text.strip(), text.strip())
    if other:
        try:
            value = json.loads(spelled)
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no NaN, infinity or lone surrogate
        except (ValueError, RecursionError):
            value = _python_value(spelled) if other & {"array", "object"} else None
            if value is None:
                return json.dumps(text, ensure_ascii=False)
            spelled = json.dumps(value, ensure_ascii=False)
        if isinstance(value, float) and value.is_integer() and "integer" in other and "number" not in other:
            value = int(value)
            spelled = str(value)
        if any(kind in other and _fits(value, kind, admitted) for kind in _kinds_of(value)):
            return spelled
    return json.dumps(text, ensure_ascii=False)


def _python_value(text: str) -> list | dict | None:
    """The list or dictionary that `text` spells as Python does, None where it spells none that JSON can hold."""
    if text[:1] not in ("[", "{", "(") or len(text) > _MAX_LITERAL:
        return None
    depth = deepest = 0
    for bracket in _BRACKETS.findall(text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        return None
    try:
        value = ast.literal_eval(text)  # literals alone: names and calls are errors
        plain = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return plain if isinstance(plain, list | dict) else None


def _fits(value: Any, kind: str, admitted: Domain) -> bool:
    constants = admitted[kind]
    return constants is None or any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in constants)


def _kinds_of(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return ("integer", "number")
    kinds = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return (kinds[type(value)],)


class _Reader:
    """Reads one schema, which may refer to itself and be anything at all, in bounded time."""

    def __init__(self, root: Any):
        self._root = root
        self._visits = 0

    def admitted(self, schema: Any, depth: int) -> Domain | None:
        """None where the schema says nothing about the kind of value; {} where it admits nothing."""
        self._visits += 1
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or self._visits > _MAX_VISITS:
            return None
        found = _of_type(schema)
        constants = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(constants, list):
            found = _both(found, _of_constants(constants))
        for name in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(name), list):
                found = _both(found, _any([self.admitted(branch, depth + 1) for branch in branches]))
        if isinstance(branches := schema.get("allOf"), list):
            for branch in branches:
                found = _both(found, self.admitted(branch, depth + 1))
        if "$ref" in schema:
            found = _both(found, self.admitted(resolve(schema["$ref"], self._root), depth + 1))
        return found


def _of_type(schema: Mapping) -> Domain | None:
    names = schema.get("type")
    names = names if isinstance(names, list) else [names]
    kinds = [kind for kind in KINDS if kind in names]
    if not kinds and not schema.keys() & {"enum", "const"}:
        kinds += ["object"] * bool(schema.keys() & {"properties", "additionalProperties"})
        kinds += ["array"] * bool(schema.keys() & {"items", "prefixItems"})
    if not kinds:
        return None
    return dict.fromkeys(kinds) | ({"null": None} if schema.get("nullable") is True else {})


def _of_constants(constants: list) -> Domain:
    found: dict[str, list[Any]] = {}
    for constant in constants:
        found.setdefault(_kinds_of(constant)[0], []).append(constant)
    return {kind: tuple(values) for kind, values in found.items()}


def _any(domains: list[Domain | None]) -> Domain | None:
    if any(found is None for found in domains):
        return None
    union: dict[str, list[Any] | None] = {}
    for found in domains:
        for kind, constants in found.items():
            known = union.setdefault(kind, [])
            if known is None or constants is None:
                union[kind] = None
            else:
                known += constants
    return {kind: known if known is None else tuple(known) for kind, known in union.items()}


def _both(one: Domain | None, other: Domain | None) -> Domain | None:
    if one is None or other is None:
        return other if one is None else one
    merged: Domain = {}
    for kind in KINDS:
        left, right = _of_kind(one, kind), _of_kind(other, kind)
        if left == () or right == ():
            continue
        if left is not None and right is not None:
            right = _common(left, right)
        merged[kind] = left if right is None else right
    return merged


def _common(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values that are in both; all of `right` where that would take long to find out: of thousands of arrays."""
    try:
        known = set(left)
    except TypeError:
        if len(left) * len(right) > _MAX_COMPARISONS:
            return right
        return tuple(value for value in right if value in left)
    return tuple(value for value in right if value in known)


def _of_kind(admitted: Domain, kind: str) -> tuple[Any, ...] | None:
    """The values of a kind, () for none of it: a number may be an integer."""
    if kind == "integer" and kind not in admitted:
        kind = "number"
    return admitted.get(kind, ())
