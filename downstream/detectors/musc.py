"""MuSc: unlabelled images score each other; a normal patch finds its like in many others (Li et al., ICLR 2024).

Nothing is assumed to be normal: `fit` keeps the images of a batch or a day, most of which should be normal, and
`predict` scores any image against the others of them. An image that is itself among the kept ones is not compared with
itself, so that ``MuSc(extract).fit(batches).predict(images)``, with the same images, is the mutual scoring of the
paper. Fitted on normal images only, it is a few-shot detector.

1. LNAMD: for each degree r, a patch is the average of its r x r neighbourhood, of unit length. (The authors pool the
   r * r * C unfolded values to C, which is the same.)
2. Mutual scoring: the distance of a patch to the nearest patch of each other image; of these, the lowest share is
   averaged. Levels and degrees are averaged as maps.
3. RsCIN: the score of an image, the maximum of its map, is averaged with those of the k - 1 most similar kept images,
   weighted by the cosine of their descriptions, for several k. The authors use class tokens; our extracts have none,
   and an image is described by the average of its last level, as in SPADE. They scale scores to 0..1 first, which
   changes no ranking.

Time grows with N for an image, and with N^2 for `fit` and for a batch that scores itself; memory with N.

Shapes: N kept images, B images, S side in pixels, L levels, H x W patches of a level (T in all), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from adpretrain.backbones import Extract, FeatureMaps
from adpretrain.progress import Progress
from adpretrain.references import TooFewImages
from downstream.detector import Detector, NormalFeatures, Prediction
from downstream.detectors.spade import describe
from downstream.embedding import EmbeddingConfig, aggregate
from downstream.maps import check_sigma, gaussian_blur, highest, upsample
from downstream.plain_search import constant
from downstream.roi import RegionOfInterest

SAME = 1e-3  # root mean square difference of unit patches below which two images are the same photograph
ADVICE = "fit fewer images, choose fewer levels or a smaller image_size of the backbone, or raise max_bytes"
QUERIES = 2048  # patches compared at a time, except in a graph, which has no loops


@dataclass(frozen=True)
class MuScConfig:
    """Options of `MuSc`.

    Args:
        degrees: sides r of the neighbourhoods, odd; small ones for small anomalies.
        share: of the distances to all other images, the share of the lowest that is averaged, at least one.
        neighbours: sizes k of the neighbourhoods of images that are averaged, the image itself included; [1] = none.
            The paper uses 1, 2, 3 for MVTec AD and 1, 8, 9 for VisA.
        sigma: standard deviation of the Gaussian that smooths the maps, in pixels; the paper's maps are not smoothed.
        max_bytes: largest size of the kept features; null = half of the memory.
    """

    degrees: list[int] = field(default_factory=lambda: [1, 3, 5])
    share: float = 0.3
    neighbours: list[int] = field(default_factory=lambda: [1, 2, 3])
    sigma: float = 0.0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if not self.degrees or any(degree < 1 or degree % 2 == 0 for degree in self.degrees):
            raise ValueError(f"degrees {self.degrees} must be odd sides of neighbourhoods, such as [1, 3, 5]")
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours {self.neighbours} must be numbers of images, 1 (the image alone) or more")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} of the other images must be above 0 and at most 1")


DEFAULT = MuScConfig()


class MuSc(Detector):
    """Distances of patches to each kept image -> average of the lowest share -> mean over levels and degrees -> map;
    its maximum, averaged over similar images -> score.

    Memory: 4 N sum(C_l T_l) bytes. A prediction takes 2 N T_l^2 C_l operations for each level and degree.
    """

    name = "musc"
    options = MuScConfig

    kept: FeatureMaps  # normalised levels [N, C, H, W]
    described_NC: Tensor
    scores_N: Tensor  # of the kept images, before RsCIN
    _inside: list[Tensor] | None = None  # of each level, bool [N, H, W]; None = all

    def __init__(self, extract: Extract, config: MuScConfig = DEFAULT) -> None:
        super().__init__(extract, config)

    def fit_features(self, normals: NormalFeatures, progress: Progress | None) -> None:
        """Keep unlabelled images and let them score each other, N^2 comparisons. Raises `TooFewImages` for fewer than
        2, ValueError before the features exceed ``max_bytes``."""
        levels = normals.together("the features", ADVICE, self.config.max_bytes)
        self.kept = [level.to(torch.promote_types(level.dtype, torch.float32)) for level in levels]
        self.side, region, count = normals.side, normals.region, len(levels[0])
        if count < 2:
            raise TooFewImages(f"images score each other: {count} image has no other to be compared with")
        self._inside = region and [region.inside(level[:, 0]).contiguous() for level in self.kept]
        described, scores = [], []
        for own, one in self._one_by_one(region):
            described.append(describe(own, one))
            for level in own:
                level.copy_(layer_norm(level, one and one.inside(level[:, 0])))
        self.described_NC = F.normalize(torch.cat(described), dim=1)
        for own, one in self._one_by_one(region):
            maps, same_BN = self._mutual(own, one)
            if bool(same_BN.all()):
                raise TooFewImages(
                    f"images score each other, but all {count} have the same features: they are one photograph, or the "
                    "references of their own extractor"
                )
            scores.append(highest(maps, region=one))
            if progress is not None:
                progress("images scored by each other", len(scores), count)
        self.scores_N = torch.cat(scores)

    def _one_by_one(self, region: RegionOfInterest | None) -> Iterator[tuple[FeatureMaps, RegionOfInterest | None]]:
        """The levels [1, C, H, W] of each kept image, and its region."""
        for number in range(len(self.kept[0])):
            yield [level[number : number + 1] for level in self.kept], region and region.pick([number])

    def from_features(self, features: FeatureMaps, region: RegionOfInterest | None = None) -> Prediction:
        normal = [layer_norm(level, region and region.inside(level[:, 0])) for level in features]
        maps, same_BN = self._mutual(normal, region)
        scores_B = highest(maps, region=region)
        return Prediction(self._rescored(scores_B, F.normalize(describe(features, region), dim=1), same_BN), maps)

    def _mutual(self, levels: FeatureMaps, region: RegionOfInterest | None) -> tuple[Tensor, Tensor]:
        """Maps [B, S, S] of normalised levels, and which kept images are the same photograph: bool [B, N]."""
        same_BN = self._same(levels)
        maps = levels[0].new_zeros(levels[0].shape[0], self.side, self.side)
        for number, level in enumerate(levels):
            for degree in self.config.degrees:
                rows_BTC = unit_rows(level, degree)
                distance_BTN = torch.stack(
                    [to_nearest(rows_BTC, self._gallery(number, degree, image)) for image in range(len(same_BN[0]))], 2
                )
                grid_BHW = lowest(distance_BTN, same_BN, self.config.share).unflatten(1, level.shape[2:])
                maps = maps + upsample(grid_BHW, self.side, region=region)
        return gaussian_blur(maps / (len(levels) * len(self.config.degrees)), self.config.sigma), same_BN

    def _gallery(self, level: int, degree: int, image: int) -> Tensor:
        """The patches of a kept image in its region: [t, C]."""
        rows_TC = unit_rows(self.kept[level][image : image + 1], degree)[0]
        return rows_TC if self._inside is None else rows_TC[self._inside[level][image].flatten()]

    def _same(self, levels: FeatureMaps) -> Tensor:
        """Which kept images are the same photographs as these, but for rounding: bool [B, N]."""
        rows_BTC, kept = unit_rows(levels[-1], 1), self.kept[-1].split(1)
        differences = [(rows_BTC - unit_rows(one, 1)).square().sum(2).mean(1) for one in kept]
        return torch.stack(differences, 1) < SAME**2

    def _rescored(self, scores_B: Tensor, described_BC: Tensor, same_BN: Tensor) -> Tensor:
        """Average scores over the neighbourhoods of images (RsCIN): [B]."""
        similar_BN = (described_BC @ self.described_NC.T).clamp_min(0).masked_fill(same_BN, 0)
        most = min(max(self.config.neighbours) - 1, len(self.scores_N))
        weight_Bk, index_Bk = similar_BN.topk(most, 1)
        weighted = [
            (scores_B + (weight_Bk[:, : k - 1] * self.scores_N[index_Bk[:, : k - 1]]).sum(1))
            / (1 + weight_Bk[:, : k - 1].sum(1))
            for k in self.config.neighbours
        ]
        return torch.stack(weighted).mean(0)

    def traceable(self) -> Self:
        copied = super().traceable()
        copied.kept = [constant(level) for level in self.kept]
        copied.described_NC, copied.scores_N = constant(self.described_NC), constant(self.scores_N)
        return copied

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the kept levels, which are FEATURES OF EVERY IMAGE."""
        tensors = {f"kept.{number}": level for number, level in enumerate(self.kept)}
        tensors |= {f"kept_inside.{number}": inside for number, inside in enumerate(self._inside or [])}
        return {**tensors, "described": self.described_NC, "scores": self.scores_N}, {"levels": len(self.kept)}

    def restore(self, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.kept = [tensors[f"kept.{number}"] for number in range(facts["levels"])]
        self.described_NC, self.scores_N = tensors["described"], tensors["scores"]
        if "kept_inside.0" in tensors:
            self._inside = [tensors[f"kept_inside.{number}"] for number in range(facts["levels"])]


def layer_norm(level_BCHW: Tensor, inside_BHW: Tensor | None = None) -> Tensor:
    """Subtract an image's mean over all channels and tokens (inside), and divide by its deviation: float32 or wider."""
    level_BCHW = level_BCHW.to(torch.promote_types(level_BCHW.dtype, torch.float32))
    if inside_BHW is None:
        return F.layer_norm(level_BCHW, level_BCHW.shape[1:])
    weight_B1HW = (inside_BHW / inside_BHW.sum((1, 2), keepdim=True) / level_BCHW.shape[1])[:, None]
    centred = level_BCHW - (weight_B1HW * level_BCHW).sum((1, 2, 3), keepdim=True)
    return centred / ((weight_B1HW * centred.square()).sum((1, 2, 3), keepdim=True) + 1e-5).sqrt()


def unit_rows(level_BCHW: Tensor, degree: int) -> Tensor:
    """Averages of degree x degree neighbourhoods, with zeros outside the border, of unit length: [B, T, C]."""
    averaged = aggregate(level_BCHW, EmbeddingConfig(patch=degree))
    return F.normalize(averaged.flatten(2).mT, dim=2)


def to_nearest(rows_BTC: Tensor, gallery_tC: Tensor) -> Tensor:
    """The Euclidean distance of unit rows to the nearest row of a gallery: [B, T]."""
    rows_QC = rows_BTC.flatten(0, 1)
    parts = [rows_QC] if torch.compiler.is_compiling() else rows_QC.split(QUERIES)
    # Of the nearest, the distance is computed anew from differences: 2 - 2 cos cancels where rows are nearly equal.
    found = [(part - gallery_tC[(part @ gallery_tC.T).argmax(1)]).square().sum(1).sqrt() for part in parts]
    return torch.cat(found).view(rows_BTC.shape[:2])


def lowest(distance_BTN: Tensor, same_BN: Tensor, share: float) -> Tensor:
    """Average the lowest ``share``, at least one, of the distances to all other images: [B, T]."""
    ascending_BTN = distance_BTN.masked_fill(same_BN[:, None], torch.inf).sort(2).values
    others_B = (~same_BN).sum(1)
    count_B11 = (others_B * share + 1e-6).floor().clamp_min(1)[:, None, None]
    taken = torch.arange(distance_BTN.shape[2], device=distance_BTN.device) < count_B11
    return ascending_BTN.masked_fill(~taken, 0).sum(2) / count_B11[:, 0]
