"""Ranks among numbers that come one after another, against counting them all."""

from __future__ import annotations

import numpy as np

from downstream.ascending import RECENT, Ascending


def test_ranks_are_those_of_counting_all() -> None:
    """Many ties, and more numbers than are inserted one by one, so that they have been merged twice."""
    values = np.random.default_rng(0).integers(0, 300, 2 * RECENT + 50) / 7
    numbers = Ascending(values[:5])
    for index in range(5, len(values)):
        if index % 97 == 0 or index > 2 * RECENT:
            earlier, value = values[:index], values[index]
            assert numbers.above(value) == ((earlier > value).sum(), (earlier == value).sum())
        numbers.insert(values[index])
    assert len(numbers) == len(values)
