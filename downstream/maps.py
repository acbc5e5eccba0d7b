"""Turn patch scores into pixel scores by bilinear upsampling, then Gaussian smoothing (PatchCore Sec. 3.3).

Shapes: B images, H x W patches, S side of the network's input in pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from downstream.roi import RegionOfInterest

SIGMA = 4.0  # pixels; PatchCore, PaDiM, SPADE and ADPretrain all use it


def check_sigma(sigma: float) -> None:
    """Raise ValueError unless ``sigma`` is a number of pixels, 0 (no smoothing) or more."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma {sigma} must be a number of pixels, such as 4, or 0 for no smoothing")


def check_top(top: float) -> None:
    """Raise ValueError unless ``top`` is a share, 0 (only the maximum) to 1."""
    if not 0 <= top <= 1:
        raise ValueError(f"top {top} must be a share of the map's values, between 0 (the maximum) and 1")


def pixel_maps(grid_BHW: Tensor, size: int, sigma: float = SIGMA, region: RegionOfInterest | None = None) -> Tensor:
    """Turn patch scores [B, H, W] into smoothed maps [B, S, S]. ``sigma`` is in pixels; 0 = no smoothing. Patches
    outside the region count for nothing."""
    return gaussian_blur(upsample(grid_BHW, size, region=region), sigma)


def highest(maps_BSS: Tensor, top: float = 0.0, region: RegionOfInterest | None = None) -> Tensor:
    """The mean of the highest ``top`` share of every map's values in the region; 0 = the maximum: [B]."""
    if region is not None:
        return torch.cat([highest(values_Bn[:, None], top) for values_Bn in region.values(maps_BSS)])
    count = max(1, round(top * maps_BSS[0].numel()))
    return maps_BSS.flatten(1).topk(count).values.mean(1) if count > 1 else maps_BSS.flatten(1).amax(1)


def highest_tokens(grid_BHW: Tensor, top: float, region: RegionOfInterest | None = None) -> Tensor:
    """The mean of the highest ``top`` share of every image's patch scores in the region, before upsampling: [B]."""
    values = [grid_BHW.flatten(1)] if region is None else region.tokens(grid_BHW)
    return torch.cat([highest(values_Bn[:, None], top) for values_Bn in values])


def upsample(
    grid_BHW: Tensor, size: int, align_corners: bool = False, region: RegionOfInterest | None = None
) -> Tensor:
    """Upsample bilinearly: [B, H, W] -> [B, S, S]; cells outside the region take the value of the nearest one inside.
    Raises ValueError for a grid or a map without pixels."""
    if size < 1 or min(grid_BHW.shape[1:]) < 1:
        raise ValueError(
            f"cannot upsample a grid of {tuple(grid_BHW.shape[1:])} patches to a map of {size} pixels: need at least 1"
        )
    grid_BHW = grid_BHW if region is None else region.filled(grid_BHW)
    return F.interpolate(grid_BHW[:, None], (size, size), mode="bilinear", align_corners=align_corners)[:, 0]


def gaussian_blur(maps_BSS: Tensor, sigma: float) -> Tensor:
    """Smooth with a Gaussian, truncated at 4 sigma with reflected borders, as scipy.ndimage does: [B, S, S].

    Raises ValueError for a sigma larger than the map, negative or NaN.
    """
    check_sigma(sigma)
    if sigma == 0:
        return maps_BSS
    if not sigma <= maps_BSS.shape[-1]:
        raise ValueError(f"sigma {sigma} is wider than the map of {maps_BSS.shape[-1]} pixels")
    radius = int(4.0 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=maps_BSS.dtype, device=maps_BSS.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    maps = maps_BSS[:, None]
    for side, shape in ((maps.shape[2], (1, 1, -1, 1)), (maps.shape[3], (1, 1, 1, -1))):
        index = torch.arange(-radius, side + radius, device=maps.device) % (2 * side)
        index = torch.where(index < side, index, 2 * side - 1 - index)  # ... 1 0 | 0 1 2 ... : scipy's "reflect"
        maps = maps.index_select(2 if shape[2] == -1 else 3, index)
        maps = F.conv2d(maps, kernel.view(shape))
    return maps[:, 0]
