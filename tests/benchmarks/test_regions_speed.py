"""The statistic that calibrates regions, against bisecting the whole map: a ratio of CPU time in one process.

Run by `make bench`. The baseline sorts the values of the map and labels all of it at every step.
"""

from __future__ import annotations

import numpy as np
import pytest
from clock import cpu_seconds, interleaved_cpu_seconds
from numpy.typing import NDArray
from scipy import ndimage

from downstream.regions import peak_of

pytestmark = pytest.mark.benchmark

LEAST = 100  # cells


def bisected(map_HW: NDArray, cells: int) -> float:
    steps = np.unique(map_HW)
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        labels, _ = ndimage.label(map_HW >= steps[middle], structure=np.ones((3, 3)))
        if np.bincount(labels.ravel())[1:].max() >= cells:
            low = middle + 1
        else:
            high = middle
    return float(steps[low - 1])


@pytest.mark.parametrize("sigma", [0, 4])  # noise, and as smooth as maps are
def test_a_photograph_of_twelve_megapixels(sigma: float) -> None:
    noise = np.random.default_rng(0).normal(size=(3000, 4000)).astype(np.float32)
    map_HW = ndimage.gaussian_filter(noise, sigma)
    assert peak_of(map_HW, LEAST) == bisected(map_HW, LEAST)
    seconds = interleaved_cpu_seconds(
        {"ours": lambda: peak_of(map_HW, LEAST), "bisected": lambda: bisected(map_HW, LEAST)}, 2
    )
    ratio = seconds["bisected"] / seconds["ours"]
    print(
        f"\npeak of {LEAST} cells, 3000 x 4000, sigma {sigma}: {seconds['ours']:.2f} s, the whole map bisected "
        f"{seconds['bisected']:.2f} s, {ratio:.0f} x faster"
    )
    assert ratio >= 4  # 12 to 20 here


def test_a_map_of_a_small_photograph() -> None:
    map_HW = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(224, 224)), 4)
    print(f"\npeak of {LEAST} cells, 224 x 224: {1000 * cpu_seconds(lambda: peak_of(map_HW, LEAST), 5):.1f} ms")
    assert peak_of(map_HW, LEAST) == bisected(map_HW, LEAST)
