"""SubspaceAD: the distance of every patch to the principal subspace of normal patches (Lendering et al. 2026).

It is meant for one to four normal photographs of a product, and stores D x k numbers, whatever their number.

The authors average seven middle blocks of DINOv2, which have equal channels; we concatenate the chosen levels, as the
levels of other networks differ in their channels. They square the distances and blur maps over 3 x 3 pixels; we take
the distances themselves, in the unit of the features, and blur as the other detectors do. The ranking of patches is the
same. They turn photographs by 30 random angles; ``rotations`` are evenly spaced, so that nothing is random.

Shapes: B images, S side in pixels, H x W patches of an image, D channels, k dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.maps import SIGMA, check_sigma, check_top, highest, pixel_maps
from downstream.plain_search import constant
from downstream.roi import RegionOfInterest
from downstream.rotations import check_rotations
from downstream.subspace import Scatter, outside


@dataclass(frozen=True)
class SubspaceADConfig:
    """Options of `SubspaceAD`.

    Args:
        embedding: levels and channels of a patch; by default all levels, each patch alone.
        variance: share of the variance of normal patches that the subspace keeps, or the number of its dimensions.
        rotations: number of evenly spaced angles that the normal photographs are turned by; 1 = as they are, for a
            product that always lies in the same position.
        top: the image score is the mean of this share of the highest map values; 0 = the maximum.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
    """

    embedding: EmbeddingConfig = field(default_factory=lambda: EmbeddingConfig(levels=None, patch=1))
    variance: int | float = 0.99
    rotations: int = 1
    top: float = 0.01
    sigma: float = SIGMA

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_top(self.top)
        check_rotations(self.rotations)
        if not (self.variance >= 1 if isinstance(self.variance, int) else 0 < self.variance < 1):
            raise ValueError(
                f"variance {self.variance} must be a share between 0 and 1, such as 0.99, or a number of dimensions, "
                "1 or more"
            )


DEFAULT = SubspaceADConfig()


class SubspaceAD(Detector):
    """Mean and principal directions of normal patches -> length of the rest of a patch -> upsampled, smoothed map ->
    the mean of its highest values."""

    name = "subspacead"
    options = SubspaceADConfig

    mean_D: Tensor
    basis_Dk: Tensor

    def __init__(self, extract: Extract, config: SubspaceADConfig = DEFAULT) -> None:
        super().__init__(extract, config)
        self.embedding = Embedding(config.embedding)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Sum the products of normal patches, 8 D^2 bytes, and find their principal directions: D^3 operations. Raises
        ValueError if ``variance`` takes all directions."""
        scatter = Scatter()
        for rows_ND in normals.rows(self.embedding, self.config.rotations):
            scatter.add(rows_ND)
        self.mean_D, self.basis_Dk = (part.to(rows_ND) for part in scatter.subspace(self.config.variance))

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        distance_BHW = outside(self.embedding(features), self.mean_D, self.basis_Dk)
        maps = pixel_maps(distance_BHW, self.side, self.config.sigma, region)
        return Prediction(highest(maps, self.config.top, region), maps)

    def traceable(self) -> Self:
        copied = super().traceable()
        copied.mean_D, copied.basis_Dk = constant(self.mean_D), constant(self.basis_Dk)
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return mean and directions, which hold MEAN AND VARIATION OF THE PRODUCT'S FEATURES."""
        return {"mean": self.mean_D, "basis": self.basis_Dk, **self.embedding.state_dict()}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.embedding.reducer = tensors.get("reducer")
        self.mean_D, self.basis_Dk = tensors["mean"], tensors["basis"]
