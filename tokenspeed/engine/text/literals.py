"""Control-token literals in a caller's text stay text.

A chat template writes control tokens (`<|im_start|>`) around strings it was given, so the rendered text alone no longer
tells which of them the template wrote and which a user typed. Before rendering, `LiteralGuard.hide` therefore replaces
every literal in the given strings by one private-use character, a *mark*, that occurs nowhere in the input; after
rendering, `Hidden.reveal` puts the literals back and reports where they stand.

- One literal becomes one character, so no filter or method of a template (`trim`, `split`, slices) can take it apart,
  and a template that looks for markup in user text (`content.startswith('<tool_response>')`) does not find it.
- `tojson` keeps a mark as it is, or writes it as `\\udbxx\\udcxx` when asked for ASCII; both are revealed.
- A string whose end is only part of a literal (an argument named `x<think`, which a template follows with `>`) gets a
  mark of its own at that end, a *break*: no control token may span it. What a template builds around a whole string of
  the input (`'<|' + role + '|>'`) is the template's own doing; roles are therefore checked before.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

_PRIVATE_USE = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE), (0xE000, 0xF900))
_ESCAPED = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|\\u[ef][0-9a-f]{3}")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation.

    text: str, as the template wrote it.
    protected: ascending, disjoint [start, end) character spans of `text` that hold a caller's literals; start == end is
        a break between two characters. What overlaps a span or crosses a break is text, never a control token.
    """

    text: str
    protected: tuple[Span, ...] = ()


class Hidden:
    """The marks of one conversation: which private-use character stands for which literal."""

    def __init__(self, strings: Iterable[str]):
        """strings: everything that a mark must not occur in; looked through once the first mark is needed."""
        self._unused = _unused_characters(strings)
        self._literal_of_mark: dict[str, str] = {}
        self._mark_of_literal: dict[str, str] = {}

    def mark(self, literal: str) -> str:
        """The mark for `literal`; the empty literal is the break."""
        if literal not in self._mark_of_literal:
            mark = next(self._unused, None)
            if mark is None:
                raise RequestError("the conversation uses every private-use character and also special-token literals")
            self._mark_of_literal[literal] = mark
            self._literal_of_mark[mark] = self._literal_of_mark[_escape(mark)] = literal
        return self._mark_of_literal[literal]

    def reveal(self, rendered: str) -> Rendered:
        """`rendered` with its literals back in place, and where they stand."""
        if not self._literal_of_mark:
            return Rendered(rendered)
        pieces: list[str] = []
        protected: list[Span] = []
        length = done = 0
        for match in re.finditer("|".join(map(re.escape, self._literal_of_mark)), rendered):
            literal = self._literal_of_mark[match.group()]
            pieces += (rendered[done : match.start()], literal)
            start = length + match.start() - done
            length = start + len(literal)
            done = match.end()
            protected.append((start, length))
        pieces.append(rendered[done:])
        return Rendered("".join(pieces), tuple(protected))


class LiteralGuard:
    """Finds and hides the literals of one tokenizer's control tokens.

    tokens: the added tokens' contents, all of them: `<think>` must not be forged any more than `<|im_end|>`.
    normalize: the tokenizer's normalizer when some token is matched after normalization (so that a string that only
        becomes a literal by it is found too), else None.
    """

    def __init__(self, tokens: Sequence[str], normalize: Callable[[str], str] | None = None):
        self.pattern = re.compile(any_of(tokens))
        self._normalize = normalize
        heads = {token[:k] for token in tokens for k in range(1, len(token))}
        self._tail = re.compile(any_of({token[k:] for token in tokens for k in range(1, len(token))}))
        self._head_at_end = re.compile(rf"(?:{any_of(heads)})\Z")
        self._longest_head = max(map(len, heads), default=0)

    def normalized(self, text: str) -> str:
        return text if self._normalize is None else self._normalize(text)

    def hide(self, value: Any, hidden: Hidden) -> Any:
        """A copy of the JSON-like `value` with every literal in its strings, keys included, replaced by its mark."""
        if isinstance(value, str):
            return self.hide_text(value, hidden)
        if isinstance(value, dict):
            return {self.hide_text(key, hidden): self.hide(item, hidden) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, hidden) for item in value]
        return value

    def hide_text(self, text: str, hidden: Hidden, keep: frozenset[Span] = frozenset()) -> str:
        """`text`, normalized, with its literals as marks, except those that stand exactly at a span in `keep`."""
        text = self.normalized(text)
        text = self.pattern.sub(lambda match: match[0] if match.span() in keep else hidden.mark(match[0]), text)
        body = text.strip()  # templates trim: the break must stand inside the white space
        if not body:
            return text
        start = text.index(body)
        end = start + len(body)
        before = hidden.mark("") if self._tail.match(body) else ""
        after = hidden.mark("") if self._head_at_end.search(body, max(len(body) - self._longest_head, 0)) else ""
        return f"{text[:start]}{before}{body}{after}{text[end:]}" if before or after else text

    def find(self, rendered: Rendered) -> tuple[list[Span], list[int]]:
        """The control tokens in `rendered` and where the literals that are text start, both ascending."""
        controls: list[Span] = []
        literals: list[int] = []
        position = i = 0
        protected = rendered.protected
        while match := self.pattern.search(rendered.text, position):
            start, end = match.span()
            while i < len(protected) and protected[i][1] <= start:
                i += 1
            if i < len(protected) and protected[i][0] < end:
                literals.append(start)
                position = start + 1
            else:
                controls.append((start, end))
                position = end
        return controls, literals


def any_of(texts: Collection[str]) -> str:
    """A regular expression for the longest of the texts at a place; for none of them, one that matches nothing."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)"


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def _unused_characters(strings: Iterable[str]) -> Iterator[str]:
    used: set[str] = set()
    for string in strings:
        used.update(string)
        used.update(_ESCAPED.findall(string))
    for first, last in _PRIVATE_USE:
        for mark in map(chr, range(first, last)):
            if mark not in used and _escape(mark) not in used:
                yield mark


def _escape(mark: str) -> str:
    return json.dumps(mark)[1:-1]
