"""Whether a Step drafts: where drafts bring more ids than they cost time. What they bring is measured of each sequence,
what they cost at start; there is no clock here, so the same ids give the same Steps.

Why each sequence has a measure of its own, from a fixed beginning on: the kernels' rounding depends on how many rows a
Step has, and what others said before must not show in a request's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

_SHARE = 0.6  # of drafts that are taken to be right before any was verified
_LATEST, _AFRESH = 0.05, 0.5  # weight of the latest verified drafts, and of those behind Steps without
_MARGIN = 0.95  # of their cost that drafts must bring: less than what they bring fluctuates, so they are not given up
_TRIED = 0.025  # of the time that trying drafts again may take where they bring nothing


@dataclass(slots=True)
class Fortune:
    """How a sequence's drafts fared: share: of the drafts of a Step that were right, smoothed; steps: that verified
    some; last: number of the latest of them, or of a Step for which the sequence has none, though others do."""

    share: float = _SHARE
    steps: int = 0
    last: int = -1

    def note(self, step: int, share: float) -> None:
        """Step number `step` verified drafts of which that share was right."""
        if step == self.last:
            return
        weight = _LATEST if step == self.last + 1 else _AFRESH
        self.share += max(weight, 1 / (2 + self.steps)) * (share - self.share)
        self.steps, self.last = self.steps + 1, step


class Drafting:
    """costs: as `Limits.draft_costs`; left_out: Steps without drafts because these would not have paid."""

    def __init__(self, costs: tuple[tuple[int, float], ...]):
        self._costs, self._beyond = costs, costs[-1][1] if costs else 0.0  # of more sequences than were timed
        self._since = self.left_out = 0  # Steps since one with drafts

    def pays(self, fortunes: Sequence[Fortune], drafts: int) -> bool:
        """Whether the next Step of these sequences makes as many drafts, or tries them. Asked once for each."""
        cost = next((cost for limit, cost in self._costs if len(fortunes) <= limit), self._beyond)
        brought = sum(1 + drafts * fortune.share for fortune in fortunes) if cost else 0.0
        if brought >= _MARGIN * cost * len(fortunes) or self._since >= ceil((cost - 1) / _TRIED):
            self._since = 0
            return True
        self._since += 1
        self.left_out += 1
        return False
