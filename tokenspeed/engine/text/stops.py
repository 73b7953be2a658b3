"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence

from .reasoning import partial


class StopStrings:
    """Finds the first of some strings, also across pieces. Text that may begin one is held back, and no more."""

    def __init__(self, stops: Sequence[str], include: bool, after: str | None = None):
        """include: the string that was found is part of the text. after: strings count only behind this one, which ends
        the reasoning; None: from the start."""
        self._stops, self._include = tuple(stops), include
        self._after = after or ""
        self._tail = ""  # of the text before `after`, as much as may begin it
        self._held = ""
        self._early = 0  # characters of what is held back in which no string may end

    def push(self, text: str, ends: bool = True) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that was found; nothing may be pushed after one. ends:
        whether one may end in this text; one that only begins in it may be found later, as in vLLM."""
        if not self._stops:
            return text, None
        before = ""
        if self._after:
            passed = self._find_after(text)
            before, text = text[:passed], text[passed:]
        text = self._held + text
        early = self._early if ends else len(text)
        places = [(text.find(stop, max(early + 1 - len(stop), 0)), stop) for stop in self._stops]
        # The one that is complete first; of several that end together, the longest.
        found = [(at + len(stop), -len(stop), stop) for at, stop in places if at >= 0]
        if found:
            end, length, stop = min(found)
            self._held = ""
            return before + text[: end if self._include else end + length], stop
        certain = len(text) - max(partial(text, stop) for stop in self._stops)
        self._held, self._early = text[certain:], max(early - certain, 0)
        return before + text[:certain], None

    def _find_after(self, text: str) -> int:
        """How much of the text is before the end of `after`."""
        both = self._tail + text
        end = both.find(self._after)
        if end < 0:
            self._tail = both[len(both) - len(self._after) + 1 :] if len(both) >= len(self._after) else both
            return len(text)
        passed = end + len(self._after) - len(self._tail)
        self._after = self._tail = ""
        return passed

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
