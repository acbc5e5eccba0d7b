"""FeatureNorm: the norm of a pretrained feature is its anomaly score (ADPretrain Sec. 4.1).

Shapes: B images, S side in pixels, L levels, K references.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from adpretrain.artefact import NORMS
from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from downstream.detector import Prediction


def gaussian_blur(maps_BSS: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing in pixels, truncated at 4 sigma with reflected borders, as scipy.ndimage does: [B, S, S]."""
    if sigma <= 0:
        return maps_BSS
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


class FeatureNorm:
    """Feature norm -> level maps -> bilinear upsampling -> mean over levels -> Gaussian (sigma in pixels) -> score.

    ``extract`` is an `ADExtractor` (its references are set by `fit`) or any raw backbone (nothing is fitted: the
    plain norm, the paper's weakest baseline). ``norm``: "l2" = ||x||_2, or "released" = sqrt(||x|| + 1) - 1, the
    authors' code; None = the extractor's own ("l2" for a raw backbone). ``top``: the image score is the mean of this
    share of the highest map values; 0 = the maximum, as in the paper. One per cent is the default because a mean
    over a patch is steadier than one pixel.
    """

    def __init__(
        self, extract: Extract, image_size: int = 224, sigma: float = 4.0, norm: str | None = None, top: float = 0.01
    ) -> None:
        if norm is None:
            norm = extract.config.norm if isinstance(extract, ADExtractor) else "l2"
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is unknown; choose one of {NORMS}")
        if not 0 <= top <= 1:
            raise ValueError(f"top {top} must be a share of the map's pixels, between 0 (the maximum) and 1")
        self.extract, self.image_size, self.sigma, self.norm, self.top = extract, image_size, sigma, norm, top

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """Set the extractor's references to these images: batches [b, 3, S, S], K in all."""
        if isinstance(self.extract, ADExtractor):
            self.extract.set_references(torch.cat(list(normal_batches)))
        return self

    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]."""
        with torch.no_grad():
            return self.from_features(self.extract(images))

    def leave_one_out(self, images: Tensor) -> Prediction:
        """Score each of K normal photographs [K, 3, S, S] against the other K - 1. Raises ValueError if K < 2."""
        if not isinstance(self.extract, ADExtractor):
            raise ValueError("leave-one-out needs an ADExtractor: a raw backbone has no references to leave out")
        shots = images.shape[0]
        if shots < 2:
            raise ValueError(f"leave-one-out needs at least 2 references, got {shots}")
        banks = self.extract.encode_references(images)
        parts = []
        for image in range(shots):
            keep = [index for index in range(shots) if index != image]
            others = [bank.unflatten(1, (shots, -1))[:, keep].flatten(1, 2) for bank in banks]
            parts.append(self.from_features(self.extract(images[image : image + 1], others)))
        return Prediction(torch.cat([p.scores for p in parts]), torch.cat([p.maps for p in parts]))

    def from_features(self, features: FeatureMaps) -> Prediction:
        """L levels [B, C_l, H_l, W_l] -> prediction."""
        size = (self.image_size, self.image_size)
        total = torch.zeros(features[0].shape[0], *size, device=features[0].device)
        for feature in features:
            norm = feature.float().norm(dim=1, keepdim=True)
            if self.norm == "released":
                norm = (norm + 1).sqrt() - 1
            total += F.interpolate(norm, size=size, mode="bilinear", align_corners=True)[:, 0]
        maps = gaussian_blur(total / len(features), self.sigma)
        count = max(1, round(self.top * maps[0].numel()))
        return Prediction(maps.flatten(1).topk(count).values.mean(1), maps)
