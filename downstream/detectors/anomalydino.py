"""AnomalyDINO: the cosine distance of every patch to the nearest patch of a few normal photographs, and of their
rotations (Damm et al. 2025).

The paper's features are the last level of DINOv2; any extract will do. Unlike PatchCore there is no neighbourhood, no
subsampling and no re-weighting: with a few photographs, every patch counts. Background can be left out of the images
that are scored (`foreground`), as in the paper; the normal patches of the background stay in the bank, which does no
harm. Only directions are compared, so give it raw features: the length of a residual, which says how anomalous it is,
counts for nothing.

Shapes: B images, S side in pixels, H x W patches of an image (T in all), N rows of the bank, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.memory import GrowingBank
from adpretrain.progress import Progress
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.embedding import Embedding, EmbeddingConfig
from downstream.maps import SIGMA, check_sigma, check_top, highest_tokens, pixel_maps
from downstream.neighbours import Neighbours
from downstream.plain_search import PlainNeighbours
from downstream.roi import RegionOfInterest
from downstream.rotations import check_rotations

BORDER, PLAUSIBLE = 0.2, 0.35  # the centre of an image leaves out this share at each side; a mask covers more of it


@dataclass(frozen=True)
class AnomalyDINOConfig:
    """Options of `AnomalyDINO`.

    Args:
        embedding: levels and channels of a patch; by default the last level, each patch alone.
        rotations: number of evenly spaced angles that the normal photographs are turned by; 1 = as they are, for a
            product that always lies in the same position. The bank and the time of a search grow with it.
        masking: threshold of the first principal component of an image's patches, above which they are the product and
            not background, in units of the features: the paper's is 10 for DINOv2. null = no masking, as for textures
            and products that fill the picture.
        top: the image score is the mean of this share of the highest patch distances; 0 = the maximum.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels.
        max_bank_bytes: largest size of the bank; null = half of the memory.
    """

    embedding: EmbeddingConfig = field(default_factory=lambda: EmbeddingConfig(levels=[-1], patch=1))
    rotations: int = 8
    masking: float | None = None
    top: float = 0.01
    sigma: float = SIGMA
    max_bank_bytes: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        check_top(self.top)
        check_rotations(self.rotations)
        if self.masking is not None and not self.masking >= 0:
            raise ValueError(
                f"masking {self.masking} must be a threshold, 0 or more, such as 10, or null for no masking"
            )


DEFAULT = AnomalyDINOConfig()


class AnomalyDINO(Detector):
    """Unit patches of normal images and their rotations -> cosine distance 1 - cos to the nearest -> mean of the
    highest; upsampled and smoothed -> map.

    Memory: the bank of N = images x rotations x T rows, 4 D bytes each, twice while it is searched.
    """

    name = "anomalydino"
    options = AnomalyDINOConfig

    bank_ND: Tensor
    _search: Neighbours | PlainNeighbours

    def __init__(self, extract: Extract, config: AnomalyDINOConfig = DEFAULT) -> None:
        super().__init__(extract, config)
        self.embedding = Embedding(config.embedding)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Fill the bank. Raises ValueError, which says what to change, before it exceeds ``max_bank_bytes``."""
        bank = None
        for rows_ND in normals.rows(self.embedding, self.config.rotations):
            if bank is None:
                alike = normals.region is None  # else turned images have fewer tokens inside
                batches = normals.most_images(self.config.rotations) if alike else None
                expected = None if batches is None else batches * len(rows_ND)
                bank = GrowingBank(expected, self.config.max_bank_bytes, beside=rows_ND[0].nbytes)  # the search's copy
            bank.add(F.normalize(rows_ND, dim=1))
        assert bank is not None
        self._remember(bank.take())

    def _remember(self, bank_ND: Tensor) -> None:
        self.bank_ND, self._search = bank_ND, Neighbours(bank_ND)

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        rows_BHWD = self.embedding(features)
        distance_N = self._search.search(F.normalize(rows_BHWD.flatten(0, 2), dim=1), 1)[0][:, 0]
        grid_BHW = (distance_N.square() / 2).view(rows_BHWD.shape[:3])  # of unit rows: 1 - cos
        if self.config.masking is not None:
            inside_BHW = torch.ones_like(grid_BHW, dtype=torch.bool) if region is None else region.inside(grid_BHW)
            masks = [foreground(*pair, self.config.masking) for pair in zip(rows_BHWD, inside_BHW, strict=True)]
            grid_BHW = grid_BHW * torch.stack(masks)
        scores = highest_tokens(grid_BHW, self.config.top, region)
        return Prediction(scores, pixel_maps(grid_BHW, self.side, self.config.sigma, region))

    def traceable(self) -> Self:
        if self.config.masking is not None:
            raise ValueError(
                "masking cannot be exported: a graph finds no principal components; fit with masking null, or with a "
                "region of interest"
            )
        copied = super().traceable()
        copied._search = PlainNeighbours(self.bank_ND)
        copied.bank_ND = copied._search.bank_ND
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the bank, which holds FEATURES OF THE PRODUCT."""
        return {"bank": self.bank_ND, **self.embedding.state_dict()}, {}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.embedding.reducer = tensors.get("reducer")
        self._remember(tensors["bank"])


def foreground(rows_HWD: Tensor, inside_HW: Tensor, threshold: float) -> Tensor:
    """Which patches of an image are the product rather than its background, of those inside: bool [H, W].

    These are the patches whose first principal component exceeds the threshold, dilated, and closed, by 3 x 3 patches
    (Sec. 3.3). The sign of a component means nothing: the one that covers more of the image's centre is taken. The
    authors turn the sign if it covers at most 35 %, so that an image without a clear foreground keeps what is left by
    chance; we mask nothing then.
    """
    rows_TD = rows_HWD[inside_HW].cpu().double()  # MPS has no float64
    centred_TD = rows_TD - rows_TD.mean(0)
    tall = len(centred_TD) > centred_TD.shape[1]
    values, vectors = torch.linalg.eigh(centred_TD.T @ centred_TD if tall else centred_TD @ centred_TD.T)
    first_T = centred_TD @ vectors[:, -1] if tall else vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    component_HW = torch.zeros(inside_HW.shape, dtype=torch.float64)
    component_HW[inside_HW.cpu()] = first_T
    (top, bottom), (left, right) = ((int(side * BORDER), int(side * (1 - BORDER))) for side in inside_HW.shape)
    centre_HW = torch.zeros_like(inside_HW.cpu())
    centre_HW[top:bottom, left:right] = True
    judged_HW = centre_HW & inside_HW.cpu()
    judged_HW = judged_HW if bool(judged_HW.any()) else inside_HW.cpu()
    masks = [sign * component_HW > threshold for sign in (1, -1)]
    covered, mask_HW = max(((float(mask[judged_HW].double().mean()), mask) for mask in masks), key=lambda pair: pair[0])
    if covered <= PLAUSIBLE:
        return inside_HW
    twice_dilated = _dilated(_dilated(mask_HW))
    return (~_dilated(~twice_dilated)).to(inside_HW.device) & inside_HW


def _dilated(mask_HW: Tensor) -> Tensor:
    return F.max_pool2d(mask_HW[None].float(), 3, stride=1, padding=1)[0] > 0
