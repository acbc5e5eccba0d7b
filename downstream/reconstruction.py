"""Cosine distances between features and what a network reconstructs of them: losses and maps.

A *pair* is a level of the features that are reconstructed, the target, and its reconstruction, both [B, C, H, W].
``inside`` says which places count: 1 inside the region of interest, 0 outside, [B, H, W].

Shapes: B images, L levels, C channels, H x W places of a level, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.backbones import FeatureMaps
from downstream.maps import upsample
from downstream.roi import RegionOfInterest

Pair = tuple[Tensor, Tensor]


def cosine_distance(target: Tensor, found: Tensor) -> Tensor:
    """1 - the cosine of two arrays' vectors along dimension 1 (ReContrast Eq. 1): [B, C, ...] -> [B, ...] in 0..2.

    It is half the squared difference of the unit vectors, which is the same number without the cancellation of
    1 - cosine where vectors nearly agree. A vector of zeros has distance 1/2 to any other and 0 to zeros.
    """
    unit, other = F.normalize(target.float(), dim=1), F.normalize(found.float(), dim=1)
    return (unit - other).square().sum(1) / 2


def inside_of(levels: FeatureMaps, region: RegionOfInterest | None) -> list[Tensor]:
    """Which places of each level [B, C, H, W] are inside the region, 1.0 or 0.0: [B, H, W]."""
    grids = [level_BCHW[:, 0] for level_BCHW in levels]
    if region is None:
        return [torch.ones_like(grid_BHW, dtype=torch.float32) for grid_BHW in grids]
    return [region.inside(grid_BHW).float() for grid_BHW in grids]


def within(levels: FeatureMaps, inside: Sequence[Tensor]) -> FeatureMaps:
    """The levels in float32 with zeros outside the region, so that a network never sees what is there."""
    return [level.float() * mask_BHW[:, None] for level, mask_BHW in zip(levels, inside, strict=True)]


def regional_loss(pair: Pair, inside_BHW: Tensor) -> Tensor:
    """The mean distance of the places of an image, and the mean of that over images (ReContrast Eq. 2, one level)."""
    distance_BHW = cosine_distance(*pair) * inside_BHW
    return (distance_BHW.sum((1, 2)) / inside_BHW.sum((1, 2))).mean()


def global_loss(pair: Pair, inside_BHW: Tensor) -> Tensor:
    """The distance of the whole levels, each flattened to one vector, a mean over images (ReContrast Eq. 3)."""
    target, found = ((part.float() * inside_BHW[:, None]).flatten(1) for part in pair)
    return cosine_distance(target, found).mean()


def eased(found_BCHW: Tensor, easy_BHW: Tensor, factor: float) -> Tensor:
    """The same values, but the gradient of ``easy`` places is multiplied by ``factor``; 0 discards it (Eq. 5).

    The difference that is scaled is zero, so no value changes by rounding.
    """
    fixed = found_BCHW.detach()
    scale_BHW = torch.where(easy_BHW, factor, 1.0)
    return fixed + (found_BCHW - fixed) * scale_BHW[:, None]


def summed_maps(pairs: Sequence[Pair], side: int, region: RegionOfInterest | None) -> Tensor:
    """The distances of all pairs, upsampled and added: [B, S, S]."""
    maps = [upsample(cosine_distance(*pair), side, region=region) for pair in pairs]
    return torch.stack(maps).sum(0)
