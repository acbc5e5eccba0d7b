"""PaDiM: a Gaussian of patch embeddings at every position, the Mahalanobis distance to it (Defard et al. 2021).

It suits products that always lie in the same place. Compared with the paper: `Gaussians` for the covariances (one
pass, no inverse), any reduction of the channels, and the levels one by one as in ADPretrain's evaluation.

Shapes: B images, S side in pixels, H x W positions (P in all), D channels, L levels.
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
from adpretrain.memory import expected_images, hold, memory_limit
from downstream.detector import (
    Prediction,
    check_images,
    check_side,
    extracted,
    keeping_references,
    normal_features,
    not_fitted,
)
from downstream.embedding import Embedding, EmbeddingConfig, chosen_levels, settle_levels
from downstream.gaussians import Gaussians, Moments, size_bytes
from downstream.maps import SIGMA, check_sigma, gaussian_blur, upsample
from downstream.pretrained import Pretrained
from downstream.saved import Loaded, save_detector

NAME = "padim"


def _embedding() -> EmbeddingConfig:
    return EmbeddingConfig(patch=1, target_dim=100, reduction="choose")


@dataclass(frozen=True)
class PaDiMConfig:
    """Options of `PaDiM`.

    Args:
        embedding: levels and channels. The default is the paper's for ResNet-18, 100 random channels of the first
            three stages; it takes 550 of WideResNet-50. "orthogonal" instead of "choose" is the semi-orthogonal
            embedding of Kim et al. 2021.
        per_level: one Gaussian per position and level instead of one of the concatenation; the map is the mean of the
            levels' maps, each upsampled from its own grid.
        eps: added to the diagonal of every covariance.
        align_corners: how the distances are upsampled: the corners of the grid become the corners of the map, as in
            ADPretrain's evaluation, instead of the grid's cells covering it evenly.
        sigma: of the smoothing, in pixels.
        max_bytes: largest size of the Gaussians; null = half of the memory.
    """

    embedding: EmbeddingConfig = field(default_factory=_embedding)
    per_level: bool = False
    eps: float = 0.01
    align_corners: bool = False
    sigma: float = SIGMA
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if not self.eps > 0:
            raise ValueError(f"eps {self.eps} must be positive: without it few images give no distance")


DEFAULT = PaDiMConfig()
STAGES = (1, 2, 3)  # of a ResNet, those that the paper takes
# ADPretrain's evaluation: every level on its own with all its channels, upsampled with aligned corners.
ADPRETRAIN = PaDiMConfig(EmbeddingConfig(levels=None, patch=1), per_level=True, align_corners=True)


class PaDiM(Pretrained):
    """Mean and covariance of every position -> Mahalanobis distance -> upsampled, smoothed map -> its maximum."""

    saved_as = (NAME, PaDiMConfig)

    def __init__(self, extract: Extract, config: PaDiMConfig = DEFAULT) -> None:
        self.extract = self._given = extract
        self.config = replace(config, embedding=settle_levels(config.embedding, extract, STAGES))
        self._embeddings: list[Embedding] = []
        self._gaussians: list[Gaussians] = []
        self._grids: list[tuple[int, int]] = []
        self._side = 0

    def fit(self, normal_batches: Iterable[Tensor]) -> Self:
        """One pass over batches [b, 3, S, S], n images in all; memory as in `Moments`.

        Raises ValueError for fewer than 2 images, bad images, or Gaussians that would be larger than ``max_bytes``,
        before they are.
        """
        self.extract = keeping_references(self._given)
        config = self.config
        moments: list[Moments] = []
        for images, features in normal_features(self.extract, normal_batches):
            if not moments:
                count = len(chosen_levels(features, config.embedding.levels)) if config.per_level else 1
                expected = expected_images(normal_batches, len(images))
                self._embeddings, moments = self._new_embeddings(count), [Moments(expected) for _ in range(count)]
            rows = self._embed(features)
            grids = [(int(level.shape[1]), int(level.shape[2])) for level in rows]
            self._hold(rows, max(moments[0].count + len(images), expected or 0), say=not moments[0].count)
            for level, moment in zip(rows, moments, strict=True):
                moment.add(level.flatten(1, 2))
            side = int(images.shape[2])
        self._gaussians = [moment.gaussians(config.eps) for moment in moments]
        self._grids, self._side = grids, side
        return self

    def predict(self, images: Tensor) -> Prediction:
        """[B, 3, S, S] -> scores [B], maps [B, S, S]. Raises ValueError before `fit`, or for images of another size."""
        if not self._gaussians:
            raise not_fitted(self)
        check_images(images)
        check_side(images, self._side)
        total = images.new_zeros(len(images), self._side, self._side, dtype=torch.float32)
        rows = self._embed(extracted(self.extract, images))
        for level, gaussians, grid in zip(rows, self._gaussians, self._grids, strict=True):
            distances = gaussians.distances(level.flatten(1, 2)).unflatten(1, grid)
            total += upsample(distances, self._side, self.config.align_corners)
        maps = gaussian_blur(total / len(rows), self.config.sigma)
        return Prediction(maps.flatten(1).amax(1), maps)

    def _new_embeddings(self, count: int) -> list[Embedding]:
        config = self.config.embedding
        return [Embedding(replace(config, levels=None) if self.config.per_level else config) for _ in range(count)]

    def _embed(self, features: FeatureMaps) -> list[Tensor]:
        """One embedding [B, H, W, D] of all chosen levels, or one of each."""
        if not self.config.per_level:
            return [self._embeddings[0](features)]
        levels = chosen_levels(features, self.config.embedding.levels)
        return [embedding([level]) for embedding, level in zip(self._embeddings, levels, strict=True)]

    def _hold(self, rows: list[Tensor], images: int, say: bool) -> None:
        needed = sum(size_bytes(images, level[0, ..., 0].numel(), level.shape[3]) for level in rows)
        shapes = " and ".join(f"{level.shape[1]} x {level.shape[2]} positions x {level.shape[3]}" for level in rows)
        advice = (
            "set embedding.target_dim (memory grows with its square), a stride, coarser embedding.levels, or a larger "
            "max_bytes"
        )
        what = f"the set of Gaussians of {images} images at {shapes} channels"
        hold(what, needed, memory_limit(rows[0].device, self.config.max_bytes), advice, say)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted detector: MEANS AND VARIATION OF THE PRODUCT'S FEATURES (`downstream.saved`).

        Raises ValueError before `fit`, or if ``folder`` holds other files.
        """
        if not self._gaussians:
            raise not_fitted(self)
        tensors: dict[str, Tensor] = {}
        for number, (embedding, gaussians) in enumerate(zip(self._embeddings, self._gaussians, strict=True)):
            tensors |= {f"{number}.mean": gaussians.mean_PD, f"{number}.factor": gaussians.factor_PFD}
            tensors |= {f"{number}.{name}": value for name, value in embedding.state_dict().items()}
        facts = {"low_rank": [g.low_rank for g in self._gaussians], "grids": [list(grid) for grid in self._grids]}
        return save_detector(folder, NAME, self.config, self.extract, tensors, self._side, facts)

    @classmethod
    def _restored(cls, loaded: Loaded[Any]) -> Self:
        detector = cls(loaded.extract, loaded.options)
        detector._side = loaded.image_size
        detector._grids = [(height, width) for height, width in loaded.facts["grids"]]
        detector._embeddings = detector._new_embeddings(len(detector._grids))
        for number, embedding in enumerate(detector._embeddings):
            mean, factor = loaded.tensors[f"{number}.mean"], loaded.tensors[f"{number}.factor"]
            low_rank = loaded.facts["low_rank"][number]
            detector._gaussians.append(Gaussians(mean, factor, loaded.options.eps, low_rank))
            embedding.reducer = loaded.tensors.get(f"{number}.reducer")
        return detector
