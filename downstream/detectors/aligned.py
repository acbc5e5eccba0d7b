"""FeatureNorm with the best aligned references for every image: semantic-aligned matching (ADPretrain App. C).

Shapes: P pool images, B images, K references, L levels, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import FeatureMaps
from adpretrain.extractor import ADExtractor
from adpretrain.progress import Progress
from adpretrain.references import AlignedReferences, TooFewImages
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormConfig
from downstream.extracts import checked_features
from downstream.roi import RegionOfInterest, bank_within

REGION = "pool_region"  # the regions of interest of the pool's images, if they differ
ADVICE = "fit fewer images, choose fewer levels or a smaller image_size of the backbone, or raise max_pool_bytes"


@dataclass(frozen=True)
class AlignedFeatureNormConfig(FeatureNormConfig):
    """Options of `AlignedFeatureNorm`, besides those of `FeatureNorm`.

    Args:
        shots: K, the number of references for every image.
        max_pool_bytes: largest size of the pool's features; null = half of the memory.
    """

    shots: int = 8
    max_pool_bytes: int | None = None


DEFAULT = AlignedFeatureNormConfig()
ADPRETRAIN = AlignedFeatureNormConfig(top=0.0)  # see `downstream.detectors.featurenorm.ADPRETRAIN`


class AlignedFeatureNorm(FeatureNorm):
    """`FeatureNorm` against the ``shots`` best aligned images of a pool, which are chosen for every image anew.

    It is for products that are not always in the same place; ADPretrain's released evaluation does the same with
    K = 8. Alignment is measured on the first level, as in the paper (which uses ResNet-18's first layer). The features
    of the pool, of all levels, stay in memory.
    """

    name = "aligned-featurenorm"
    options = AlignedFeatureNormConfig
    references_are = "chosen"

    extract: ADExtractor

    def __init__(self, extract: ADExtractor, config: AlignedFeatureNormConfig = DEFAULT) -> None:
        if not isinstance(extract, ADExtractor):
            raise ValueError(
                f"{self.name} needs an extractor, got a {type(extract).__name__}: a raw backbone has no references to "
                "align"
            )
        super().__init__(extract, config)
        self._pool: FeatureMaps = []
        self._pool_region: RegionOfInterest | None = None
        self._aligned: AlignedReferences | None = None

    @property
    def fitted(self) -> bool:
        """Whether the detector has a pool."""
        return self._aligned is not None

    def fit(
        self, normal_batches: Iterable[Tensor], progress: Progress | None = None, roi: Tensor | None = None
    ) -> Self:
        """Encode the pool: batches [b, 3, S, S], P images in all. ``roi`` as in `Detector.fit`: tokens outside are
        neither aligned nor matched.

        Raises `TooFewImages` if there are fewer than K images or fewer than the histograms need; ValueError before the
        pool exceeds ``max_pool_bytes``.
        """
        return Detector.fit(self, normal_batches, progress, roi)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Keep the features of the pool."""
        pool = normals.together("a pool", ADVICE, self.config.max_pool_bytes)
        self._set_pool(pool, normals.region)

    def _features(self, images: Tensor) -> FeatureMaps:
        return checked_features(self.extract.encode, images)

    def _set_pool(self, pool: FeatureMaps, region: RegionOfInterest | None) -> None:
        if not pool or len(pool[0]) < self.config.shots:
            found = len(pool[0]) if pool else 0
            raise TooFewImages(
                f"K = {self.config.shots} aligned references cannot be chosen from a pool of {found} images"
            )
        self._pool, self._pool_region = pool, region
        self._aligned = AlignedReferences(pool[0], inside_PHW=region and region.inside(pool[0][:, 0]))

    @torch.no_grad()
    def predict(self, images: Tensor, roi: Tensor | None = None) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, image_size, image_size]. ``roi`` and errors as in `Detector.predict`."""
        features, region = self._checked(images), self._region(images, roi)
        return self._against(features, self._distances(features, region), region)

    @torch.no_grad()
    def leave_one_out(self, images: Tensor | None = None, roi: Tensor | None = None) -> Prediction:
        """Score each of the P images of the pool [P, 3, S, S] against the K best aligned of the others.

        The centres of the histograms are still those of the whole pool. Raises ValueError if P <= K.
        """
        features, shots = self._pool if images is None else self._checked(images), self.config.shots
        region = self._pool_region if images is None else self._region(images, roi)
        distances_PP = self._distances(features, region)
        if distances_PP.shape[0] != distances_PP.shape[1]:
            raise ValueError(
                f"leave-one-out takes the {distances_PP.shape[1]} images of the pool, got {len(distances_PP)}"
            )
        if distances_PP.shape[1] <= shots:
            raise ValueError(f"leave-one-out with K = {shots} needs a pool of at least {shots + 1} images")
        return self._against(features, distances_PP.fill_diagonal_(torch.inf), region)

    def _distances(self, features: FeatureMaps, region: RegionOfInterest | None) -> Tensor:
        assert self._aligned is not None
        return self._aligned.distances(features[0], region and region.inside(features[0][:, 0]))

    def _against(self, features: FeatureMaps, distances_BP: Tensor, region: RegionOfInterest | None) -> Prediction:
        """Score images one by one, because the banks of a whole batch would need K times the memory of its features."""
        parts = []
        for image, chosen in enumerate(distances_BP.topk(self.config.shots, dim=1, largest=False).indices):
            bank = self.extract.bank_of([level[chosen] for level in self._pool])
            bank = bank_within(bank, self._pool_region and self._pool_region.pick(chosen.tolist()))
            projected = self.extract.from_encoded([f[image : image + 1] for f in features], bank)
            parts.append(self.inside(projected, region and region.pick([image])))
        return Prediction(torch.cat([part.scores for part in parts]), torch.cat([part.maps for part in parts]))

    def traceable(self) -> Self:
        raise ValueError(
            "aligned references are chosen anew for every image, which a graph cannot do: export a FeatureNorm, whose "
            "references are the same for all images"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the pool, which holds FEATURES OF EVERY POOL IMAGE."""
        own = {REGION: self._pool_region.roi} if self._pool_region is not None and self.roi_each else {}
        return {f"pool.{level}": feature for level, feature in enumerate(self._pool)} | own, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        roi = tensors.pop(REGION, self.roi)
        pool = [tensors[f"pool.{level}"] for level in range(len(tensors))]
        self._set_pool(pool, None if roi is None else RegionOfInterest(roi))
