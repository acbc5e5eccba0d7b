"""`Ascending`: numbers that come one after another, in ascending order, so that each new one can be ranked."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

import numpy as np

RECENT = 4096  # numbers that are inserted one by one before they are merged with the others


class Ascending:
    """Numbers in ascending order, 8 bytes each.

    Inserting into one long list moves half of it each time: ten million numbers would take a day. Here the newest are
    in a short list, which is merged into an array [n] when it is full.
    """

    def __init__(self, numbers: Iterable[float] = ()) -> None:
        self._merged = np.empty(0)
        self._recent = sorted(numbers)

    def __len__(self) -> int:
        return len(self._merged) + len(self._recent)

    def insert(self, number: float) -> None:
        """Add a number; NaN has no place in an order and must not be given."""
        insort(self._recent, number)
        if len(self._recent) >= RECENT:
            self._merged = np.sort(np.concatenate([self._merged, self._recent]), kind="stable")  # merges sorted runs
            self._recent = []

    def above(self, number: float) -> tuple[int, int]:
        """Count the numbers above ``number``, and those equal to it."""
        left, right = bisect_left(self._recent, number), bisect_right(self._recent, number)
        if len(self._merged):
            left += int(self._merged.searchsorted(number, "left"))
            right += int(self._merged.searchsorted(number, "right"))
        return len(self) - right, right - left
