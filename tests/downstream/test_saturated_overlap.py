"""sPRO against a naive loop over every threshold in float64, against AUPRO where regions saturate at their whole area,
and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.integrate import trapezoid

from downstream.metrics import aupro
from downstream.saturated_overlap import Region, area_under_spro

LIMITS = (0.05, 0.3, 1.0)


def random_case(seed: int, levels: int | None = None) -> tuple[NDArray, list[Region]]:
    """Maps of 6 images, the first of which is normal; regions in several pieces, that overlap, of one pixel and large;
    ``levels`` quantises the maps to force ties."""
    rng = np.random.default_rng(seed)
    maps, regions = rng.normal(size=(6, 14, 11)), []
    for image in range(1, 6):
        for _ in range(rng.integers(1, 4)):
            mask = ndimage.uniform_filter(rng.random(maps.shape[1:]), 2) > rng.uniform(0.5, 0.8)
            mask[tuple(rng.integers(0, mask.shape))] = True
            maps[image][mask] += 1
            regions.append(Region(image, mask, float(rng.uniform(0.05, 1))))
    return (maps if levels is None else np.round(maps * levels) / levels), regions


def naive(maps: NDArray, regions: list[Region], limit: float) -> float:
    """Every value of the maps is a threshold, and every region is measured on its own, as the formula says."""
    normal = np.ones(maps.shape, bool)
    for region in regions:
        normal[region.image][region.mask_HW] = False
    fprs, spros = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        hit = maps >= threshold
        fprs.append(float(hit[normal].mean()))
        overlaps = [hit[r.image][r.mask_HW].sum() / (r.enough * r.mask_HW.sum()) for r in regions]
        spros.append(float(np.mean([min(overlap, 1.0) for overlap in overlaps])))
    inside = sum(fpr <= limit for fpr in fprs)
    xs, ys = fprs[:inside], spros[:inside]
    if xs[-1] < limit:
        ys.append(float(np.interp(limit, [xs[-1], fprs[inside]], [ys[-1], spros[inside]])))
        xs.append(limit)
    return float(trapezoid(ys, xs)) / limit


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_of_a_loop_over_all_thresholds(seed: int, levels: int | None) -> None:
    maps, regions = random_case(seed, levels)
    expected = [naive(maps, regions, limit) for limit in LIMITS]
    assert area_under_spro(maps, regions, LIMITS) == pytest.approx(expected, abs=1e-12)
    assert area_under_spro(torch.tensor(maps), regions[::-1], LIMITS) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < expected[1] < expected[2] < 1


def test_regions_that_saturate_at_their_area_have_the_pro() -> None:
    maps, _ = random_case(5)
    masks = np.zeros(maps.shape, bool)
    masks[1, 2:5, 2:5] = masks[1, 8:10, 0:9] = masks[4, :, 3] = True
    maps[masks] += 2
    boxes = [(1, np.s_[2:5, 2:5]), (1, np.s_[8:10, 0:9]), (4, np.s_[:, 3])]
    regions = []
    for image, box in boxes:
        mask = np.zeros(maps.shape[1:], bool)
        mask[box] = True
        regions.append(Region(image, mask, 1.0))
    expected = [aupro(maps, masks, limit) for limit in LIMITS]
    assert area_under_spro(maps, regions, LIMITS) == pytest.approx(expected, abs=1e-12)
    easier = [Region(r.image, r.mask_HW, 0.3) for r in regions]
    assert all(np.array(area_under_spro(maps, easier, LIMITS)) > expected)


def test_what_is_enough_is_enough() -> None:
    """A tenth of a region is found before any normal pixel: perfect if a tenth is enough, half if a fifth is."""
    maps = np.zeros((2, 10, 20))
    mask = np.zeros((10, 20), bool)
    mask[:, :10] = True
    maps[1, 0, :10] = 2.0
    maps[1, 1:, :10] = -1.0  # below all normal pixels
    assert area_under_spro(maps, [Region(1, mask, 0.1)], [0.05]) == pytest.approx([1.0], abs=1e-12)
    assert area_under_spro(maps, [Region(1, mask, 0.2)], [0.05]) == pytest.approx([0.5], abs=1e-12)


def test_without_defects_or_normal_pixels_there_is_no_area() -> None:
    whole = Region(0, np.ones((3, 3), bool), 1.0)
    assert math.isnan(area_under_spro(np.zeros((1, 3, 3)), [], [0.05])[0])
    assert math.isnan(area_under_spro(np.zeros((1, 3, 3)), [whole], [0.05])[0])


@pytest.mark.parametrize(
    ("maps", "region", "limit", "message"),
    [
        (np.zeros((3, 3)), Region(0, np.ones((3, 3), bool), 1.0), 0.05, r"expected \[N, H, W\]"),
        (np.full((1, 3, 3), np.nan), Region(0, np.ones((3, 3), bool), 1.0), 0.05, "9 NaN or infinite values"),
        (np.zeros((1, 3, 3)), Region(0, np.ones((3, 3), bool), 1.0), 0.0, r"limit 0\.0; expected"),
        (np.zeros((1, 3, 3)), Region(1, np.ones((3, 3), bool), 1.0), 0.05, "of image 1; there are 1 maps"),
        (np.zeros((1, 3, 3)), Region(0, np.ones((3, 4), bool), 1.0), 0.05, r"shape \(3, 4\).*expected bool \(3, 3\)"),
        (np.zeros((1, 3, 3)), Region(0, np.zeros((3, 3), bool), 1.0), 0.05, "0 pixels; expected"),
        (np.zeros((1, 3, 3)), Region(0, np.ones((3, 3), bool), 0.0), 0.05, r"enough=0\.0 of a region"),
    ],
)
def test_wrong_input_is_named(maps: NDArray, region: Region, limit: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        area_under_spro(maps, [region], [limit])
