"""Drawing tokens at random under a grammar's masks, and a validator for what comes out."""

import re

import numpy as np

PADDING = 13  # ids of the logits beyond the tokenizer's
LIMIT = 500  # tokens of a sample
TO_AN_END = ('"', "}", "]", "\n</parameter>\n", "</function>", "</think>", "<tool_call>", ">", "\n")


def admitted(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def after(matcher, ids):
    """A copy of the matcher that has gone on by the ids."""
    copy = matcher.copy()
    assert all(map(copy.accept, ids))
    return copy


class Sampler:
    """Random choices that tend to an end. Every step checks the mask: never empty, no padding, kept by `accept`."""

    def __init__(self, tokenizer, eos_ids):
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        text = [tokenizer.decode([id], skip_special_tokens=False) for id in range(tokenizer.vocab_size)]
        self._ends = {id for id, piece in enumerate(text) if piece in TO_AN_END} | set(eos_ids)

    def draw(self, matcher, seed):
        """The ids of a complete answer without its end token, or None for one that goes on for too long."""
        random = np.random.default_rng(seed)
        ids = []
        for step in range(LIMIT):
            if matcher.finished:
                return ids
            mask = matcher.mask()
            ids_admitted = admitted(mask)
            assert len(ids_admitted) > 0 and ids_admitted[-1] < self.tokenizer.vocab_size
            if step % 8 == 0:
                self._check_refusal(matcher, mask, random)
            ends = [id for id in ids_admitted if id in self._ends]
            id = int(random.choice(ends if ends and random.random() < 0.3 else ids_admitted))
            assert matcher.accept(id)
            if id in self.eos_ids:
                assert matcher.finished
                return ids
            ids.append(id)
        return None

    def _check_refusal(self, matcher, mask, random):
        outside = np.setdiff1d(np.arange(self.tokenizer.vocab_size), admitted(mask))
        id, fork = int(random.choice(outside)), matcher.copy()
        if fork.accept(id):  # another spelling of the only way on
            [only] = admitted(mask)
            one, other = self.tokenizer.token_bytes(id), self.tokenizer.token_bytes(int(only))
            assert one.startswith(other) or other.startswith(one)
        else:
            assert (fork.mask() == mask).all()


def violation(value, schema, root=None):
    """What `schema` has against `value`, for the keywords that the tests use; None when it is valid."""
    root = schema if root is None else root
    kinds = {"string": str, "number": int | float, "integer": int, "array": list, "object": dict, "null": type(None)}
    if "$ref" in schema:
        return violation(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema:
        found = [violation(value, branch, root) for branch in schema["anyOf"]]
        return None if None in found else found
    if "enum" in schema and not any(value == c and type(value) is type(c) for c in schema["enum"]):
        return f"{value!r} is none of {schema['enum']}"
    names = schema.get("type", [])
    for name in [names] if isinstance(names, str) else names:
        if (
            isinstance(value, bool)
            if name == "boolean"
            else isinstance(value, kinds[name]) and value is not bool(value)
        ):
            break
    else:
        if names:
            return f"{value!r} is no {names}"
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9):
            return f"{value!r} has the wrong length"
        if not re.search(schema.get("pattern", ""), value):
            return f"{value!r} does not match"
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{value!r} is out of range"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
            return f"{value!r} has the wrong length"
        return next(filter(None, (violation(item, schema.get("items", {}), root) for item in value)), None)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if missing := [name for name in schema.get("required", []) if name not in value]:
            return f"{missing} are missing"
        if schema.get("additionalProperties") is False and (unknown := value.keys() - properties.keys()):
            return f"{unknown} are unknown"
        return next(filter(None, (violation(value[name], properties.get(name, {}), root) for name in value)), None)
    return None
