"""FeatureNorm with references of its own for every image: semantic-aligned matching (ADPretrain App. C).

Shapes: P pool images, B images, K references, L levels, S side in pixels.
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

from adpretrain.backbones import FeatureMaps
from adpretrain.data.samples import TooFewImages
from adpretrain.extractor import ADExtractor
from adpretrain.memory import expected_images, hold, memory_limit
from adpretrain.references import AlignedReferences
from downstream.bank import GrowingBank
from downstream.detector import Prediction, check_images
from downstream.detectors.featurenorm import FeatureNorm, FeatureNormOptions
from downstream.saved import Loaded, save_detector

NAME = "aligned-featurenorm"
ADVICE = "fit fewer images, choose fewer levels or a smaller image_size of the backbone, or raise max_pool_bytes"


@dataclass(frozen=True)
class AlignedOptions(FeatureNormOptions):
    """The arguments of `AlignedFeatureNorm`, as they are saved."""

    shots: int = 8
    max_pool_bytes: int | None = None


DEFAULT = AlignedOptions()
ADPRETRAIN = AlignedOptions(top=0.0)  # as in `downstream.detectors.featurenorm`


class AlignedFeatureNorm(FeatureNorm):
    """`FeatureNorm` against the ``shots`` best aligned images of a pool, chosen for every image anew.

    For products that are not always in the same place: the released evaluation of ADPretrain works this way, with
    K = 8. Alignment is judged on the first level, as in the paper (which uses ResNet-18's first layer). The pool's
    features of all levels stay in memory: at most ``max_pool_bytes``, None = half of it.
    """

    saved_as = (NAME, AlignedOptions)

    extract: ADExtractor

    def __init__(self, extract: ADExtractor, shots: int = 8, max_pool_bytes: int | None = None, **options: Any) -> None:
        if not isinstance(extract, ADExtractor):
            raise ValueError(
                f"{NAME} needs an extractor, got a {type(extract).__name__}: a raw backbone has no references to align"
            )
        super().__init__(extract, **options)
        self.shots, self.max_pool_bytes = shots, max_pool_bytes
        self._pool: FeatureMaps = []
        self._aligned: AlignedReferences | None = None

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """Encode the pool: batches [b, 3, S, S], P images in all.

        Raises `TooFewImages` if it has fewer than K images or than the histograms need, ValueError before it outgrows
        ``max_pool_bytes``.
        """
        banks: list[GrowingBank] = []
        shapes: list[torch.Size] = []
        count = 0
        for images in normal_batches:
            with torch.no_grad():
                features = self._encode(images)
            if not banks:
                expected = expected_images(normal_batches, len(images))
                limit = memory_limit(features[0].device, self.max_pool_bytes)
                banks = [GrowingBank(expected, limit) for _ in features]
                shapes = [level.shape[1:] for level in features]
            count += len(images)
            needed = max(count, expected or 0) * sum(level[0].nbytes for level in features)
            what = f"a pool of {max(count, expected or 0)} images"
            hold(what, needed, limit, ADVICE, say=count == len(images))
            for bank, level in zip(banks, features, strict=True):
                bank.add(level.flatten(1))
        self._set_pool([bank.take().unflatten(1, shape) for bank, shape in zip(banks, shapes, strict=True)])
        return self

    def _encode(self, images: Tensor) -> FeatureMaps:
        check_images(images)
        return self.extract.encode(images)

    def _set_pool(self, pool: FeatureMaps) -> None:
        if not pool or len(pool[0]) < self.shots:
            found = len(pool[0]) if pool else 0
            raise TooFewImages(f"K = {self.shots} aligned references cannot be chosen from a pool of {found} images")
        self._pool = pool
        self._aligned = AlignedReferences(pool[0])

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. Raises ValueError before `fit`."""
        features = self._encode(images)
        return self._against(features, self._distances(features))

    @torch.no_grad()
    def leave_one_out(self, images: Tensor) -> Prediction:
        """Score each of the P pool images [P, 3, S, S] against the K best aligned of the others.

        The histograms' centres still come from the whole pool. Raises ValueError if P <= K.
        """
        features = self.extract.encode(images)
        distances_PP = self._distances(features)
        if distances_PP.shape[0] != distances_PP.shape[1]:
            raise ValueError(f"leave-one-out takes the pool's own {distances_PP.shape[1]} images, got {len(images)}")
        if distances_PP.shape[1] <= self.shots:
            raise ValueError(f"leave-one-out with K = {self.shots} needs a pool of at least {self.shots + 1} images")
        return self._against(features, distances_PP.fill_diagonal_(torch.inf))

    def _distances(self, features: FeatureMaps) -> Tensor:
        if self._aligned is None:
            raise ValueError("no pool to choose references from: call fit(normal_batches) first")
        return self._aligned.distances(features[0])

    def _against(self, features: FeatureMaps, distances_BP: Tensor) -> Prediction:
        """One image at a time: a batch of banks would be K times its features."""
        parts = []
        for image, chosen in enumerate(distances_BP.topk(self.shots, dim=1, largest=False).indices):
            bank = self.extract.bank_of([level[chosen] for level in self._pool])
            parts.append(self.from_features(self.extract.from_encoded([f[image : image + 1] for f in features], bank)))
        return Prediction(torch.cat([part.scores for part in parts]), torch.cat([part.maps for part in parts]))

    @property
    def options(self) -> AlignedOptions:
        """The arguments it was made with."""
        return AlignedOptions(self.image_size, self.sigma, self.norm, self.top, self.shots, self.max_pool_bytes)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write extractor and pool: FEATURES OF EVERY POOL IMAGE (`downstream.saved`). ValueError before `fit`."""
        if self._aligned is None:
            raise ValueError("no pool to save: call fit(normal_batches) first")
        pool = {f"pool.{level}": feature for level, feature in enumerate(self._pool)}
        side = self.extract.preprocess.image_size
        return save_detector(folder, NAME, self.options, self.extract, pool, side)

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        extract: Any = loaded.extract  # refused if it is no extractor
        detector = cls(extract, **dataclasses.asdict(loaded.options))
        detector._set_pool([loaded.tensors[f"pool.{level}"] for level in range(len(loaded.tensors))])
        return detector
