"""FeatureNorm: the norm of a pretrained feature is its anomaly score (ADPretrain Sec. 4.1).

Shapes: B images, S side in pixels, L levels, K references.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.preprocess import Preprocess
from adpretrain.progress import Progress
from adpretrain.saved import NORMS
from downstream.detector import Detector, Prediction, check_images
from downstream.extracts import keeping_references
from downstream.maps import SIGMA, check_sigma, check_top, gaussian_blur, highest, upsample
from downstream.roi import RegionOfInterest, bank_within

SIDE = 224


@dataclass(frozen=True)
class FeatureNormConfig:
    """Options of `FeatureNorm`.

    Args:
        image_size: side of the maps in pixels; null = that of the extract's input, or 224 if the extract is a function
            without ``preprocess``.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        norm: "l2" = ||x||_2, or "released" = sqrt(||x|| + 1) - 1, as in the authors' code; null = the norm that the
            extractor was trained with ("l2" for a raw backbone).
        top: the image score is the mean of this share of the highest map values; 0 = the maximum, as in the paper. The
            default is 1 % because a mean over many pixels is more stable than one pixel.
    """

    image_size: int | None = None
    sigma: float = SIGMA
    norm: str | None = None
    top: float = 0.01

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if self.norm is not None and self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is unknown; choose one of {NORMS}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size {self.image_size}, the side of the maps in pixels, must be at least 1")
        check_top(self.top)


DEFAULT = FeatureNormConfig()
ADPRETRAIN = FeatureNormConfig(top=0.0)  # in ADPretrain's evaluation, the score is the maximum of the map


class FeatureNorm(Detector):
    """Feature norm -> level maps -> bilinear upsampling -> mean over levels -> Gaussian (sigma in pixels) -> score.

    On an `ADExtractor`, fitting sets the references of the detector's copy of it; an extractor that already has
    references needs no fitting. On a raw backbone nothing is fitted: its plain norm is the paper's weakest baseline.
    """

    name = "featurenorm"
    options = FeatureNormConfig
    references_are: ClassVar[Literal["fitted", "chosen"]] = "fitted"

    def __init__(self, extract: Extract, config: FeatureNormConfig = DEFAULT) -> None:
        preprocess = getattr(extract, "preprocess", None)
        input_side = preprocess.image_size if isinstance(preprocess, Preprocess) else None
        network = getattr(extract, "extractor", extract)  # the extractor in an `evaluation.networks.Withheld`
        norm = network.config.norm if isinstance(network, ADExtractor) else "l2"
        image_size = config.image_size or input_side or SIDE
        super().__init__(extract, replace(config, image_size=image_size, norm=config.norm or norm))
        self.side = input_side or image_size

    @property
    def fitted(self) -> bool:
        """Whether the detector has references or does not need any."""
        extract = self.extract
        if not isinstance(extract, ADExtractor) or extract.config.matching == "none":
            return True
        return extract.references is not None

    def fit(
        self, normal_batches: Iterable[Tensor], progress: Progress | None = None, roi: Tensor | None = None
    ) -> Self:
        """Set the references: batches [b, 3, S, S], K images in all; with a raw backbone they are not read.

        ``roi``: as in `Detector.fit`. Raises ValueError if there are no images, if they have a wrong shape or values,
        or if the region does not fit them.
        """
        extract, region = keeping_references(self._given), self.keep_roi(roi)
        if isinstance(extract, ADExtractor):
            batches = list(normal_batches)
            if not batches:
                raise ValueError("no normal images to use as references: normal_batches is empty")
            for images in batches:
                check_images(images)
            images = torch.cat(batches)
            region = None if region is None else region.exactly(images)
            self.extract = extract.set_references(bank_within(extract.encode_references(images), region))
        return self

    def leave_one_out(self, images: Tensor | None = None, roi: Tensor | None = None) -> Prediction:
        """Score each of K normal photographs [K, 3, S, S] (default: those it was fitted on) against the other K - 1.

        ``roi``: as in `predict`. Raises ValueError if K < 2.
        """
        if not isinstance(self.extract, ADExtractor):
            raise ValueError("leave-one-out needs an ADExtractor: a raw backbone has no references to leave out")
        if images is None:
            roi = self.roi if roi is None else roi
            return self._one_by_one(self.extract.leave_one_out(), None if roi is None else RegionOfInterest(roi))
        region = self._region(images, roi)
        bank = bank_within(self.extract.encode_references(images), region)
        return self._one_by_one(self.extract.leave_one_out(bank), region)

    def _one_by_one(self, features: FeatureMaps, region: RegionOfInterest | None) -> Prediction:
        """`inside` of one photograph at a time, whose maps stay in the processor's cache: twice as fast for many."""
        parts = [
            self.inside([level[[number]] for level in features], region and region.pick([number]))
            for number in range(len(features[0]))
        ]
        return Prediction(torch.cat([part.scores for part in parts]), torch.cat([part.maps for part in parts]))

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        """L levels [B, C_l, H_l, W_l] -> scores [B], maps [B, image_size, image_size]."""
        side = self.config.image_size
        total = torch.zeros(features[0].shape[0], side, side, device=features[0].device)
        for feature in features:
            norm = feature.float().norm(dim=1)
            if self.config.norm == "released":
                norm = (norm + 1).sqrt() - 1
            total += upsample(norm, side, align_corners=True, region=region)
        maps = gaussian_blur(total / len(features), self.config.sigma)
        return Prediction(highest(maps, self.config.top, region), maps)

    def _check_side(self, images: Tensor) -> None:
        """Accept images of any side, because nothing was fitted on a grid."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return nothing; the references are saved with the extractor."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        pass
