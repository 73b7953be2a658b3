"""Taking the reasoning off the front of an assistant turn, as the text comes."""

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Split(NamedTuple):
    """What one piece of text adds to each side."""

    reasoning: str
    content: str


def leaves_reasoning_open(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a `<think>` block, so that the turn begins with reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Splits a turn at its first `</think>`; the pieces' borders do not matter.

    The reasoning is stripped of white space, as chat templates strip it, and so is the start of the content after it.
    A `<think>` that the turn begins with opens the reasoning, or repeats the opening of the prompt. Tags that come
    later are text. A turn that ends inside its reasoning has no content.
    """

    def __init__(self, opened: bool):
        """opened: whether the prompt leaves the reasoning open (`leaves_reasoning_open`)."""
        self.inside = opened  # the text so far ends in the reasoning
        self._state = self._start
        self._space: list[str] = []  # white space that the turn begins with
        self._held = ""  # after it, what may be part of a tag
        self._reasoned = Trimmer()

    def push(self, text: str) -> Split:
        """What `text` makes certain; at most a tag's length and the white space around it are held back."""
        self._held += text
        return self._state(final=False)

    def finish(self) -> Split:
        """What is left at the end of the turn."""
        return self._state(final=True)

    def _start(self, final: bool) -> Split:
        body = self._held.lstrip()
        self._space.append(self._held[: len(self._held) - len(body)])  # so that no later piece looks at it again
        self._held = body
        if not final and len(body) < len(OPEN) and OPEN.startswith(body):
            return Split("", "")
        if body.startswith(OPEN):
            self._held, self.inside = body.removeprefix(OPEN), True
        elif not self.inside:
            self._held = "".join((*self._space, body))
            self._state = self._content
            return self._state(final)
        self._state = self._reasoning
        return self._state(final)

    def _reasoning(self, final: bool) -> Split:
        reasoning, closed, rest = self._held.partition(CLOSE)
        if closed:
            self.inside, self._held, self._state = False, rest, self._content_start
            return Split(self._reasoned.push(reasoning), self._state(final).content)
        known = len(self._held) - (0 if final else partial(self._held, CLOSE))
        reasoning, self._held = self._held[:known], self._held[known:]
        return Split(self._reasoned.push(reasoning), "")

    def _content_start(self, final: bool) -> Split:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._content
        return self._content(final)

    def _content(self, final: bool) -> Split:
        content, self._held = self._held, ""
        return Split("", content)


class Trimmer:
    """Text without the white space at its ends, as it comes: white space waits for what follows it."""

    def __init__(self, begun: bool = False):
        """begun: the text goes on with what stands before it, so its first white space counts."""
        self._begun = begun
        self._space: list[str] = []

    def push(self, text: str) -> str:
        """What `text` makes certain."""
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return ""
        told = "".join((*self._space, body)) if self._begun else body.lstrip()
        self._begun, self._space = True, [text[len(body) :]]
        return told


def partial(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
