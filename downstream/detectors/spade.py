"""SPADE, a baseline: find the nearest normal images, then the nearest of their patches (Cohen & Hoshen 2020).

Stage 1: an image is described by the average of its last level, in the region of interest; its score is the mean
distance to the K nearest normal images. Stage 2: a patch's score is the mean distance to the nearest patches, at any
position, of only these K images.
Distances are Euclidean, not squared.

Shapes: N normal images, B images, S side in pixels, H x W patches of an image (T in all), D channels, C of the last
level, K images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import GrowingBank
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import Embedding, EmbeddingConfig, settle_levels
from downstream.maps import SIGMA, check_sigma, pixel_maps
from downstream.neighbours import Neighbours, nearest
from downstream.plain_search import PlainNeighbours, constant, plain_nearest
from downstream.roi import RegionOfInterest


@dataclass(frozen=True)
class SPADEConfig:
    """Options of `SPADE`.

    Args:
        embedding: levels and channels of a patch. The paper uses the first three stages of WideResNet-50 on the grid
            of the first. An image is always described by the last level of the extract, even if it is not chosen here.
        images: K, the number of normal images that an image is compared with, or all of them if there are fewer.
        patches: number of nearest patches whose distances are averaged.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
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
STAGES = (1, 2, 3)  # the stages of a ResNet that the paper uses


class SPADE(Detector):
    """Keeps descriptors and patches of all normal images; every prediction searches the patches of K of them."""

    name = "spade"
    options = SPADEConfig

    descriptors_NC: Tensor
    patches_NTD: Tensor
    inside_NT: Tensor | None = None  # patches in the region of interest; None = all
    _search: Neighbours | PlainNeighbours

    def __init__(self, extract: Extract, config: SPADEConfig = DEFAULT) -> None:
        super().__init__(extract, replace(config, embedding=settle_levels(config.embedding, extract, STAGES)))
        self.embedding = Embedding(self.config.embedding)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Keep the patches of N images, 4 N T D bytes. Raises ValueError if there are fewer than ``patches``, or before
        they exceed ``max_bank_bytes``."""
        bank, masks, count = None, [], 0
        for features in normals:
            rows_BHWD = self.embedding(features)
            rows_BTD = rows_BHWD.flatten(1, 2)
            region = normals.region and normals.region.pick(range(count, count + len(rows_BTD)))
            count += len(rows_BTD)
            if region is not None:
                masks.append(region.inside(rows_BHWD[..., 0]).flatten(1))
            if bank is None:
                expected = normals.most_images(len(rows_BTD))
                rows = None if expected is None else expected * rows_BTD.shape[1]
                bank = GrowingBank(rows, self.config.max_bank_bytes)
                # Many small tensors between the freed features of the batches would fragment the memory.
                descriptors = GrowingBank(expected, say=False)
            bank.add(rows_BTD.flatten(0, 1))
            descriptors.add(describe(features, region))
        assert bank is not None
        descriptors_NC = descriptors.take()
        patches_NTD = bank.take().unflatten(0, (len(descriptors_NC), -1))
        self._remember(descriptors_NC, patches_NTD, torch.cat(masks) if masks else None)

    def _remember(self, descriptors_NC: Tensor, patches_NTD: Tensor, inside_NT: Tensor | None) -> None:
        images = min(self.config.images, len(patches_NTD))
        gallery = images * patches_NTD.shape[1]
        if inside_NT is not None:
            gallery = int(inside_NT.sum(1).topk(images, largest=False).values.sum())
        if self.config.patches > gallery:
            raise ValueError(f"{self.config.patches} nearest patches cannot be found among {gallery}; choose fewer")
        self.descriptors_NC, self.patches_NTD, self.inside_NT = descriptors_NC, patches_NTD, inside_NT
        self._search = Neighbours(descriptors_NC)

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        images = min(self.config.images, len(self.patches_NTD))
        distance_BK, index_BK = self._search.search(describe(features, region), images)
        rows_BHWD, count = self.embedding(features), self.config.patches
        if isinstance(self._search, PlainNeighbours):  # a graph cannot loop over any number of images
            gallery_BND = self.patches_NTD[index_BK].flatten(1, 2)
            patch_BT = plain_nearest(rows_BHWD.flatten(1, 2), gallery_BND, count)[0].mean(2)
        else:
            found = []
            for rows_TD, index_K in zip(rows_BHWD.flatten(1, 2), index_BK, strict=True):
                gallery_KTD = self.patches_NTD[index_K]
                inside_KT = None if self.inside_NT is None else self.inside_NT[index_K]
                gallery_ND = gallery_KTD.flatten(0, 1) if inside_KT is None else gallery_KTD[inside_KT]
                found.append(nearest(rows_TD, gallery_ND, count)[0].mean(1))
            patch_BT = torch.stack(found)
        grid_BHW = patch_BT.unflatten(1, rows_BHWD.shape[1:3])
        return Prediction(distance_BK.mean(1), pixel_maps(grid_BHW, self.side, self.config.sigma, region))

    def traceable(self) -> Self:
        copied = super().traceable()
        patches_NTD = self.patches_NTD
        if self.inside_NT is not None:  # with one region for all, every image has the same patches inside
            patches_NTD = patches_NTD[:, self.inside_NT[0]]
        copied._search, copied.patches_NTD = PlainNeighbours(self.descriptors_NC), constant(patches_NTD)
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return descriptors and patches, which are FEATURES OF EVERY NORMAL IMAGE."""
        inside = {} if self.inside_NT is None else {"inside": self.inside_NT}
        kept = {"descriptors": self.descriptors_NC, "patches": self.patches_NTD, **inside}
        return {**kept, **self.embedding.state_dict()}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.embedding.reducer = tensors.get("reducer")
        self._remember(tensors["descriptors"], tensors["patches"], tensors.get("inside"))


def describe(features: FeatureMaps, region: RegionOfInterest | None = None) -> Tensor:
    """Average the last level over its positions in the region: [B, C], float32 or wider."""
    last = features[-1].to(torch.promote_types(features[-1].dtype, torch.float32))
    if region is None:
        return last.mean((2, 3))
    inside_B1HW = region.inside(last[:, 0])[:, None]
    return (last * inside_B1HW).sum((2, 3)) / inside_B1HW.sum((2, 3))
