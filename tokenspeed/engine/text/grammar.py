"""Structured output: what an answer must look like, and which tokens may come next so that it will.

llguidance does the work: a grammar is Lark text with JSON schemas inside, and a mask takes tens of microseconds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np

from ..errors import ConfigError, RequestError
from .reasoning import CLOSE
from .sized_cache import SizedCache
from .tokenizer import Tokenizer

MAX_SCHEMA = 1 << 16  # characters; one object of 2,000 optional properties compiles in a second, twice as many in four
MAX_RULES = 1 << 18  # characters of a grammar
MAX_DEPTH = 32  # of a schema as JSON
_KEPT_BYTES = 512 << 20  # of compiled grammars
_GRAMMAR_BYTES = 8 << 20  # of one whose size nobody measured: 64 of those are kept
LIMITS = llguidance.LLParserLimits(verbose_errors=False)
# White space between two tokens of JSON: a space, or the end of a line and the next one's indentation, up to 16 levels
# (of objects in a schema of MAX_DEPTH). Bounded, or a model that likes it could go on for ever.
_JSON_OPTIONS = {"whitespace_pattern": r" | ?\r?\n( {0,64}|\t{0,16})"}
# From inside the prompt's `<think>`: anything without the closing tag spelled as text, then its token, an empty line.
_AFTER_REASONING = (
    f'start: REASONING {CLOSE} ("\\n\\n" | "\\n")? answer\n'
    r"REASONING: /(?s:.*)/ & ~/(?s:.*)<\/think>(?s:.*)/"
    "\n"
)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like: Lark rules with one named `answer`; reasoning: it follows an open `<think>`."""

    rules: str
    reasoning: bool = False


def json_object(reasoning: bool = False) -> GrammarSpec:
    """Any JSON object."""
    return json_schema({"type": "object"}, reasoning)


def json_schema(schema: Any, reasoning: bool = False) -> GrammarSpec:
    """JSON that `schema` admits, object keys in the schema's order."""
    return GrammarSpec(f"answer: {json_rule(schema, 'the JSON schema')}", reasoning)


def regex(pattern: str, reasoning: bool = False) -> GrammarSpec:
    """Text that `pattern` (Rust's syntax, no look-around) matches as a whole."""
    if not isinstance(pattern, str):
        raise RequestError(f"the regular expression must be a string, not {pattern!r}")
    pattern = llguidance.regex_to_lark(_unicode(pattern, "the regular expression"))
    return GrammarSpec(f"answer: /{pattern}/", reasoning)


def choice(texts: Sequence[str], reasoning: bool = False) -> GrammarSpec:
    """One of `texts`."""
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"choices must be a list of at least one string, not {texts!r:.80}")
    return GrammarSpec(f"answer: {' | '.join(map(literal, texts))}", reasoning)


def response_format(value: Any, reasoning: bool = False) -> GrammarSpec | None:
    """For OpenAI's `response_format`; None for plain text."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return json_object(reasoning)
    if kind == "json_schema":
        given = value.get("json_schema")
        if not isinstance(given, Mapping) or "schema" not in given:
            raise RequestError(f"response_format.json_schema must be an object with a schema, not {given!r:.80}")
        return json_schema(given["schema"], reasoning)
    raise RequestError(f"response_format is {value!r:.80}; its type must be text, json_object or json_schema")


def literal(text: str) -> str:
    """A Lark string for exactly `text`."""
    return json.dumps(_unicode(text, "a text"), ensure_ascii=False)


def json_rule(schema: Any, where: str) -> str:
    """Lark for JSON that `schema` admits. Raises RequestError, naming `where`, for one that is none or is too large."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where} must be a JSON object, not {schema!r:.80}")
    try:
        text = json.dumps({**schema, "x-guidance": _JSON_OPTIONS}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    if len(text) > MAX_SCHEMA:
        raise RequestError(f"{where} has {len(text)} characters; at most {MAX_SCHEMA} are supported")
    if (depth := _depth(text)) > MAX_DEPTH:
        raise RequestError(f"{where} is nested {depth} levels deep; at most {MAX_DEPTH} are supported")
    return f"%json {_unicode(text, where)}"


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} is not valid Unicode: {error.reason} at character {error.start}") from None
    return text


def _depth(text: str) -> int:
    """How deep the brackets of JSON text are nested."""
    depth = deepest = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest. Making one takes about 2 s for 250,000 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        """vocab_size: of the logits, padding included; eos_ids: what may end an answer (GenerationDefaults.eos_ids).

        Raises ConfigError for ids outside the vocabulary.
        """
        if not eos_ids or not all(0 <= id < vocab_size for id in eos_ids):
            raise ConfigError(f"eos_ids are {list(eos_ids)}; at least one id in [0, {vocab_size}) must end an answer")
        self._eos_ids = frozenset(eos_ids)
        self._mask_size = -(-vocab_size // 32)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids[0])),
            eos_token=list(eos_ids),
        )
        self._compiled: SizedCache[Matcher] = SizedCache(_KEPT_BYTES)

    def compile(self, spec: GrammarSpec, name_space: str = "", size: int = _GRAMMAR_BYTES) -> "Matcher":
        """A matcher at its start, of which each sequence takes a copy. Raises RequestError for a grammar that is wrong,
        unsupported or too large, with the reason.

        What it costs is not bounded: a grammar of a kilobyte can take gigabytes. Who does not trust it compiles it in a
        process that may be killed first (`server/formats.py`).

        name_space: whose it is; that it is there already tells nobody else anything. size: bytes it takes, as it counts
        among those that are kept.
        """
        key = name_space, spec
        found = self._compiled.get(key)
        if found is None:
            found = self._compile(spec)
            self._compiled.put(key, found, size)
        return found

    def _compile(self, spec: GrammarSpec) -> "Matcher":
        if len(spec.rules) > MAX_RULES:
            raise RequestError(f"the grammar has {len(spec.rules)} characters; at most {MAX_RULES} are supported")
        start = _AFTER_REASONING if spec.reasoning else "start: answer\n"
        matcher = llguidance.LLMatcher(self._tokenizer, start + spec.rules, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(f"the requested output format cannot be enforced: {reason(matcher.get_error())}")
        return Matcher(matcher, self._mask_size, self._eos_ids)


def reason(error: str) -> str:
    """What an error of llguidance says, without the place in a text that the caller never saw."""
    said = re.split(r"\n\s*\d+ \| |\n\n", re.sub(r"^at \d+\(\d+\): ", "", error.strip()))[0]
    return re.sub(r"\s+", " ", said)[:300]


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, mask_size: int, eos_ids: frozenset[int]):
        self._matcher = matcher
        self._mask_size = mask_size
        self._eos_ids = eos_ids

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token can follow, or one was accepted: the answer is complete."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        """int32 [ceil(vocab_size / 32)], bit i of number j set where token 32 j + i may come next; never empty.

        An end token may come where the answer is complete. Raises RequestError where the grammar takes too much work,
        or no token of the vocabulary can go on.
        """
        out = np.zeros(self._mask_size, np.int32)
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        self._check()
        if not out.any():
            raise RequestError("no token of this vocabulary can continue the requested output format")
        return out

    def accept(self, id: int) -> bool:
        """Goes on by one token; False, with nothing changed, where the grammar does not admit it.

        A mask may admit less: of the spellings of a text without alternative, the tokenizer's own.
        """
        if self.finished:
            return id in self._eos_ids
        accepted = self._matcher.try_consume_tokens([id]) == 1
        self._check()
        return accepted

    def copy(self) -> "Matcher":
        """An independent matcher at the same place."""
        return Matcher(self._matcher.deep_copy(), self._mask_size, self._eos_ids)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the requested output format became too much work: {reason(self._matcher.get_error())}")


class _Vocabulary:
    """The tokenizer as llguidance wants to see it: control tokens are no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int):
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]  # b"" in the padding: never admitted
        self.special_token_ids = sorted(id for id in tokenizer.control_ids if id < vocab_size)
        self._tokenizer = tokenizer
        self._id_of_byte = {token: id for id, token in reversed([*enumerate(self.tokens)]) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        """How the tokenizer spells text that the grammar leaves no choice about."""
        ids = self._tokenizer.encode_text(text.decode())
        if b"".join(self.tokens[id] for id in ids) == text:
            return ids
        return [self._id_of_byte[bytes((byte,))] for byte in text]  # the tokenizer's normalizer would change the text
