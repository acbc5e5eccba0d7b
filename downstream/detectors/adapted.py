"""Backbones that want their images prepared differently, fed with the same images: for ensembles (PatchCore Tab. 4).

Shapes: B images, S side of the images as given, S' side that the backbone takes, L levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adpretrain.backbones import Backbone, FeatureMaps
from adpretrain.preprocess import Preprocess


class Adapted(nn.Module):
    """An `Extract` for images that were prepared by ``images`` instead of the backbone's own preprocessing.

    [B, 3, S, S] -> normalisation undone, resized to S' (bilinear, antialiased), normalised for ``backbone`` -> its
    levels. Both see the same part of a photograph, the one that ``images`` crops. Enlarging adds nothing: prepare the
    images for the largest network of an ensemble.
    """

    def __init__(self, backbone: Backbone, images: Preprocess) -> None:
        super().__init__()
        self.backbone, self.preprocess = backbone, images
        self.eval()

    @property
    def channels(self) -> list[int]:
        """C_l of each level."""
        return self.backbone.channels

    @torch.no_grad()
    def forward(self, images: Tensor) -> FeatureMaps:
        """Raises ValueError for images of another size than ``images`` makes."""
        given, wanted = self.preprocess, self.backbone.preprocess
        if images.shape[-1] != given.image_size:
            raise ValueError(f"expected images of {given.image_size} pixels, got {tuple(images.shape)}")
        plain = images.float() * _column(given.std, images) + _column(given.mean, images)
        if wanted.image_size != given.image_size:
            size = (wanted.image_size, wanted.image_size)
            plain = F.interpolate(plain, size, mode="bilinear", align_corners=False, antialias=True)
        return self.backbone((plain - _column(wanted.mean, images)) / _column(wanted.std, images))


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None, None]
