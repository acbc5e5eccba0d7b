"""sPRO, the saturated per-region overlap of MVTec LOCO (Bergmann et al. 2022, Sec. 4): how well maps cover regions of
which a part is enough, such as the place where one of many pushpins is missing.

The sPRO at a threshold is the mean over all m regions A_i of min(|A_i and P| / s_i, 1), where P are the pixels called
anomalous and s_i is the region's saturation area. With s_i = |A_i| it is the PRO. The area is that under sPRO over the
pixel false positive rate, as AUPRO's in `metrics`: exact, and divided by the limit. A pixel is normal if no region
holds it. A region is what one mask file marks; it may be in several pieces and overlap others of its image.

Shape legend: N images, H x W pixels, A anomalous pixels, n pixels of a region.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from downstream.metric_counts import area_under_pro, count, real_numbers


@dataclass(frozen=True)
class Region:
    """A defect: the number of its image, its pixels (bool [H, W]), and the share of them, in (0, 1], that is enough."""

    image: int
    mask_HW: NDArray[np.bool_]
    enough: float


def area_under_spro(maps_NHW: ArrayLike, regions: Sequence[Region], limits: Sequence[float]) -> list[float]:
    """Return the area under the sPRO curve up to each false positive rate of ``limits``, divided by it.

    maps_NHW: [N, H, W], any real unit; arrays or tensors. nan without regions or without normal pixels. Raises
    ValueError for NaN or infinite values, a limit or a share outside (0, 1], and a region that is empty, of another
    size than the maps, or of an image that is not there.
    """
    maps = real_numbers(maps_NHW, "maps")
    if maps.ndim != 3 or maps.size == 0:
        raise ValueError(f"maps have shape {maps.shape}; expected [N, H, W] with at least one image and pixel")
    if wrong := [limit for limit in limits if not 0 < limit <= 1]:
        raise ValueError(f"limit {wrong[0]}; expected a false-positive rate in (0, 1], usually 0.05 or 0.3")
    own: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        _check(region, maps)
        own[region.image].append(region)
    labels_NHW, weights = np.zeros(maps.shape, dtype=bool), [np.empty(0)]
    for image, found in sorted(own.items()):
        total_HW = np.zeros(maps.shape[1:])
        for region in found:
            total_HW[region.mask_HW] += _gains(maps[image][region.mask_HW], region.enough) / len(regions)
            labels_NHW[image] |= region.mask_HW
        weights.append(total_HW[labels_NHW[image]])
    counts = count(maps, labels_NHW, np.concatenate(weights))
    return [area_under_pro(counts, limit) for limit in limits]


def _gains(scores_n: NDArray[np.floating], enough: float) -> NDArray[np.float64]:
    """Return what each pixel of a region adds to min(covered pixels / saturation area, 1) when pixels are covered from
    the highest score to the lowest. Of tied scores only the sum is ever used, so that their order does not matter."""
    covered = np.arange(len(scores_n) + 1)
    overlap = np.minimum(covered / (enough * len(scores_n)), 1.0)
    gains_n = np.empty(len(scores_n))
    gains_n[np.argsort(-scores_n, kind="stable")] = np.diff(overlap)
    return gains_n


def _check(region: Region, maps: NDArray[np.floating]) -> None:
    if not 0 <= region.image < len(maps):
        raise ValueError(f"a region is of image {region.image}; there are {len(maps)} maps, counted from 0")
    if region.mask_HW.shape != maps.shape[1:] or region.mask_HW.dtype != bool or not region.mask_HW.any():
        raise ValueError(
            f"a region of image {region.image} has shape {region.mask_HW.shape}, type {region.mask_HW.dtype} and "
            f"{int(region.mask_HW.sum())} pixels; expected bool {maps.shape[1:]} with at least one"
        )
    if not 0 < region.enough <= 1:
        raise ValueError(f"enough={region.enough} of a region; expected a share of its pixels in (0, 1]")
