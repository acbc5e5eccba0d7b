"""SPADE: the nearest normal images, then the nearest of their patches (Cohen & Hoshen 2020); a baseline.

Stage 1: an image is described by the average of its last level; its score is the mean distance to the K nearest normal
images. Stage 2: a patch's score is the mean distance to the nearest patches, at any place, of these K images alone.
Distances are Euclidean, not squared.

Shapes: N normal images, B images, S side in pixels, H x W patches of an image (T in all), D channels, C of the last
level, K images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import expected_images
from downstream.bank import GrowingBank
from downstream.detector import (
    Prediction,
    check_images,
    check_side,
    extracted,
    keeping_references,
    normal_features,
    not_fitted,
)
from downstream.embedding import Embedding, EmbeddingConfig, settle_levels
from downstream.maps import SIGMA, check_sigma, pixel_maps
from downstream.neighbours import Neighbours, nearest
from downstream.pretrained import Pretrained
from downstream.saved import Loaded, save_detector

NAME = "spade"


@dataclass(frozen=True)
class SPADEConfig:
    """Options of `SPADE`.

    Args:
        embedding: levels and channels of a patch. The paper's are the first three stages of WideResNet-50 on the
            grid of the first. The image is described by the last level that the extract gives, chosen here or not.
        images: K, normal images that an image is compared with; all of them where there are fewer.
        patches: nearest patches whose distances are averaged.
        sigma: of the smoothing, in pixels.
        max_bank_bytes: largest size of the patches of all normal images; null = half of the memory.
    """

    embedding: EmbeddingConfig = field(default_factory=lambda: EmbeddingConfig(patch=1))
    images: int = 50
    patches: int = 1
    sigma: float = SIGMA
    max_bank_bytes: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        for name, value in (("images", self.images), ("patches", self.patches)):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")


DEFAULT = SPADEConfig()
STAGES = (1, 2, 3)  # of a ResNet, those that the paper takes


class SPADE(Pretrained):
    """Galleries of image descriptors and of all patches; every prediction searches the patches of K images."""

    saved_as = (NAME, SPADEConfig)

    def __init__(self, extract: Extract, config: SPADEConfig = DEFAULT) -> None:
        self.extract = self._given = extract
        self.config = replace(config, embedding=settle_levels(config.embedding, extract, STAGES))
        self.embedding = Embedding(self.config.embedding)
        self.descriptors_NC: Tensor | None = None
        self.patches_NTD: Tensor | None = None
        self._search: Neighbours | None = None
        self._side = 0

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """One pass over batches [b, 3, S, S], N images in all, 4 N T D bytes and one batch.

        Raises ValueError without images, for bad ones, for fewer patches than are to be averaged, or before the
        gallery outgrows ``max_bank_bytes``.
        """
        self.extract = keeping_references(self._given)
        bank = None
        for images, features in normal_features(self.extract, normal_batches):
            rows_BTD = self.embedding(features).flatten(1, 2)
            if bank is None:
                expected = expected_images(normal_batches, len(images))
                rows = None if expected is None else expected * rows_BTD.shape[1]
                bank = GrowingBank(rows, self.config.max_bank_bytes)
                # A list of small tensors would lie between the freed features of the batches and keep their memory.
                descriptors = GrowingBank(expected, say=False)
            bank.add(rows_BTD.flatten(0, 1))
            descriptors.add(describe(features))
            side = int(images.shape[2])
        assert bank is not None
        descriptors_NC = descriptors.take()
        self._remember(descriptors_NC, bank.take().unflatten(0, (len(descriptors_NC), -1)), side)
        return self

    def _remember(self, descriptors_NC: Tensor, patches_NTD: Tensor, side: int) -> None:
        gallery = min(self.config.images, len(patches_NTD)) * patches_NTD.shape[1]
        if self.config.patches > gallery:
            raise ValueError(f"{self.config.patches} nearest patches of {gallery} that there are; choose fewer")
        self.descriptors_NC, self.patches_NTD, self._side = descriptors_NC, patches_NTD, side
        self._search = Neighbours(descriptors_NC)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. Raises ValueError before `fit`, or for images of another size."""
        if self._search is None or self.patches_NTD is None:
            raise not_fitted(self)
        check_images(images)
        check_side(images, self._side)
        features = extracted(self.extract, images)
        distance_BK, index_BK = self._search.search(describe(features), min(self.config.images, len(self.patches_NTD)))
        grids = []
        for rows_HWD, index_K in zip(self.embedding(features), index_BK, strict=True):
            gallery_ND = self.patches_NTD[index_K].flatten(0, 1)
            found_Tk = nearest(rows_HWD.flatten(0, 1), gallery_ND, self.config.patches)[0]
            grids.append(found_Tk.mean(1).view(rows_HWD.shape[:2]))
        return Prediction(distance_BK.mean(1), pixel_maps(torch.stack(grids), self._side, self.config.sigma))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted detector: FEATURES OF EVERY NORMAL IMAGE (`downstream.saved`).

        Raises ValueError before `fit`, or if ``folder`` holds other files.
        """
        if self.descriptors_NC is None or self.patches_NTD is None:
            raise not_fitted(self)
        tensors = {"descriptors": self.descriptors_NC, "patches": self.patches_NTD, **self.embedding.state_dict()}
        return save_detector(folder, NAME, self.config, self.extract, tensors, self._side)

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        detector = cls(loaded.extract, loaded.options)
        detector.embedding.reducer = loaded.tensors.get("reducer")
        detector._remember(loaded.tensors["descriptors"], loaded.tensors["patches"], loaded.image_size)
        return detector


def describe(features: FeatureMaps) -> Tensor:
    """The average of the last level over its positions: [B, C], float32 or wider."""
    last = features[-1]
    return last.to(torch.promote_types(last.dtype, torch.float32)).mean((2, 3))
