"""Perturbed images look as if another camera had taken them (ReConPatch Tab. 4, suppl. C.1): rotated by up to 5 degrees,
shifted by up to 1 % of the side, brightness and contrast changed by up to 30 %, blurred with sigma .1 to 1. The paper
leaves open, and we chose: every image gets all changes, drawn uniformly; they are applied to the network's input, in
this order; the border is filled with the mirrored image, because black corners would be defects themselves; and only
the images to score are changed, so that the detector was not fitted on such changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adpretrain.data import ImageDataset, Sample
from adpretrain.preprocess import Preprocess
from downstream.maps import gaussian_blur

ANGLE, SHIFT, LIGHT, SIGMA = 5.0, 0.01, 0.3, (0.1, 1.0)
SAID = (
    f"the scored images were turned by up to {ANGLE:g} degrees, shifted by up to {SHIFT:.0%} of the side, changed in "
    f"brightness and contrast by up to {LIGHT:.0%} and blurred with sigma {SIGMA[0]:g} to {SIGMA[1]:g} pixels"
)


@dataclass(frozen=True)
class Perturbation:
    """The change of one image: ``angle`` in degrees, counter-clockwise; ``shift`` to the right and down, as shares of
    the side; ``brightness`` and ``contrast`` as factors; ``sigma`` of the blur in pixels."""

    angle: float
    shift: tuple[float, float]
    brightness: float
    contrast: float
    sigma: float

    @classmethod
    def draw(cls, seed: int, index: int) -> Perturbation:
        """Draw the change of image ``index`` with ``seed``."""
        rng = np.random.default_rng([seed, index])
        angle, (right, down) = rng.uniform(-ANGLE, ANGLE), rng.uniform(-SHIFT, SHIFT, 2)
        brightness, contrast = rng.uniform(1 - LIGHT, 1 + LIGHT, 2)
        return cls(float(angle), (float(right), float(down)), float(brightness), float(contrast), rng.uniform(*SIGMA))

    def picture(self, pixels_3SS: Tensor) -> Tensor:
        """Change an image, RGB in 0..1."""
        moved = self._moved(pixels_3SS, "bilinear")
        lit = (moved * self.brightness).clamp(0, 1)
        gray = (lit * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).mean()
        return gaussian_blur((gray + self.contrast * (lit - gray)).clamp(0, 1), self.sigma)

    def mask(self, mask_SS: Tensor) -> Tensor:
        """Move a mask as the image is moved: bool [S, S]."""
        return self._moved(mask_SS[None].float(), "nearest")[0] > 0.5

    def _moved(self, values_CSS: Tensor, mode: str) -> Tensor:
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        turn = torch.tensor([[cosine, -sine], [sine, cosine]])  # from output to input coordinates
        back = -2 * turn @ torch.tensor(self.shift)  # the image is 2 wide in these coordinates
        grid = F.affine_grid(torch.cat([turn, back[:, None]], 1)[None], [1, *values_CSS.shape], align_corners=False)
        return F.grid_sample(values_CSS[None], grid, mode, padding_mode="reflection", align_corners=False)[0]


class PerturbedImages(ImageDataset):
    """An `ImageDataset` whose images and masks are perturbed, each by a change drawn from (seed, index)."""

    def __init__(self, samples: Sequence[Sample], preprocess: Preprocess, seed: int) -> None:
        super().__init__(samples, preprocess)
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, change = super().__getitem__(index), Perturbation.draw(self.seed, index)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocess.mean, self.preprocess.std))
        picture = change.picture(item["image"] * std + mean)
        return {**item, "image": (picture - mean) / std, "mask": change.mask(item["mask"])}
