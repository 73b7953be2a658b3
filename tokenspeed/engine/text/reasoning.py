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
        self._opened = opened
        self._state = self._start
        self._held = ""  # text that cannot be told yet: part of a tag, or white space that may be at an end

    def push(self, text: str) -> Split:
        """What `text` makes certain; at most a tag's length and the white space around it are held back."""
        self._held += text
        return self._state(final=False)

    def finish(self) -> Split:
        """What is left at the end of the turn."""
        return self._state(final=True)

    def _start(self, final: bool) -> Split:
        body = self._held.lstrip()
        if not final and OPEN.startswith(body[: len(OPEN)]) and len(body) < len(OPEN):
            return Split("", "")
        if body.startswith(OPEN):
            self._held = body[len(OPEN) :]
        elif not self._opened:
            self._state = self._content
            return self._state(final)
        self._held = self._held.lstrip()
        self._state = self._reasoning_start
        return self._state(final)

    def _reasoning_start(self, final: bool) -> Split:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._reasoning
            return self._state(final)
        return Split("", "")

    def _reasoning(self, final: bool) -> Split:
        reasoning, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._held = rest
            self._state = self._content_start
            return Split(reasoning.rstrip(), self._state(final).content)
        known = len(self._held) if final else len(self._held) - partial(self._held, CLOSE)
        known = len(self._held[:known].rstrip())
        reasoning, self._held = self._held[:known], self._held[known:]
        return Split(reasoning, "")

    def _content_start(self, final: bool) -> Split:
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._content
            return self._state(final)
        return Split("", "")

    def _content(self, final: bool) -> Split:
        content, self._held = self._held, ""
        return Split("", content)


def partial(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
