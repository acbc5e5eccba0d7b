"""PaDiM: the Mahalanobis distance to a Gaussian of patch embeddings at every position (Defard et al. 2021).

It suits products that always lie in the same place. Unlike the paper, `Gaussians` computes covariances in one pass and
without an inverse; other reductions of the channels, and a Gaussian per level as in ADPretrain, are options.

Shapes: B images, S side in pixels, H x W positions (P in all), D channels, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import hold, memory_limit
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import Embedding, EmbeddingConfig, chosen_levels, settle_levels
from downstream.gaussians import Gaussians, Moments, plain, size_bytes
from downstream.maps import SIGMA, check_sigma, gaussian_blur, highest, upsample
from downstream.roi import RegionOfInterest


def _embedding() -> EmbeddingConfig:
    return EmbeddingConfig(patch=1, target_dim=100, reduction="choose")


@dataclass(frozen=True)
class PaDiMConfig:
    """Options of `PaDiM`.

    Args:
        embedding: levels and channels. The default is the paper's for ResNet-18, 100 random channels of the first
            three stages; for WideResNet-50 the paper uses 550. "orthogonal" instead of "choose" is the semi-orthogonal
            embedding of Kim et al. 2021.
        per_level: fit one Gaussian per position and level instead of one on the concatenated levels; the map is the
            mean of the levels' maps, each upsampled from its own grid.
        eps: value added to the diagonal of every covariance.
        align_corners: upsample the distances so that the centres of the grid's corner cells lie in the corners of the
            map, as in ADPretrain's evaluation, instead of covering the map evenly with cells.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
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
            raise ValueError(f"eps {self.eps} must be positive: without it, covariances of few images are singular")


DEFAULT = PaDiMConfig()
STAGES = (1, 2, 3)  # the stages of a ResNet that the paper uses
# ADPretrain's evaluation: one Gaussian per level with all channels, upsampled with aligned corners.
ADPRETRAIN = PaDiMConfig(EmbeddingConfig(levels=None, patch=1), per_level=True, align_corners=True)


class PaDiM(Detector):
    """Mean and covariance of every position -> Mahalanobis distance -> upsampled, smoothed map -> its maximum."""

    name = "padim"
    options = PaDiMConfig

    def __init__(self, extract: Extract, config: PaDiMConfig = DEFAULT) -> None:
        super().__init__(extract, replace(config, embedding=settle_levels(config.embedding, extract, STAGES)))
        self._embeddings: list[Embedding] = []
        self._gaussians: list[Gaussians] = []
        self._grids: list[tuple[int, int]] = []

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Accumulate the `Moments`, of positions outside the region of interest too, which are not scored. Raises
        ValueError for fewer than 2 images, for regions that differ, or before the Gaussians would exceed ``max_bytes``.
        """
        config = self.config
        if normals.region is not None and not normals.region.shared:
            raise ValueError(
                "padim compares the same positions of all images: give one region of interest, roi=[S, S], for all"
            )
        moments: list[Moments] = []
        for features in normals:
            images = len(features[0])
            if not moments:
                count = len(chosen_levels(features, config.embedding.levels)) if config.per_level else 1
                expected = normals.most_images(images)
                self._embeddings, moments = self._new_embeddings(count), [Moments(expected) for _ in range(count)]
            rows = self._embed(features)
            grids = [(int(level.shape[1]), int(level.shape[2])) for level in rows]
            self._hold(rows, max(moments[0].count + images, expected or 0), say=not moments[0].count)
            for level, moment in zip(rows, moments, strict=True):
                moment.add(level.flatten(1, 2))
        self._gaussians = [moment.gaussians(config.eps) for moment in moments]
        self._grids = grids

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        total = features[0].new_zeros(features[0].shape[0], self.side, self.side, dtype=torch.float32)
        rows = self._embed(features)
        for level, gaussians, grid in zip(rows, self._gaussians, self._grids, strict=True):
            distances = gaussians.distances(level.flatten(1, 2)).unflatten(1, grid)
            total += upsample(distances, self.side, self.config.align_corners, region)
        maps = gaussian_blur(total / len(rows), self.config.sigma)
        return Prediction(highest(maps, region=region), maps)

    def _new_embeddings(self, count: int) -> list[Embedding]:
        config = self.config.embedding
        return [Embedding(replace(config, levels=None) if self.config.per_level else config) for _ in range(count)]

    def _embed(self, features: FeatureMaps) -> list[Tensor]:
        """Return one embedding [B, H, W, D] of all chosen levels together, or with ``per_level`` one of each."""
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

    def traceable(self) -> Self:
        copied = super().traceable()
        copied._gaussians = [plain(gaussians) for gaussians in self._gaussians]
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the Gaussians, which hold MEANS AND VARIATION OF THE PRODUCT'S FEATURES."""
        tensors: dict[str, Tensor] = {}
        for number, (embedding, gaussians) in enumerate(zip(self._embeddings, self._gaussians, strict=True)):
            tensors |= {f"{number}.mean": gaussians.mean_PD, f"{number}.factor": gaussians.factor_PFD}
            tensors |= {f"{number}.{name}": value for name, value in embedding.state_dict().items()}
        return tensors, {
            "low_rank": [g.low_rank for g in self._gaussians],
            "grids": [list(grid) for grid in self._grids],
        }

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self._grids = [(height, width) for height, width in facts["grids"]]
        self._embeddings = self._new_embeddings(len(self._grids))
        for number, embedding in enumerate(self._embeddings):
            mean, factor, low_rank = tensors[f"{number}.mean"], tensors[f"{number}.factor"], facts["low_rank"][number]
            self._gaussians.append(Gaussians(mean, factor, self.config.eps, low_rank))
            embedding.reducer = tensors.get(f"{number}.reducer")
