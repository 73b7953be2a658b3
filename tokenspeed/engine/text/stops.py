"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of some strings, also across pieces. Text that may begin one is held back, and no more."""

    def __init__(self, stops: Sequence[str], include: bool):
        """include: the string that was found is part of the text."""
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that was found; nothing may be pushed after one."""
        if not self._stops:
            return text, None
        text = self._held + text
        # The one that is complete first; of several that end together, the longest.
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, length, stop = min(found)
            return text[: end if self._include else end + length], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that begin the stop string, as many as possible."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
