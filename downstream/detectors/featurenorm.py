"""FeatureNorm: the norm of a pretrained feature is its anomaly score (ADPretrain Sec. 4.1).

Shapes: B images, S side in pixels, L levels, K references.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.saved import NORMS
from downstream.detector import Prediction, check_images, extracted, keeping_references, not_fitted
from downstream.maps import check_sigma, gaussian_blur, upsample
from downstream.pretrained import Pretrained
from downstream.saved import Loaded, save_detector

NAME = "featurenorm"
SIDE = 224


@dataclass(frozen=True)
class FeatureNormOptions:
    """The arguments of `FeatureNorm`, as they are saved."""

    image_size: int = SIDE
    sigma: float = 4.0
    norm: str | None = None
    top: float = 0.01


DEFAULT = FeatureNormOptions()
ADPRETRAIN = FeatureNormOptions(top=0.0)  # ADPretrain's evaluation: the maximum of the map is the image's score


class FeatureNorm(Pretrained):
    """Feature norm -> level maps -> bilinear upsampling -> mean over levels -> Gaussian (sigma in pixels) -> score.

    ``extract`` is an `ADExtractor` (`fit` gives references to the detector's own copy of it, and leaves the given one
    alone) or any raw backbone (nothing is fitted: the plain norm, the paper's weakest baseline). ``image_size``: side
    of the maps in pixels; None = that of the extract's input, 224 for a function that has no ``preprocess``. ``norm``:
    "l2" = ||x||_2, or "released" = sqrt(||x|| + 1) - 1, the authors' code; None = the extractor's own ("l2" for a raw
    backbone). ``top``: the image score is the mean of this share of the highest map values; 0 = the maximum, as in the
    paper. One per cent is the default because a mean over a patch is steadier than one pixel.
    """

    saved_as = (NAME, FeatureNormOptions)

    def __init__(
        self,
        extract: Extract,
        image_size: int | None = None,
        sigma: float = 4.0,
        norm: str | None = None,
        top: float = 0.01,
    ) -> None:
        if image_size is None:
            preprocess = getattr(extract, "preprocess", None)
            image_size = preprocess.image_size if isinstance(preprocess, Preprocess) else SIDE
        if norm is None:
            norm = extract.config.norm if isinstance(extract, ADExtractor) else "l2"
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r} is unknown; choose one of {NORMS}")
        check_sigma(sigma)
        if image_size < 1:
            raise ValueError(f"image_size {image_size}, the side of the maps in pixels, must be at least 1")
        if not 0 <= top <= 1:
            raise ValueError(f"top {top} must be a share of the map's pixels, between 0 (the maximum) and 1")
        self.extract = self._given = extract
        self.image_size, self.sigma, self.norm, self.top = image_size, sigma, norm, top

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """Take these images as references: batches [b, 3, S, S], K in all; a raw backbone reads none.

        Raises ValueError without images, or for bad ones.
        """
        extract = keeping_references(self._given)
        if isinstance(extract, ADExtractor):
            batches = list(normal_batches)
            if not batches:
                raise ValueError("no normal images to use as references: normal_batches is empty")
            for images in batches:
                check_images(images)
            self.extract = extract.set_references(torch.cat(batches))
        return self

    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, image_size, image_size].

        Raises ValueError for bad images, or for an extractor without references: neither set nor from `fit`.
        """
        with torch.no_grad():
            return self.from_features(extracted(self.extract, images))

    def leave_one_out(self, images: Tensor) -> Prediction:
        """Score each of K normal photographs [K, 3, S, S] against the other K - 1. Raises ValueError if K < 2."""
        if not isinstance(self.extract, ADExtractor):
            raise ValueError("leave-one-out needs an ADExtractor: a raw backbone has no references to leave out")
        return self.from_features(self.extract.leave_one_out(images))

    def from_features(self, features: FeatureMaps) -> Prediction:
        """L levels [B, C_l, H_l, W_l] -> scores [B], maps [B, image_size, image_size]."""
        total = torch.zeros(features[0].shape[0], self.image_size, self.image_size, device=features[0].device)
        for feature in features:
            norm = feature.float().norm(dim=1)
            if self.norm == "released":
                norm = (norm + 1).sqrt() - 1
            total += upsample(norm, self.image_size, align_corners=True)
        maps = gaussian_blur(total / len(features), self.sigma)
        count = max(1, round(self.top * maps[0].numel()))
        return Prediction(maps.flatten(1).topk(count).values.mean(1), maps)

    @property
    def options(self) -> FeatureNormOptions:
        """The arguments it was made with."""
        return FeatureNormOptions(self.image_size, self.sigma, self.norm, self.top)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted detector: its extractor and REFERENCE BANKS, features of the product (`downstream.saved`).

        Raises ValueError before `fit`, or if ``folder`` holds other files.
        """
        if isinstance(self.extract, ADExtractor) and self.extract.references is None:
            raise not_fitted(self)
        preprocess = getattr(self.extract, "preprocess", None)
        side = preprocess.image_size if preprocess else self.image_size
        return save_detector(folder, NAME, self.options, self.extract, {}, side)

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        return cls(loaded.extract, **dataclasses.asdict(loaded.options))
